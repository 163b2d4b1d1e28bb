"""MP3 files have the Info frame of LAME's own front end, and decode without delay."""

import subprocess
from pathlib import Path

import av
import lameenc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demucs_infer.audio import writer
from demucs_infer.audio.encoders import lame
from demucs_infer.audio.encoders.lame import FrameHeader
from demucs_infer.audio.formats import FORMATS, nearest_bitrate
from demucs_infer.audio.reader import AudioReader, TrackReader
from demucs_infer.audio.writer import AudioWriter
from tests.helpers.oracles import require_tool

RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


def make_noise(channels: int, samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(samples)
    return torch.rand(channels, samples, generator=generator) * 0.6 - 0.3


def save(path: Path, wav: torch.Tensor, rate: int, **options: int) -> Path:
    with AudioWriter(path, rate, len(wav), tags={"title": "ü"}, **options) as out:  # type: ignore[arg-type]
        out.write(wav)
    return path


def split_first_frame(path: Path) -> tuple[bytes, bytes]:
    """Return (the first frame after the tags, the rest)."""
    data = path.read_bytes()
    size = 0
    for seven_bits in data[6:10]:
        size = size << 7 | seven_bits
    data = data[10 + size :]
    first = FrameHeader(int.from_bytes(data[:4], "big"))
    return data[: first.length], data[first.length :]


def lame_bitrates(rate: int) -> list[int]:
    """Return the kbit/s that LAME really writes at a sample rate, of all that can be requested."""
    written = set()
    for bitrate in range(8, 321, 8):
        encoder = lameenc.Encoder()
        encoder.silence()
        encoder.set_channels(1)
        encoder.set_in_sample_rate(rate)
        encoder.set_out_sample_rate(rate)
        encoder.set_bit_rate(bitrate)
        data = bytes(encoder.encode(bytes(2 * 4000))) + bytes(encoder.flush())
        written.add(FrameHeader(int.from_bytes(data[:4], "big")).bitrate)
    return sorted(written)


@pytest.mark.parametrize("rate", RATES)
def test_bit_rates_are_those_that_lame_writes(rate: int) -> None:
    kind = FORMATS["mp3"]
    assert kind.bitrates_for and list(kind.bitrates_for(rate, 1)) == lame_bitrates(rate)
    assert set(kind.bitrates_for(rate, 1)) <= set(kind.bitrates)
    assert nearest_bitrate(kind, 100, rate, 2) == min(96, lame_bitrates(rate)[-1])


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "options",
    [{"bitrate": 0}, {"bitrate": -1}, {"quality": 0}, {"quality": 9}],
    ids=["lowest bit rate", "highest bit rate", "best quality", "lowest quality"],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_decodes_to_the_original_length(
    rate: int, options: dict[str, int], channels: int, tmp_path: Path
) -> None:
    if "bitrate" in options:
        options = {"bitrate": lame_bitrates(rate)[options["bitrate"]]}
    path = save(tmp_path / "x.mp3", make_noise(channels, 9001), rate, **options)
    read = torch.cat(list(TrackReader(path, sample_rate=rate, channels=channels).blocks()), -1)
    assert read.shape == (channels, 9001)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_shortest_tracks_decode_to_the_original_length(rate: int, tmp_path: Path) -> None:
    lowest, *_, highest = lame_bitrates(rate)
    for channels in (1, 2):
        for samples in (1, 7, 47, 48):
            for bitrate in (lowest, highest):
                wav = make_noise(channels, samples)
                path = save(tmp_path / "x.mp3", wav, rate, bitrate=bitrate)
                read = torch.cat(list(AudioReader(path).blocks()), -1)
                assert read.shape == wav.shape, (channels, samples, bitrate)


def test_shortest_tracks_are_not_shifted(tmp_path: Path) -> None:
    for samples in (40, 47, 60):  # two frames, of which the second is cut at both ends, or one
        wav = torch.full((1, samples), 0.5)
        read = torch.cat(list(AudioReader(save(tmp_path / "x.mp3", wav, 16000)).blocks()), -1)
        assert (read - wav).abs().max() < 0.1


def test_few_frames_that_look_like_a_video_are_read(tmp_path: Path) -> None:
    """FFmpeg cannot tell a file from H.263 that has a few frames and the code of a picture."""
    path = save(tmp_path / "x.mp3", make_noise(2, 1), 16000)
    data = path.read_bytes()
    path.write_bytes(data[:-200] + b"\0\0\x81\2\4" + data[-195:])
    with pytest.raises(av.FFmpegError):
        av.open(str(path))
    assert sum(block.shape[-1] for block in AudioReader(path).blocks()) == 1


@pytest.mark.parametrize("options", [{}, {"bitrate": 64}, {"quality": 4}])
def test_info_frame_equals_lames(options: dict[str, int], tmp_path: Path) -> None:
    """Compare all but what ours leaves out: low-pass, loudness, flags, checksum of the audio."""
    program = require_tool("lame")
    wav = make_noise(2, 50_000)
    ours, our_audio = split_first_frame(save(tmp_path / "ours.mp3", wav, 44100, **options))
    save(tmp_path / "x.wav", wav, 44100)
    flags = ["-V", "4"] if "quality" in options else ["-b", str(options.get("bitrate", 320))]
    command = [program, "--quiet", "-q2", "-m", "j", "--resample", "44.1", *flags, "--id3v2-only"]
    subprocess.run([*command, "--tt", "x", "x.wav", "theirs.mp3"], cwd=tmp_path, check=True)
    reference, reference_audio = split_first_frame(tmp_path / "theirs.mp3")
    # Other builds of LAME round other bits; at a variable rate frames then differ in size.
    assert len(our_audio) == pytest.approx(len(reference_audio), rel=0.01 * ("quality" in options))
    assert ours[:2] == reference[:2]
    assert ours[36:48] == reference[36:48], "Info or Xing, flags, number of frames"
    for header, rest in ((ours, our_audio), (reference, reference_audio)):
        length = (len(header) + len(rest)).to_bytes(4, "big")
        assert header[48:52] == header[184:188] == length
        assert lame._crc16(header[:190]) == int.from_bytes(header[190:192], "big")
    # LAME records some positions only, so that its table is a frame or two (of 6) behind.
    assert max(abs(a - b) for a, b in zip(ours[52:152], reference[52:152])) <= 16
    assert ours[156:160] == reference[156:160] == b"LAME"
    assert ours[165] & 15 == reference[165] & 15, "the method"
    assert ours[177:180] == reference[177:180], "delay and padding"


def test_audio_frames_do_not_depend_on_block_size(tmp_path: Path) -> None:
    """Upstream encodes the whole track in one call."""
    wav = make_noise(2, 150_000)
    whole = lameenc.Encoder()
    whole.silence()
    whole.set_channels(2)
    whole.set_in_sample_rate(44100)
    whole.set_bit_rate(320)
    whole.set_quality(2)
    samples = (wav * 32768).round().short().T.contiguous().numpy().tobytes()
    expected = bytes(whole.encode(samples)) + bytes(whole.flush())
    with AudioWriter(tmp_path / "x.mp3", 44100, 2) as out:
        for piece in wav.split(777, dim=1):
            out.write(piece)
    assert split_first_frame(tmp_path / "x.mp3")[1] == expected


def test_pyav_replaces_a_missing_lameenc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wav = make_noise(2, 60_000)
    ours = save(tmp_path / "ours.mp3", wav, 44100)
    monkeypatch.setattr(writer, "has_lame", lambda: False)
    other = save(tmp_path / "other.mp3", wav, 44100)
    first, second = (
        torch.cat(list(TrackReader(path, sample_rate=44100, channels=2).blocks()), -1)
        for path in (ours, other)
    )
    assert first.shape == second.shape == (2, 60_000)
    # LAME gets 16 bits in one and floats in the other: its decisions differ, its errors hardly.
    errors = [float((read - wav).square().mean()) for read in (first, second)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@given(st.integers(0, 2**32 - 1))
def test_frame_header_is_valid_or_refused(word: int) -> None:
    try:
        header = FrameHeader(word)
    except ValueError:
        return
    assert header.rate in RATES
    assert 24 <= header.length <= 1441  # 8 kbit/s at 24 kHz, 320 at 32 kHz and a byte of padding
    assert header.with_room().length >= 160 + header.side_bytes


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_seek_table_finds_positions(percent: int, tmp_path: Path) -> None:
    """A variable bit rate needs the seek table, because bytes do not tell the time."""
    ffmpeg = require_tool("ffmpeg")
    rate, seconds = 44100, 40
    wav = torch.zeros(2, rate * seconds)
    wav[:, rate * seconds // 2 :] = make_noise(
        2, rate * seconds // 2
    )  # the second half has most of the bytes
    path = save(tmp_path / "x.mp3", wav, rate, quality=4)
    start = seconds * percent / 100
    command = [ffmpeg, "-v", "error", "-ss", str(start), "-fflags", "+fastseek", "-i", str(path)]
    decoded = subprocess.run([*command, "-f", "s16le", "-"], capture_output=True, check=True).stdout
    # The table has a resolution of a hundredth of the file.
    assert len(decoded) / 4 / rate == pytest.approx(seconds - start, abs=0.03 * seconds)
