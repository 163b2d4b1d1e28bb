"""Every format is read with its original samples, length and position."""

import hashlib
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from demucs_infer.audio import AudioFile
from demucs_infer.audio.channels import convert_audio, resample
from demucs_infer.audio.reader import AudioReader, TrackReader, load_track, probe
from demucs_infer.audio.writer import save_audio
from demucs_infer.errors import AudioReadError
from tests.helpers.audio_corpus import KINDS, LOSSLESS, LOSSY, Clip, Corpus, cases, corpus, signal
from tests.helpers.audio_signals import make_noise
from tests.helpers.oracles import require_tool

__all__ = ["corpus"]  # a fixture


def read_all(reader: AudioReader | TrackReader) -> Tensor:
    return torch.cat(list(reader.blocks()), dim=-1)


@pytest.mark.parametrize(("name", "channels", "rate"), cases(LOSSLESS))
def test_lossless_files_are_read_exactly(
    corpus: Corpus, name: str, channels: int, rate: int
) -> None:
    clip = corpus.clip(name, channels, rate)
    reader = AudioReader(clip.path)
    read = read_all(reader)
    if clip.kind.by_soundfile:
        expected, _ = soundfile.read(clip.path, dtype="float32", always_2d=True)
        assert torch.equal(read, torch.from_numpy(expected.T.copy()))
    if name == "w64":  # ffmpeg pads the chunk to eight bytes and counts the padding as samples
        assert 0 <= (read.shape[-1] - len(clip.samples)) * 4 * channels < 8
        assert np.array_equal(read[:, : len(clip.samples)].numpy(), clip.floats)
    elif clip.kind.bits > 8:  # eight bits are rounded
        assert np.array_equal(read.numpy(), clip.floats)
    assert (reader.info.sample_rate, reader.info.channels) == (rate, channels)
    assert reader.frames == read.shape[-1]
    assert reader.warnings == ()
    if reader.info.frames is not None:
        assert reader.info.frames == read.shape[-1]


def measure_lag(read: np.ndarray, original: np.ndarray) -> tuple[int, float]:
    """Return by how many samples `read` is late, and the similarity at that lag."""
    size = 1 << (len(read) + len(original)).bit_length()
    spectrum = np.fft.rfft(read, size) * np.conj(np.fft.rfft(original, size))
    correlation = np.fft.irfft(spectrum, size)
    lag = int(np.argmax(correlation))
    similarity = correlation[lag] / np.sqrt((read**2).sum() * (original**2).sum())
    return (lag - size if lag > size // 2 else lag), float(similarity)


@pytest.mark.parametrize(("name", "channels", "rate"), cases(LOSSY))
def test_lossy_files_are_read_with_original_length_and_position(
    corpus: Corpus, name: str, channels: int, rate: int
) -> None:
    clip = corpus.clip(name, channels, rate)
    reader = AudioReader(clip.path)
    read = read_all(reader)
    original = torch.from_numpy(clip.floats)
    out_rate = clip.kind.out_rate or rate
    original = resample(original, rate, out_rate)
    assert reader.info.sample_rate == out_rate
    assert read.shape[0] == channels
    # At another rate, the resampler of opusenc rounds the length.
    slack = 1 if out_rate != rate else 0
    extra = read.shape[-1] - original.shape[-1]
    assert min(clip.kind.lag, 0) - slack <= extra <= clip.kind.extra + clip.kind.lag + slack
    for channel in range(channels):
        if channel == 3 and channels == 6:
            continue  # the LFE channel keeps only what is below 120 Hz
        lag, similarity = measure_lag(read[channel].numpy(), original[channel].numpy())
        # Resampling by Vorbis and Opus and the noise of AAC stay above this similarity.
        assert (lag, similarity > 0.8) == (clip.kind.lag, True)
    assert reader.warnings == ()


def test_ogg_of_one_page_ends_at_its_end_mark(corpus: Corpus) -> None:
    source = corpus.wav("page", signal(2, 44100, 16), 44100, 16)
    command = "ffmpeg -nostdin -v error -y -i {src} -c:a libvorbis {out}"
    path = corpus.run(command, source, corpus.folder / "page.ogg")
    expected, _ = soundfile.read(path, dtype="float32")
    assert read_all(AudioReader(path)).shape == expected.T.shape == (2, 22073)


EACH = ["wav-24", "flac", "aiff-16", "caf-16", "alac-16", "mp3-cbr", "ogg", "opus", "m4a", "webm"]


@pytest.mark.parametrize("name", EACH)
def test_part_of_a_file_is_a_slice_of_the_read_all(corpus: Corpus, name: str) -> None:
    rate = KINDS[name].out_rate or 44100
    path = corpus.clip(name, 2, rate).path
    everything = read_all(AudioReader(path))
    for start, length in [(0, 1), (0, 5000), (1, 4096), (5003, 9000), (17000, 10**6)]:
        part = AudioReader(path, start_seconds=start / rate, duration_seconds=length / rate)
        assert torch.equal(read_all(part), everything[:, start : start + length])
        assert part.warnings == ()
    with pytest.raises(AudioReadError, match=r"ends at [01].50 s, before the requested start"):
        read_all(AudioReader(path, start_seconds=30))


@pytest.mark.parametrize("name", EACH)
def test_path_bytes_and_file_object_give_the_same_samples(corpus: Corpus, name: str) -> None:
    path = corpus.clip(name, 2, KINDS[name].out_rate or 44100).path
    expected = read_all(AudioReader(path))
    data = path.read_bytes()
    assert torch.equal(read_all(AudioReader(data)), expected)
    assert torch.equal(read_all(AudioReader(str(path))), expected)
    with path.open("rb") as file:
        assert torch.equal(read_all(AudioReader(file)), expected)
        assert not file.closed
    inside = io.BytesIO(b"something else" + data)
    inside.seek(14)
    assert torch.equal(read_all(AudioReader(inside)), expected)
    disguised = path.with_suffix(".txt")
    disguised.write_bytes(data)
    assert torch.equal(read_all(AudioReader(disguised)), expected)


class Pipe(io.RawIOBase):
    """A file that cannot seek, such as standard input or a download."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data

    def read(self, size: int = -1, /) -> bytes:
        size = len(self.data) if size < 0 else size
        part, self.data = self.data[:size], self.data[size:]
        return part

    def readable(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["wav-16", "m4a", "mp3-cbr"])
def test_pipe_can_be_read_twice(corpus: Corpus, name: str) -> None:
    clip = corpus.clip(name)
    reader = AudioReader(Pipe(clip.path.read_bytes()))
    assert torch.equal(read_all(reader), read_all(AudioReader(clip.path)))
    assert torch.equal(read_all(reader), read_all(AudioReader(clip.path)))


def test_fifo_can_be_read_twice(corpus: Corpus, tmp_path: Path) -> None:
    data = corpus.clip("m4a").path.read_bytes()
    fifo = tmp_path / "fifo.m4a"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(data))
    writer.start()
    reader = AudioReader(fifo)
    writer.join()
    assert torch.equal(read_all(reader), read_all(AudioReader(data)))
    assert torch.equal(read_all(reader), read_all(AudioReader(data)))


@pytest.mark.parametrize("frames", [1000, 4096, 65536])
def test_blocks_have_the_requested_size(corpus: Corpus, frames: int) -> None:
    reader = AudioReader(corpus.clip("mp3-cbr").path)
    blocks = list(reader.blocks(frames))
    assert all(block.shape[-1] == frames for block in blocks[:-1])
    assert torch.equal(torch.cat(blocks, dim=-1), read_all(reader))


def test_interleaved_passes_over_one_file_are_independent(corpus: Corpus) -> None:
    path = corpus.clip("flac").path
    expected = read_all(AudioReader(path))
    with path.open("rb") as file:
        reader = AudioReader(file)
        pairs = list(zip(reader.blocks(1000), reader.blocks(1000)))
    for k in (0, 1):
        assert torch.equal(torch.cat([pair[k] for pair in pairs], dim=-1), expected)


@pytest.mark.parametrize("name", ["mp3-cbr", "m4a", "ogg", "flac"])
def test_reading_uses_no_programs_in_path(
    corpus: Corpus, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus.clip(name).path
    with_programs = hashlib.sha256(read_all(AudioReader(path)).numpy().tobytes()).hexdigest()
    monkeypatch.setenv("PATH", "/nonexistent")
    without = hashlib.sha256(read_all(AudioReader(path)).numpy().tobytes()).hexdigest()
    assert with_programs == without


BITS = {
    "wav-u8": 8,
    "wav-16": 16,
    "wav-24": 24,
    "wav-32": 32,
    "wav-float32": 32,
    "wav-float64": 64,
    "wav-mulaw": 16,
    "flac": 24,
    "flac-ffmpeg": 16,
    "alac-24": 24,
    "alac-16": 16,
    "aiff-24": 24,
    "mp3-cbr": None,
    "m4a": None,
}


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_probe_reports_bits_and_duration(corpus: Corpus, name: str, bits: int | None) -> None:
    clip = corpus.clip(name)
    info = probe(clip.path)
    assert info.bits == bits
    assert info.is_float == ("float" in name)
    # An M4A's length is rounded to its film's milliseconds.
    assert info.duration_seconds == pytest.approx(len(clip.samples) / 44100, abs=1e-3)


PICTURE = ["-f", "lavfi", "-i", "color=c=red:size=600x600:duration=1:rate=1"]


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp3", "libmp3lame"), ("flac", "flac"), ("m4a", "aac")]
)
def test_tags_and_cover_are_read(corpus: Corpus, suffix: str, codec: str) -> None:
    wave = corpus.wav("tagged", signal(2, 44100, 16), 44100, 16)
    tags = {"title": "Ünïted", "artist": "A", "album": "B", "track": "3", "date": "1999"}
    tags["comment"] = "two words"
    words = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(wave), *PICTURE]
    words += ["-map", "0:a", "-map", "1:v", "-c:a", codec, "-c:v", "mjpeg", "-frames:v", "1"]
    words += ["-disposition:v", "attached_pic", "-id3v2_version", "3"]
    words += [word for name, text in tags.items() for word in ("-metadata", f"{name}={text}")]
    path = corpus.folder / f"tagged.{suffix}"
    subprocess.run([*words, str(path)], check=True, timeout=60, capture_output=True)
    info = probe(path)
    assert tags.items() <= dict(info.tags).items()
    assert info.cover is not None
    assert info.cover.startswith(b"\xff\xd8\xff") and info.cover.endswith(b"\xff\xd9")
    assert info.cover_mime == "image/jpeg"
    assert read_all(AudioReader(path)).shape == (2, 22073)


def test_mp3_after_a_large_cover_is_read(corpus: Corpus) -> None:
    picture = b"\0image/jpeg\0\3\0\xff\xd8\xff" + b"\0" * (3 << 20)
    frame = b"APIC" + len(picture).to_bytes(4, "big") + b"\0\0" + picture
    size = bytes((len(frame) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    plain = corpus.clip("mp3-cbr").path.read_bytes()
    reader = AudioReader(b"ID3\3\0\0" + size + frame + plain)
    assert torch.equal(read_all(reader), read_all(AudioReader(plain)))
    assert reader.warnings == ()
    assert reader.info.cover is not None and len(reader.info.cover) > 3 << 20


def test_default_stream_is_read_unless_one_is_given(corpus: Corpus) -> None:
    waves = [corpus.wav(f"part{k}", signal(2, 44100, 16) // (k + 1), 44100, 16) for k in range(3)]
    path = corpus.folder / "several.m4a"
    words = ["ffmpeg", "-nostdin", "-v", "error", "-y"]
    words += [word for wave in waves for word in ("-i", str(wave))]
    words += ["-map", "0", "-map", "1", "-map", "2", "-c:a", "alac"]
    words += ["-disposition:a:0", "0", "-disposition:a:1", "default", "-disposition:a:2", "0"]
    subprocess.run([*words, str(path)], check=True, timeout=60, capture_output=True)
    reader = AudioReader(path)
    expected = [read_all(AudioReader(wave)) for wave in waves]
    assert torch.equal(read_all(reader), expected[1])
    assert "3 audio streams" in reader.warnings[0]
    assert torch.equal(read_all(AudioReader(path, stream=2)), expected[2])
    file = AudioFile(path)
    assert len(file) == 3
    assert torch.equal(file.read(), torch.stack(expected))
    assert torch.equal(file.read(streams=0, channels=1), expected[0].mean(dim=0, keepdim=True))
    with pytest.raises(AudioReadError, match="no audio stream 3"):
        AudioReader(path, stream=3)


def add_itunes_tag(data: bytes, text: str) -> bytes:
    """Insert an iTunSMPB tag into an M4A whose index comes last."""

    def box(kind: bytes, content: bytes) -> bytes:
        return (8 + len(content)).to_bytes(4, "big") + kind + content

    content = b"\0\0\0\1\0\0\0\0" + text.encode()
    tag_box = box(b"mean", b"\0\0\0\0com.apple.iTunes") + box(b"name", b"\0\0\0\0iTunSMPB")
    tag_box = box(b"----", tag_box + box(b"data", content))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    udta = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", tag_box)))
    moov = data.rindex(b"moov") - 4
    size = int.from_bytes(data[moov : moov + 4], "big")
    assert moov + size == len(data)
    return data[:moov] + (size + len(udta)).to_bytes(4, "big") + data[moov + 4 :] + udta


def test_itunes_delay_and_length_are_applied(corpus: Corpus) -> None:
    source = corpus.wav("itunes", signal(2, 44100, 16), 44100, 16)
    command = "ffmpeg -nostdin -v error -y -i {src} -c:a aac -b:a 256k -use_editlist 0 {out}"
    plain = corpus.run(command, source, corpus.folder / "noedit.m4a").read_bytes()
    length = len(signal(2, 44100, 16))
    padding = -(length + 1024) % 1024
    tagged = add_itunes_tag(plain, f" 00000000 00000400 {padding:08X} {length:016X} 00000000")
    reader = AudioReader(tagged)
    read = read_all(reader)
    assert read.shape[-1] == length == reader.info.frames
    lag, similarity = measure_lag(read[0].numpy(), signal(2, 44100, 16).T[0] / 2.0**31)
    assert (lag, similarity > 0.9) == (0, True)


def test_track_reader_equals_upstreams_conversion(corpus: Corpus) -> None:
    for name, channels, rate in [("wav-24", 1, 48000), ("flac", 2, 96000), ("ogg", 2, 22050)]:
        path = corpus.clip(name, channels, rate).path
        track = TrackReader(path, sample_rate=44100, channels=2)
        expected = convert_audio(read_all(AudioReader(path)), rate, 44100, 2)
        for _ in range(2):  # one to measure the level, one to separate
            assert torch.equal(read_all(track), expected)
        assert track.frames == expected.shape[-1]
        assert (track.channels, track.sample_rate, track.warnings) == (2, 44100, ())
        assert torch.equal(load_track(path, 2, 44100), expected)


def test_extra_channels_are_dropped_with_a_warning_refused_or_grouped(corpus: Corpus) -> None:
    path = corpus.clip("wav-24", 6, 44100).path
    expected = read_all(AudioReader(path))
    first = TrackReader(path, channels=2, extra_channels="first")
    assert torch.equal(read_all(first), expected[:2])
    assert "has 6 channels: the first 2 are used" in first.warnings[0]
    with pytest.raises(AudioReadError, match="6 channels, expected at most 2"):
        TrackReader(path, channels=2, extra_channels="error")
    pairs = [
        TrackReader(path, channels=2, extra_channels="pairs", group=group) for group in range(3)
    ]
    assert pairs[0].num_groups == 3
    assert torch.equal(torch.cat([read_all(pair) for pair in pairs]), expected)
    with pytest.raises(ValueError, match="group = 3 must be 0 to 2"):
        TrackReader(path, channels=2, extra_channels="pairs", group=3)
    assert torch.equal(read_all(TrackReader(path, channels=1)), expected.mean(dim=0, keepdim=True))


@pytest.mark.parametrize("layout", ["5.1", "5.1(side)", "5.0", "quad", "4.0", "6.1"])
def test_surround_sound_is_mixed_down_as_ffmpeg_does(layout: str, tmp_path: Path) -> None:
    path, count = tmp_path / "surround.wav", av.AudioLayout(layout).nb_channels
    samples = 0.1 * make_noise(count, 4000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=44100, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).numpy(), "flt", layout)
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])
    track = TrackReader(path, channels=2)
    mixed = read_all(track)
    assert track.warnings == (f"{path} has {count} channels: mixed down to 2",)
    frame = av.AudioFrame.from_ndarray(samples.numpy(), "fltp", layout)
    frame.sample_rate = 44100
    (oracle,) = av.AudioResampler("fltp", "stereo", 44100).resample(frame)
    # FFmpeg's factors are rounded to 24 bits in another order.
    torch.testing.assert_close(mixed, torch.from_numpy(oracle.to_ndarray()), rtol=0, atol=1e-6)


def test_mp3_that_was_cut_between_frames_is_not_called_damaged(tmp_path: Path) -> None:
    """The decoder loses half a frame at the cut, which the new header counts."""
    whole, cut = tmp_path / "whole.mp3", tmp_path / "cut.mp3"
    save_audio(0.1 * make_noise(2, 3 * 44100), whole, 44100)
    words = ["-v", "error", "-i", whole, "-ss", "0.31", "-t", "1", "-c", "copy", cut]
    subprocess.run([require_tool("ffmpeg"), *words], check=True)
    reader = AudioReader(cut)
    read_all(reader)
    assert reader.warnings == ()


MEMORY = """
import resource, sys, torch
from demucs_infer.audio.writer import AudioWriter
from demucs_infer.audio.reader import TrackReader
from tests.helpers.processes import peak_kilobytes
torch.set_num_threads(1)
short, long, rate, out = sys.argv[1:]
def peak(path):
    track = TrackReader(path, sample_rate=int(rate), channels=2)
    with AudioWriter(out, int(rate), 2, format="wav") as file:
        for block in track.blocks():
            file.write(block)
    return track.frames, peak_kilobytes()
_, before = peak(short)
frames, after = peak(long)
print(frames, (after - before) / 1024)
"""


def make_silent_wav(path: Path, rate: int, channels: int, seconds: int) -> Path:
    """Make a WAV of silence as a sparse file."""
    soundfile.write(path, np.zeros((1, channels), np.int16), rate)
    size = seconds * rate * channels * 2
    with path.open("r+b") as file:
        file.seek(4)
        file.write((36 + size).to_bytes(4, "little"))
        file.seek(40)
        file.write(size.to_bytes(4, "little"))
        file.truncate(44 + size)
    return path


@pytest.mark.parametrize(
    ("rate", "channels", "to_rate"),
    [(1500, 1, 1000), pytest.param(48000, 2, 44100, marks=pytest.mark.slow)],
)
def test_memory_is_independent_of_track_length(
    tmp_path: Path, rate: int, channels: int, to_rate: int
) -> None:
    short = make_silent_wav(tmp_path / "short.wav", rate, channels, 1)
    long = make_silent_wav(tmp_path / "long.wav", rate, channels, 3 * 3600)
    out = tmp_path / "out.wav"  # integers, so that floats are spooled until the peak is known
    words = [sys.executable, "-c", MEMORY, str(short), str(long), str(to_rate), str(out)]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, check=True, cwd=root, capture_output=True, text=True)
    frames, grown = done.stdout.split()
    assert int(frames) == 3 * 3600 * to_rate == soundfile.info(out).frames
    # MiB more than for one second: blocks, caches of the convolution, and the encoder's queue. The
    # floats of the tracks are 82 and 3600 MiB.
    assert float(grown) < 64
    out.unlink()


def test_invalid_arguments_raise_value_error(corpus: Corpus) -> None:
    clip: Clip = corpus.clip("wav-16")
    for wrong in ({"start_seconds": -1.0}, {"start_seconds": float("nan")}):
        with pytest.raises(ValueError, match="start_seconds"):
            AudioReader(clip.path, **wrong)
    with pytest.raises(ValueError, match="duration_seconds"):
        AudioReader(clip.path, duration_seconds=0.0)
    with pytest.raises(ValueError, match="expected a path, bytes, or a file"):
        AudioReader(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="binary mode"), clip.path.open(encoding="latin1") as file:
        AudioReader(file)  # type: ignore[arg-type]
