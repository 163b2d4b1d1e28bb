"""Truncated, damaged, malicious and other files have a defined result or one clear error."""

import contextlib
import io
import json
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from demucs_infer.audio import decode
from demucs_infer.audio.reader import AudioReader, probe
from demucs_infer.errors import AudioReadError
from tests.helpers.audio_corpus import Corpus, corpus
from tests.helpers.audio_signals import make_noise
from tests.helpers.oracles import require_tool

__all__ = ["corpus"]  # a fixture

ROOT = Path(__file__).parents[2]
KINDS = ["wav-24", "rf64", "w64", "flac", "aiff-16", "caf-16", "mp3-cbr", "ogg", "opus"]
KINDS += ["m4a", "m4a-fast", "alac-16", "mkv-flac", "webm", "mkv-aac", "aac"]
CUTS = [1, 4, 11, 12, 30, 44, 45, 90, 300, 0.5, 0.9, -1]

# Reads every file with bounded memory; any other exception than our own ends it.
READ_ALL = """
import json, resource, sys, torch
from demucs_infer.audio.reader import TrackReader
from demucs_infer.errors import AudioReadError
torch.set_num_threads(1)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), size + (1 << 30)))
def read(path):
    try:
        track = TrackReader(path, sample_rate=44100, channels=2)
        finite = all(bool(torch.isfinite(block).all()) for block in track.blocks())
        return ["ok" if finite else "not finite", list(track.warnings)]
    except (AudioReadError, ValueError) as error:
        return [type(error).__name__, [str(error)]]
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
before = None
results = {}
for path in sys.stdin.read().split("\\n"):
    results[path] = read(path)
    before = before or peak()
print(json.dumps([results, (peak() - before) / 1024]))
"""


def read_all(paths: list[Path]) -> tuple[dict[str, list[object]], float]:
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL],
        input="\n".join(map(str, paths)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    results, grown = json.loads(done.stdout)
    return results, grown


def test_cut_and_corrupted_files_have_a_defined_result(corpus: Corpus, tmp_path: Path) -> None:
    paths = [corpus.clip("wav-16").path]
    rng = np.random.default_rng(0)
    for name in KINDS:
        rate = 48000 if name in ("webm", "opus") else 44100
        original = corpus.clip(name, 2, rate).path
        data = original.read_bytes()
        for cut in CUTS:
            path = tmp_path / f"{name}-cut-{cut}{original.suffix}"
            path.write_bytes(data[: int(cut * len(data)) if 0 < cut < 1 else int(cut)])
            paths.append(path)
        for seed, places in enumerate((3, 30, 300)):
            corrupt = np.frombuffer(data, np.uint8).copy()
            # The first one is damaged in the header only.
            end = min(len(data), 400) if seed == 0 else len(data)
            corrupt[rng.integers(0, end, places)] = rng.integers(0, 256, places)
            path = tmp_path / f"{name}-corrupt-{places}{original.suffix}"
            path.write_bytes(corrupt.tobytes())
            paths.append(path)
    assert len(paths) > 200
    results, grown = read_all(paths)
    for path, (outcome, message) in results.items():
        # A corrupt header may declare a number of channels that cannot become 2.
        assert outcome in ("ok", "AudioReadError") or "cannot become 2" in str(message), (
            path,
            message,
        )
        assert all(len(line) < 400 for line in message), path  # one sentence
    assert results[str(paths[0])] == ["ok", []]
    # The longest file has 1.5 s: this is for decoders and blocks.
    assert grown < 100


# Codecs by suffix. FFmpeg writes an unusual number of channels with a custom layout, and stores
# more than eight planes in another place.
MANY_CHANNELS = {
    "wav": "-c:a pcm_s16le",
    "aiff": "-c:a pcm_s16be",
    "caf": "-c:a pcm_s16be",
    "mov": "-c:a pcm_s24le",
    "mkv": "-c:a pcm_f32le",
    "au": "-c:a pcm_f64be",
    "flac": "-c:a flac",
    "m4a": "-c:a aac",
    "mp4": "-c:a alac",
    "ogg": "-c:a libvorbis",
    "opus": "-c:a libopus -mapping_family 255",
    "wv": "-c:a wavpack",
    "tta": "-c:a tta",
    "mka": "-c:a truehd -strict -2",
}


def test_any_number_of_channels_is_read_or_refused(corpus: Corpus, tmp_path: Path) -> None:
    paths = [corpus.clip("wav-16").path]
    require_tool("ffmpeg")
    ffmpeg = ["ffmpeg", "-nostdin", "-v", "error", "-i"]
    counts, commands = {}, {}
    for channels in (8, 9, 64):
        levels = 1000 * np.arange(1, channels + 1, dtype=np.int16)
        source = tmp_path / f"{channels}.wav"
        soundfile.write(source, np.tile(levels // 2, (20_000, 1)), 48000)
        for suffix, codec in MANY_CHANNELS.items():
            path = source.with_name(f"{channels}-{suffix}.{suffix}")
            counts[path] = channels
            commands[path] = [*ffmpeg, source, *codec.split(), path]
    with ThreadPoolExecutor() as pool:
        run = partial(subprocess.run, check=False, capture_output=True)
        for path, process in zip(commands, pool.map(run, commands.values()), strict=True):
            if process.returncode == 0:
                paths.append(path)
            else:
                del counts[path]
    assert len(paths) > 20  # not every encoder supports every number
    results, _ = read_all(paths * 2)  # a double free shows later
    for path, channels in counts.items():
        outcome, message = results[str(path)]
        assert outcome in ("ok", "AudioReadError") or "cannot become 2" in str(message), (
            path,
            message,
        )
        if path.suffix in (".wav", ".mkv", ".aiff", ".caf", ".mov", ".au") and channels < 9:
            read = torch.cat(list(AudioReader(path).blocks()), dim=-1)
            assert np.array_equal(read[:, 0] * 2**15, 1000 * np.arange(1, channels + 1) // 2)


@pytest.mark.parametrize(
    ("name", "is_custom"),
    [
        ("stereo", False),
        ("6.1(back)", False),
        ("9 channels", False),
        ("FR+FL", True),
        ("FL+FL+FR", True),
    ],
)
def test_custom_layouts_are_recognized(name: str, is_custom: bool) -> None:
    assert decode._is_custom_layout(av.AudioLayout(name)) == is_custom


# The warning for the first half of a file.
HALVES = {
    "wav-24": "seconds are missing",
    "rf64": "seconds are missing",
    "w64": "seconds are missing",
    "flac": "seconds are missing",
    "aiff-16": "seconds are missing",
    "caf-16": "seconds are missing",
    "mp3-cbr": "seconds are missing",
    "ogg": "end mark is missing",
    "m4a-fast": "seconds are missing",
    "mkv-flac": "seconds are missing",
    "webm": "seconds are missing",
}


@pytest.mark.parametrize(("name", "message"), HALVES.items())
def test_truncated_files_give_a_warning_or_with_strict_an_error(
    corpus: Corpus, name: str, message: str
) -> None:
    data = corpus.clip(name, 2, 48000).path.read_bytes()
    half = data[: int((0.8 if name == "ogg" else 0.6) * len(data))]  # Ogg pages are long
    reader = AudioReader(half)
    assert sum(block.shape[-1] for block in reader.blocks()) == reader.frames
    assert any(message in line for line in reader.warnings)
    with pytest.raises(AudioReadError, match="download it again"):
        list(AudioReader(half, strict=True).blocks())
    # A part that is complete is not damaged.
    part = AudioReader(half, duration_seconds=0.1, strict=True)
    assert sum(block.shape[-1] for block in part.blocks()) == 4800
    assert list(AudioReader(data, strict=True).blocks())


COMPLETE = [
    "x.w64 -c:a pcm_s24le",
    "x.avi -c:a pcm_s16le -af asetnsamples=n=64:p=0",
    "x.wav -c:a adpcm_ms",
]


@pytest.mark.parametrize("words", COMPLETE)
@pytest.mark.parametrize("frames", [57_070, 57_071])
def test_complete_file_with_estimated_length_gives_no_warning(
    words: str, frames: int, tmp_path: Path
) -> None:
    name, *arguments = words.split()
    soundfile.write(tmp_path / "of.wav", make_noise(2, frames).T.numpy(), 8000)
    command = [require_tool("ffmpeg"), "-v", "error", "-i", "of.wav", *arguments, name]
    subprocess.run(command, cwd=tmp_path, check=True)
    reader = AudioReader(tmp_path / name, strict=True)
    read = sum(block.shape[-1] for block in reader.blocks())
    assert 0 <= read - frames < 1024, "padding of the last block"
    assert reader.warnings == ()


NOT_AUDIO = {
    b"": "is empty",
    b"Dear all,\nplease find attached": "looks like text",
    b"<!DOCTYPE html><html>404": "a web page",
    b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n": "a playlist",
    b"ffconcat version 1.0\nfile /etc/passwd\n": "a playlist",
    b"PK\3\4" + bytes(100): "a zip archive",
    b"MThd\0\0\0\6\0\1\0\1": "a MIDI file",
    b"%PDF-1.4": "a PDF",
    b"\0\0\0\x20ftypM4A " + bytes(100): "an MP4 or M4A file that was cut off",
    b"fLaC\0\0": "a FLAC file that was cut off",
    bytes(5000): "unknown file format",
    np.random.default_rng(0).bytes(5000): "unknown file format",
}


@pytest.mark.parametrize(("data", "message"), NOT_AUDIO.items(), ids=lambda value: str(value)[:20])
def test_error_describes_files_that_are_not_audio(data: bytes, message: str) -> None:
    with pytest.raises(AudioReadError, match=message):
        list(AudioReader(data).blocks())


# Files that make FFmpeg open other files or addresses, unless that is forbidden.
PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{url}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
    'profiles="urn:mpeg:dash:profile:isoff-live:2011" type="static"><Period><AdaptationSet '
    'contentType="audio"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} "
    "RTP/AVP 0\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("name", ["song.mp3", "song.m3u8", "song.ffconcat"])
def test_playlist_opens_no_other_file_or_connection(
    corpus: Corpus, tmp_path: Path, kind: str, name: str
) -> None:
    secret = corpus.clip("wav-16").path
    song = tmp_path / name
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        for url in (str(secret), f"file:{secret}", f"http://127.0.0.1:{port}/song.wav"):
            song.write_text(PLAYLISTS[kind].format(url=url, port=port))
            with pytest.raises(AudioReadError, match=r"it looks like|cannot read"):
                list(AudioReader(song).blocks())
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("guard", ["format_whitelist", "protocol_whitelist"])
def test_each_whitelist_alone_keeps_playlists_closed(corpus: Corpus, guard: str) -> None:
    """Either whitelist keeps FFmpeg from opening files of a playlist; without both, it does."""
    playlist = PLAYLISTS["concat"].format(url=corpus.clip("wav-16").path).encode()
    others = {name: text for name, text in decode._OPTIONS.items() if name != guard}

    def count_samples(options: dict[str, str]) -> int:
        with av.open(io.BytesIO(playlist), options={"safe": "0", **options}) as container:
            return sum(frame.samples for frame in container.decode(audio=0))

    assert count_samples({"protocol_whitelist": "file"}) > 0  # without whitelists
    with pytest.raises(av.FFmpegError):
        count_samples(others)


def test_missing_files_folders_and_exhausted_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(AudioReadError, match=r"gone\.wav: no such file"):
        probe(tmp_path / "gone.wav")
    with pytest.raises(AudioReadError, match="it is a folder"):
        probe(tmp_path)
    with pytest.raises(AudioReadError, match="no such file"):
        probe("http://127.0.0.1:9/song.wav")  # a path is never taken as a URL
    with (tmp_path / "a.wav").open("wb+") as file:
        file.write(b"RIFF")
        with pytest.raises(AudioReadError, match=r"call `seek\(0\)` first"):
            probe(file)


def wav(
    data: bytes,
    *,
    rate: int = 44100,
    channels: int = 1,
    code: int = 1,
    bits: int = 16,
    size: int | None = None,
) -> bytes:
    """Make a WAV with that header."""
    width = channels * bits // 8
    head = struct.pack("<HHIIHH", code, channels, rate, rate * width & 0xFFFFFFFF, width, bits)
    size = len(data) if size is None else size
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav(bytes(1000), rate=0), "header of .*: 0 Hz|cut off or damaged"),
        (wav(bytes(1000), rate=2**31 - 1), "2147483647 Hz|cut off or damaged"),
        (wav(bytes(1000), channels=255), "channels in .*: 255"),
        (wav(bytes(1000), channels=0), "channels in .*: 0|cut off or damaged"),
        (wav(b""), "contains no samples|cut off or damaged"),
    ],
)
def test_impossible_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(AudioReadError, match=message):
        list(AudioReader(data).blocks())


def test_header_of_ten_hours_takes_no_memory() -> None:
    data = wav(bytes(1000), size=36000 * 44100 * 2 & 0xFFFFFFFE)
    reader = AudioReader(data)
    assert reader.info.duration_seconds == pytest.approx(36000)
    assert sum(block.shape[-1] for block in reader.blocks()) == 500
    assert "35999.989 seconds are missing" in reader.warnings[0]


def test_unknown_length_in_the_header_gives_no_warning() -> None:
    for size in (0, 0xFFFFFFFF):
        reader = AudioReader(wav(bytes(1000), size=size), strict=True)
        assert sum(block.shape[-1] for block in reader.blocks()) == 500


def test_flac_with_too_large_a_length_is_read(corpus: Corpus) -> None:
    data = bytearray(corpus.clip("flac").path.read_bytes())
    data[21] |= 0x0F  # the 36 bits of its count of samples
    data[22:26] = b"\xff\xff\xff\xff"
    reader = AudioReader(bytes(data))
    assert sum(block.shape[-1] for block in reader.blocks()) == 22073
    assert "seconds are missing" in reader.warnings[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_become_silence_with_a_warning(bad: float, tmp_path: Path) -> None:
    samples = np.full((100_000, 2), 0.5, np.float32)
    samples[70_000, 1] = bad
    path = tmp_path / "bad.wav"
    soundfile.write(path, samples, 44100, subtype="FLOAT")
    reader = AudioReader(path)
    read = torch.cat(list(reader.blocks()), dim=-1)
    samples[70_000, 1] = 0
    assert torch.equal(read, torch.from_numpy(samples.T.copy()))
    assert "not finite numbers, the first at 1.5873 s" in reader.warnings[0]
    with pytest.raises(AudioReadError, match=r"1\.5873 s"):
        list(AudioReader(path, strict=True).blocks())


def test_doubles_beyond_float32_become_silence(tmp_path: Path) -> None:
    path = tmp_path / "huge.wav"
    soundfile.write(path, np.array([0.1, 1e300, 0.2]), 44100, subtype="DOUBLE")
    reader = AudioReader(path)
    read = torch.cat(list(reader.blocks()), dim=-1)
    assert torch.equal(read, torch.tensor([[0.1, 0.0, 0.2]]))
    assert "not finite" in reader.warnings[0]


def test_damage_does_not_shift_what_follows(corpus: Corpus) -> None:
    clip = corpus.clip("flac", 2, 48000)
    data = bytearray(clip.path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    reader = AudioReader(bytes(data))
    read = torch.cat(list(reader.blocks()), dim=-1)
    original = torch.from_numpy(clip.floats)
    assert read.shape == original.shape
    assert torch.equal(read[:, -4000:], original[:, -4000:])
    assert "damaged" in reader.warnings[0]


def flv(*parts: tuple[bytes, int]) -> bytes:
    """Join FLV files (each with the seconds at which it begins) into one without a stream list."""
    joined = b"FLV\1\4" + (9).to_bytes(4, "big") + bytes(4)
    for data, seconds in parts:
        at = 13
        while at + 11 <= len(data):
            size = 11 + int.from_bytes(data[at + 1 : at + 4], "big") + 4
            time = int.from_bytes(data[at + 7 : at + 8] + data[at + 4 : at + 7], "big")
            time += 1000 * seconds
            stamp = (time & 0xFFFFFF).to_bytes(3, "big") + bytes([time >> 24])
            if data[at] in (8, 9):  # audio and video
                joined += data[at : at + 4] + stamp + data[at + 8 : at + size]
            at += size
    return joined


def test_reader_accepts_streams_that_appear_in_mid_file(tmp_path: Path) -> None:
    ffmpeg = [require_tool("ffmpeg"), "-nostdin", "-v", "error", "-f", "lavfi", "-i"]
    audio, video = tmp_path / "audio.flv", tmp_path / "video.flv"
    subprocess.run([*ffmpeg, "sine=440:d=2:r=44100", "-c:a", "adpcm_swf", audio], check=True)
    subprocess.run([*ffmpeg, "testsrc=size=64x48:duration=2", "-c:v", "flv1", video], check=True)
    seconds = 40  # FFmpeg looks for streams in the first part of a file only
    parts = [(audio.read_bytes(), second) for second in range(0, seconds, 2)]
    reader = AudioReader(flv(*parts, (video.read_bytes(), seconds)))
    assert sum(block.shape[-1] for block in reader.blocks()) >= seconds * 44100
    assert not any("damaged" in warning for warning in reader.warnings)


def caf_of_short_packets(samples: NDArray[np.int16]) -> bytes:
    """Return a CAF of PCM samples (T C) whose packet table lists every moment as a packet."""
    length, channels = samples.shape
    table = struct.pack(">qqii", length, length, 0, 0) + bytes([2 * channels]) * length
    chunks = {
        b"desc": struct.pack(">d4sIIIII", 44100, b"lpcm", 0, 0, 1, channels, 16),
        b"pakt": table,
        b"data": bytes(4) + samples.astype(">i2").tobytes(),
    }
    body = (struct.pack(">4sq", name, len(chunk)) + chunk for name, chunk in chunks.items())
    return b"caff" + struct.pack(">HH", 1, 0) + b"".join(body)


def test_packets_of_one_sample_are_converted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.arange(-10_000, 10_000, dtype=np.int16).reshape(-1, 2)
    conversions = []
    convert = decode._to_float

    def count(group: list[decode.Samples]) -> torch.Tensor:
        conversions.append(len(group))
        return convert(group)

    monkeypatch.setattr(decode, "_to_float", count)
    reader = AudioReader(caf_of_short_packets(samples))
    read = torch.cat(list(reader.blocks()), dim=-1)
    assert torch.equal(read, torch.from_numpy(samples.T / np.float32(2**15)))
    assert sum(conversions) == len(samples), "packets of one sample"
    assert len(conversions) <= len(samples) // 1000
    part = AudioReader(
        caf_of_short_packets(samples), start_seconds=7 / 44100, duration_seconds=1000 / 44100
    )
    assert torch.equal(torch.cat(list(part.blocks()), dim=-1), read[:, 7:1007])


def caf_chunk(name: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    """Return a chunk of a CAF whose header may declare another size."""
    return struct.pack(">4sq", name, len(content) if size is None else size) + content


CAF_HEAD = b"caff\0\1\0\0" + caf_chunk(
    b"desc", struct.pack(">d4sIIIII", 44100, b"lpcm", 0, 4, 1, 2, 16)
)


@pytest.mark.parametrize(
    "chunks",
    [
        caf_chunk(b"free", size=1 << 62) + caf_chunk(b"data", bytes(4004)),
        caf_chunk(b"data", bytes(4004)) + caf_chunk(b"free", size=1 << 62),
        caf_chunk(b"data", bytes(4004), size=1 << 62) + caf_chunk(b"free"),
    ],
    ids=["before the samples", "behind the samples", "samples"],
)
def test_chunks_beyond_the_longest_file_print_nothing(
    chunks: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.caf"  # in memory there is no position too large to seek to
    path.write_bytes(CAF_HEAD + chunks)
    with contextlib.suppress(AudioReadError):
        list(AudioReader(path).blocks())
    assert capfd.readouterr().err == ""
