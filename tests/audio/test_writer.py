"""Written files have the given samples, length and position, and are complete or absent."""

import io
import os
import resource
import signal
import subprocess
import sys
import wave
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from demucs_infer.audio.formats import FORMATS, Encoding, format_of, source_depth
from demucs_infer.audio.tags import Cover, portable_tags
from demucs_infer.audio.writer import AudioWriter, save_audio
from demucs_infer.errors import AudioWriteError
from tests.helpers.audio_signals import make_noise
from tests.helpers.oracles import require_tool

ONE_STEM = {name: kind for name, kind in FORMATS.items() if not kind.holds_all_stems}
RATE = 44100
LOSSLESS = [
    (name, bits, channels)
    for name, kind in ONE_STEM.items()
    for bits in kind.depths
    for channels in (1, 2, len(kind.layouts))
]


def random_samples(channels: int, length: int, bits: int = 24, seed: int = 0) -> Tensor:
    """Return noise that needs no rounding at that many bits, with both ends of the scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 << (min(bits, 24) - 1)
    ints = torch.randint(-scale, scale, (channels, length), generator=generator)
    ints[:, 0], ints[:, 1] = -scale, scale - 1
    return ints.float() / scale


def decode_with_ffmpeg(path: Path, channels: int, stream: int = 0) -> Tensor:
    """Decode with Debian's ffmpeg (C T), without changing channels or rate."""
    command = [require_tool("ffmpeg"), "-v", "error", "-i", str(path), "-map", f"0:a:{stream}"]
    raw = subprocess.run([*command, "-f", "f32le", "-"], check=True, capture_output=True).stdout
    return torch.from_numpy(np.frombuffer(raw, "<f4").copy()).view(-1, channels).T


def decode_with_soundfile(path: Path) -> Tensor:
    """Decode with libsndfile (C T)."""
    return torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0]).T


def write(path: Path, wav: Tensor, rate: int = RATE, **options: object) -> Path:
    """Write in blocks of uneven sizes."""
    with AudioWriter(path, rate, len(wav), **options) as out:  # type: ignore[arg-type]
        for start, stop in [(0, 1), (1, 1), (1, 777), (777, wav.shape[-1])]:
            out.write(wav[:, start:stop])
    return path


def measure_lag(decoded: Tensor, original: Tensor) -> int:
    """Return by how many samples `decoded` is late: the peak of the cross-correlation."""
    size = 2 * max(decoded.shape[-1], original.shape[-1])
    spectrum = torch.fft.rfft(decoded[0], size) * torch.fft.rfft(original[0], size).conj()
    peak = int(torch.fft.irfft(spectrum, size).argmax())
    return peak if peak < size // 2 else peak - size


@pytest.mark.parametrize(("name", "bits", "channels"), LOSSLESS)
def test_lossless_formats_return_samples_bit_for_bit(
    name: str, bits: int, channels: int, tmp_path: Path
) -> None:
    wav = random_samples(channels, 9001, bits)
    if bits == 32:
        wav = wav * 3.7  # floats beyond full scale are kept as they are
    path = write(tmp_path / f"x{FORMATS[name].suffixes[0]}", wav, format=name, bits=bits)
    assert torch.equal(decode_with_ffmpeg(path, channels), wav)
    if name != "alac":  # libsndfile reads no MPEG-4
        assert torch.equal(decode_with_soundfile(path), wav)
        subtype = {16: "PCM_16", 24: "PCM_24", 32: "FLOAT"}[bits]
        assert soundfile.info(path).subtype == subtype
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("bits", [16, 24])
def test_integer_files_round_to_nearest_and_saturate(bits: int, tmp_path: Path) -> None:
    step = 2.0 ** (1 - bits)
    original = torch.tensor([[0.4, 0.6, -0.4, -0.6, 2.0**bits, -(2.0**bits)]]) * step
    decoded = decode_with_soundfile(write_at_once(tmp_path / "x.wav", original, bits))
    top = 2 ** (bits - 1)
    assert (decoded / step).tolist() == [[0, 1, 0, -1, top - 1, -top]]


def write_at_once(path: Path, wav: Tensor, bits: int) -> Path:
    with AudioWriter(path, RATE, len(wav), bits=bits) as out:
        out.write(wav)
    return path


@pytest.mark.parametrize(
    ("name", "options", "rate", "channels"),
    [
        ("x.mp3", {}, 44100, 2),
        ("x.mp3", {"bitrate": 128, "preset": 7}, 48000, 1),
        ("x.mp3", {"quality": 2}, 44100, 2),
        ("x.mp3", {}, 22050, 2),
        ("x.ogg", {}, 44100, 2),
        ("x.ogg", {"quality": 3}, 22050, 1),
        ("x.opus", {}, 48000, 2),
        ("x.opus", {}, 48000, 4),
    ],
)
def test_lossy_files_keep_length_and_position_in_two_decoders(
    name: str, options: dict[str, int], rate: int, channels: int, tmp_path: Path
) -> None:
    # Low-pass noise, so that every codec keeps its shape.
    noise = make_noise(channels, 70_001)
    wav = torch.nn.functional.avg_pool1d(noise, 5, stride=1, padding=2) * 2
    path = write(tmp_path / name, wav, rate, **options)
    for original, decoded in [
        (wav, decode_with_ffmpeg(path, channels)),
        (wav, decode_with_soundfile(path)),
    ]:
        assert decoded.shape == original.shape
        assert measure_lag(decoded, original) == 0
        # 10 dB below the signal is a codec's error; a wrong gain or order would be as loud.
        assert (decoded - original).square().mean() < 0.1 * original.square().mean()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        (name, channels)
        for name, kind in ONE_STEM.items()
        if kind.is_lossy
        for channels in range(3, len(kind.layouts) + 1)
    ],
)
def test_lossy_files_keep_the_channel_order(name: str, channels: int, tmp_path: Path) -> None:
    # A low tone, which the LFE channel also carries, with another amplitude in each channel.
    tone = torch.sin(2 * torch.pi * 60 * torch.arange(24_000) / 48_000)
    loudness = 0.1 + 0.1 * torch.arange(channels)
    path = write(
        tmp_path / f"x{FORMATS[name].suffixes[0]}", loudness[:, None] * tone, 48_000, format=name
    )
    decoded = decode_with_ffmpeg(path, channels)[:, 8_000:16_000].square().mean(-1).mul(2).sqrt()
    # Half of the difference between neighbors; libvorbis changes the LFE channel more.
    exact = [c for c in range(channels) if not (name == "ogg" and channels == 6 and c == 3)]
    assert (decoded - loudness)[exact].abs().max() < 0.05


def test_mp3_keeps_length_and_position_in_lame(tmp_path: Path) -> None:
    original = make_noise(2, 50_003)
    path = write(tmp_path / "x.mp3", original)
    decoded = tmp_path / "x.wav"
    subprocess.run([require_tool("lame"), "--quiet", "--decode", path, decoded], check=True)
    with wave.open(str(decoded)) as file:
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    decoded = torch.from_numpy(data.T / 32768).float()
    assert decoded.shape == original.shape
    assert measure_lag(decoded, original) == 0


def test_mp3_has_the_requested_bitrate(tmp_path: Path) -> None:
    wav = make_noise(2, RATE)
    for bitrate in (320, 128):
        path = write(tmp_path / "x.mp3", wav, bitrate=bitrate)
        # One second; tags, delay and the last frame add less than a tenth.
        assert bitrate * 125 <= path.stat().st_size < bitrate * 125 * 1.1
    sizes = [write(tmp_path / "x.mp3", wav, quality=q).stat().st_size for q in (0, 4, 9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[2]


def test_aac_keeps_position_and_declares_its_length(tmp_path: Path) -> None:
    original = make_noise(2, 70_001)
    path = write(tmp_path / "x.m4a", original)
    decoded = decode_with_ffmpeg(path, 2)
    # The last frame of 1024 is decoded whole; the length is in the header.
    assert 0 <= decoded.shape[-1] - original.shape[-1] < 1024
    assert measure_lag(decoded, original) == 0
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        assert stream.duration is not None
        assert stream.duration * stream.time_base == pytest.approx(70_001 / RATE, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "rate", "file_rate"), [("x.opus", 44100, 48000), ("x.mp3", 96000, 48000)]
)
def test_unsupported_sample_rates_are_resampled(
    name: str, rate: int, file_rate: int, tmp_path: Path
) -> None:
    seconds = torch.arange(rate) / rate
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * seconds)[None]
    path = write(tmp_path / name, tone, rate)
    decoded = decode_with_soundfile(path)
    assert soundfile.info(path).samplerate == file_rate
    assert abs(decoded.shape[-1] - file_rate) <= 1  # one second; the kernel may end a sample early
    original = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(file_rate) / file_rate)
    middle = slice(file_rate // 4, file_rate // 2)
    # 30 dB is the codec's noise; a shift of one sample would be 18 dB.
    error = (decoded[0, middle] - original[middle]).square().mean()
    assert error < 1e-3 * original[middle].square().mean()


def test_empty_track_gives_a_file_without_samples(tmp_path: Path) -> None:
    for name, kind in ONE_STEM.items():
        path = tmp_path / f"x{kind.suffixes[0]}"
        with AudioWriter(path, 48000, 2, format=name):
            pass
        if name in ("wav", "flac", "aiff", "caf"):  # the others cannot be opened without a frame
            with av.open(str(path)) as file:
                assert sum(frame.samples for frame in file.decode(audio=0)) == 0


def test_file_object_receives_bytes_only_when_complete(tmp_path: Path) -> None:
    wav = random_samples(2, 5000, 16)
    target = io.BytesIO()
    target.write(b"before")
    with AudioWriter(target, RATE, 2, format="flac") as out:
        out.write(wav)
        assert target.getvalue() == b"before"
    on_disk = write(tmp_path / "x.flac", wav)
    assert torch.equal(
        torch.from_numpy(_decode(target.getvalue()[6:])), decode_with_soundfile(on_disk)
    )


def _decode(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].T


def make_png() -> bytes:
    """Make a PNG of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    pixel = zlib.compress(b"\0\x10\x20\x30")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", pixel), chunk(b"IEND", b"")]
    )


TAGS = {
    "title": "Größe (vocals)",
    "artist": "Ärztin",
    "album": "A/B",
    "date": "1999",
    "genre": "Pop",
    "comment": "日本",
}


@pytest.mark.parametrize("name", list(ONE_STEM))
def test_tags_and_cover_are_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{FORMATS[name].suffixes[0]}"
    write(path, random_samples(2, 3000), format=name, tags={**TAGS, "track": "3"}, cover=make_png())
    with av.open(str(path)) as file:
        tags = {**file.metadata, **file.streams.audio[0].metadata}
        tags = {key.lower(): value for key, value in tags.items()}
        pictures = [bytes(packet) for s in file.streams.video for packet in file.demux(s)]
    for key, value in TAGS.items():
        assert tags[key] == value, key
    assert any(tags.get(key) == "3" for key in ("track", "tracknumber"))
    assert (make_png() in pictures) == FORMATS[name].cover


@pytest.mark.parametrize("name", [name for name, kind in ONE_STEM.items() if kind.cover])
def test_cover_changes_no_sample(name: str, tmp_path: Path) -> None:
    suffix = FORMATS[name].suffixes[0]
    wav = random_samples(2, 30_001, 16)
    plain = write(tmp_path / f"plain{suffix}", wav, format=name)
    covered = write(tmp_path / f"cover{suffix}", wav, format=name, cover=make_png(), tags=TAGS)
    assert torch.equal(decode_with_ffmpeg(plain, 2), decode_with_ffmpeg(covered, 2))


def make_jpeg(width: int, height: int) -> bytes:
    """Make a gray JPEG."""
    context = av.CodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuvj420p"
    context.time_base = Fraction(1, 1)
    frame = av.VideoFrame(width, height, "yuvj420p")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


@pytest.mark.parametrize("name", [name for name, kind in ONE_STEM.items() if kind.cover])
def test_jpeg_cover_is_copied_unchanged(name: str, tmp_path: Path) -> None:
    picture = make_jpeg(48, 32)
    path = tmp_path / f"x{FORMATS[name].suffixes[0]}"
    write(path, random_samples(2, 3000), format=name, cover=picture)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == (48, 32)
        assert bytes(next(file.demux(stream))) == picture
    assert Cover(picture).size == (48, 32)


def test_portable_tags_drops_tags_about_the_source_file() -> None:
    tags = portable_tags(
        {"TITLE": "Song", "artist": "X", "iTunSMPB": "0 1", "REPLAYGAIN_TRACK_GAIN": "-3 dB"},
        title_suffix=" (vocals)",
    )
    assert tags == {"title": "Song (vocals)", "artist": "X"}
    assert portable_tags({"artist": "X"}, title_suffix=" (vocals)") == {"artist": "X"}


def test_invalid_cover_is_ignored(tmp_path: Path) -> None:
    for cover in (b"", b"GIF89a", b"\xff\xd8\xff broken", b"\x89PNG\r\n\x1a\n", b"x" * 99):
        path = write(tmp_path / "x.flac", random_samples(2, 3000, 16), cover=cover)
        assert torch.equal(decode_with_soundfile(path), random_samples(2, 3000, 16))


@contextmanager
def limit_file_size(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", list(ONE_STEM))
@pytest.mark.parametrize("limit", [100, 30_000])
def test_full_disk_leaves_no_file(name: str, limit: int, tmp_path: Path) -> None:
    suffix = FORMATS[name].suffixes[0]
    with (
        limit_file_size(limit),
        pytest.raises(AudioWriteError, match=rf"cannot write .*x{suffix}: "),
        AudioWriter(tmp_path / f"x{suffix}", 48000, 2, format=name) as out,
    ):
        for seed in range(8):
            out.write(random_samples(2, 48_000, seed=seed))
    assert list(tmp_path.iterdir()) == []


def test_full_device_error_advises_to_free_space() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with (
        full.open("wb", buffering=0) as target,
        pytest.raises(AudioWriteError, match="free some space"),
        AudioWriter(target, RATE, 1, format="wav") as out,
    ):
        out.write(random_samples(1, 10))


@contextmanager
def without_root_rights() -> Iterator[None]:
    """Drop the rights of root, who may write everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_unwritable_paths_are_reported_with_advice(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    (tmp_path / "file").touch()
    (tmp_path / "folder.wav").mkdir()
    with (
        without_root_rights(),
        pytest.raises(AudioWriteError, match="Permission denied; choose a writable folder"),
    ):
        AudioWriter(closed / "x.wav", RATE, 1)
    with pytest.raises(AudioWriteError, match="create the folder"):
        AudioWriter(tmp_path / "missing" / "x.wav", RATE, 1)
    if sys.platform == "linux":  # where no folder can be made in /proc
        with pytest.raises(
            AudioWriteError, match=r"No such file.*nothing can be created.*choose another folder"
        ):
            AudioWriter(Path("/proc/x.wav"), RATE, 1)
    with pytest.raises(AudioWriteError, match="Not a directory"):
        AudioWriter(tmp_path / "file" / "x.wav", RATE, 1)
    with pytest.raises(AudioWriteError, match="is a folder"):
        AudioWriter(tmp_path / "folder.wav", RATE, 1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["closed", "file", "folder.wav"]


@pytest.mark.parametrize("name", list(ONE_STEM))
def test_error_keeps_the_previous_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{FORMATS[name].suffixes[0]}"
    path.write_bytes(b"precious")
    with pytest.raises(KeyError), AudioWriter(path, 48000, 2, format=name) as out:
        out.write(random_samples(2, 5000))
        raise KeyError
    out.abort()
    for bad in (float("nan"), float("inf"), -float("inf")):
        with (
            pytest.raises(AudioWriteError, match="not a finite number"),
            AudioWriter(path, 48000, 2, format=name) as out,
        ):
            out.write(random_samples(2, 5000))
            out.write(torch.tensor([[0.0, 0.1], [bad, 0.2]]))
    assert path.read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_killed_writer_leaves_only_a_hidden_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    code = (
        "import sys, torch\n"
        "from demucs_infer.audio.writer import AudioWriter\n"
        "out = AudioWriter(sys.argv[1], 44100, 2)\n"
        "while True:\n    out.write(torch.zeros(2, 44100)); print(flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    assert not path.exists()
    assert len(list(tmp_path.glob(".*.part"))) == 1  # hidden, and without a suffix of audio files


def test_existing_file_is_kept_without_overwrite(tmp_path: Path) -> None:
    path = write(tmp_path / "x.wav", random_samples(1, 1000))
    before = path.read_bytes()
    with pytest.raises(AudioWriteError, match="already exists"):
        AudioWriter(path, RATE, 1, overwrite=False)
    with (
        pytest.raises(AudioWriteError, match="already exists"),
        AudioWriter(tmp_path / "y.wav", RATE, 1, overwrite=False) as out,
    ):
        (tmp_path / "y.wav").write_bytes(b"faster")
    assert out.name.endswith("y.wav")
    assert path.read_bytes() == before
    assert (tmp_path / "y.wav").read_bytes() == b"faster"
    assert len(list(tmp_path.iterdir())) == 2


def test_file_name_may_have_the_maximum_length(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".wav")
    write(path, random_samples(1, 1000))
    assert path.exists()


def test_invalid_arguments_are_reported(tmp_path: Path) -> None:
    with pytest.raises(AudioWriteError, match=r"'x\.xyz': use one of \.wav"):
        AudioWriter(tmp_path / "x.xyz", RATE, 2)
    with pytest.raises(AudioWriteError, match="for mp3: 6, expected 1 to 2"):
        AudioWriter(tmp_path / "x.mp3", RATE, 6)
    with pytest.raises(AudioWriteError, match="0 Hz"):
        AudioWriter(tmp_path / "x.wav", 0, 2)
    for options in ({"bits": 32}, {"bitrate": 320}, {"preset": 13}, {"quality": 1}):
        with pytest.raises(ValueError, match="for flac: "):
            AudioWriter(tmp_path / "x.flac", RATE, 2, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        AudioWriter(tmp_path / "x.mp3", RATE, 2, bitrate=320, quality=2)
    with pytest.raises(ValueError, match="no suffix"):
        AudioWriter(io.BytesIO(), RATE, 2)
    with (
        pytest.raises(ValueError, match="2 channels"),
        AudioWriter(tmp_path / "x.wav", 8000, 2) as out,
    ):
        out.write(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="int16"), AudioWriter(tmp_path / "x.wav", 8000, 2) as out:
        out.write(torch.zeros(2, 5, dtype=torch.int16))
    assert list(tmp_path.iterdir()) == []


def test_source_depth_keeps_the_precision_of_the_source() -> None:
    assert source_depth(16, is_float=False) == 16
    assert source_depth(8, is_float=False) == 16
    assert source_depth(20, is_float=False) == 24
    assert source_depth(32, is_float=False) == 32
    assert source_depth(32, is_float=True) == 32
    assert source_depth(32, is_float=True, format="flac") == 24
    assert source_depth(None, is_float=False) is None
    assert source_depth(24, is_float=False, format="mp3") is None
    assert Encoding("flac", bits=source_depth(None, is_float=False)).depth == 16


def test_every_suffix_has_a_format() -> None:
    for name, kind in FORMATS.items():
        for suffix in kind.suffixes:
            assert format_of(Path(f"x{suffix.upper()}")) == (
                "m4a" if name in ("alac", "stem.mp4") else name
            )


def test_one_stem_is_no_stem_mp4(tmp_path: Path) -> None:
    with pytest.raises(AudioWriteError, match="contains all stems"):
        AudioWriter(tmp_path / "x.mp4", RATE, 2, format="stem.mp4")
    assert list(tmp_path.iterdir()) == []


def test_aiff_beyond_4_gib_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(AudioWriteError, match="too large for aiff: choose wav"),
        AudioWriter(tmp_path / "x.aiff", RATE, 2) as out,
    ):
        out.write(torch.zeros(1, 1).expand(2, 1 << 30))  # 4 GiB of samples in two floats
    assert list(tmp_path.iterdir()) == []


def test_save_audio_accepts_upstreams_arguments(tmp_path: Path) -> None:
    wav = 1.5 * random_samples(2, 20_000)
    before = wav.clone()
    save_audio(wav, tmp_path / "x.wav", RATE)
    # Half a step of 16 bits.
    assert (
        decode_with_soundfile(tmp_path / "x.wav") - wav / (1.01 * 1.5)
    ).abs().max() <= 2**-16 + 1e-7
    save_audio(wav, tmp_path / "x.wav", RATE, clip="none", as_float=True)
    assert torch.equal(decode_with_soundfile(tmp_path / "x.wav"), wav)
    save_audio(wav, tmp_path / "x.flac", RATE, clip="clamp", bits_per_sample=24)
    assert decode_with_soundfile(tmp_path / "x.flac").abs().max() <= 0.99 + 2**-24
    save_audio(wav, str(tmp_path / "x.mp3"), RATE, 128, preset=7)
    assert soundfile.info(tmp_path / "x.mp3").frames == 20_000
    assert torch.equal(wav, before)
    wav[0, 7] = float("nan")
    with pytest.raises(AudioWriteError, match="not a finite number"):
        save_audio(wav, tmp_path / "new.wav", RATE)
    assert not (tmp_path / "new.wav").exists()


@pytest.mark.slow
def test_five_hours_of_floats_are_read_back_complete(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    minute = torch.zeros(2, 60 * RATE)
    with AudioWriter(path, RATE, 2, bits=32) as out:
        for _ in range(300):
            out.write(minute)
    frames = 300 * 60 * RATE
    try:
        assert path.stat().st_size > 6e9
        assert soundfile.info(path).frames == frames
        with av.open(str(path)) as file:
            stream = file.streams.audio[0]
            assert stream.duration is not None
            assert stream.duration * stream.time_base == frames / RATE
    finally:
        path.unlink()
