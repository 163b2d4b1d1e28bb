"""Audio files made by other encoders: Debian's ffmpeg, lame, opusenc and flac.

Shapes: T samples, C channels. A clip is made when a test first uses it, once in a session.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tests.helpers.oracles import require_tool

ALL_RATES = (44100, 48000, 96000, 22050)
MP3_RATES = (44100, 48000, 22050)


@dataclass(frozen=True)
class Kind:
    """A format, the command that makes it, and its limits."""

    name: str
    suffix: str
    command: str
    """`{src}` and `{out}` are files."""
    bits: int = 0
    """Bits of the source; 0: a lossy format, made from 16."""
    most_channels: int = 6
    rates: tuple[int, ...] = ALL_RATES
    out_rate: int = 0
    """The only sample rate of the format, if there is just one."""
    by_soundfile: bool = False
    """Whether libsndfile, the independent reader, supports it."""
    extra: int = 0
    """Samples that may follow the original, if the file does not declare its length."""
    seconds: float = 0.5
    lag: int = 0
    """Encoder delay in samples that the file does not declare; negative: the beginning is lost."""


_FILM = "-f lavfi -i testsrc=size=64x48:rate=25:duration=0.5"
_FF = "ffmpeg -nostdin -v error -y -i {src} "


def _ff(name: str, suffix: str, arguments: str, bits: int = 0, **rest: object) -> Kind:
    return Kind(name, suffix, f"{_FF}{arguments} {{out}}", bits, **rest)  # type: ignore[arg-type]


LOSSLESS = (
    _ff("wav-u8", "wav", "-c:a pcm_u8", 8, by_soundfile=True),
    _ff("wav-16", "wav", "-c:a pcm_s16le", 16, by_soundfile=True),
    _ff("wav-24", "wav", "-c:a pcm_s24le", 24, by_soundfile=True),
    _ff("wav-32", "wav", "-c:a pcm_s32le", 24, by_soundfile=True),
    _ff("wav-float32", "wav", "-c:a pcm_f32le", 24, by_soundfile=True),
    _ff("wav-float64", "wav", "-c:a pcm_f64le", 24, by_soundfile=True),
    _ff("wav-mulaw", "wav", "-c:a pcm_mulaw", 8, by_soundfile=True),
    _ff("rf64", "wav", "-rf64 always -c:a pcm_s24le", 24, by_soundfile=True),
    _ff("w64", "w64", "-c:a pcm_s32le", 24, by_soundfile=True),
    _ff("flac-ffmpeg", "flac", "-c:a flac", 16, by_soundfile=True),
    Kind("flac", "flac", "flac --silent -f -o {out} {src}", 24, by_soundfile=True),
    _ff("aiff-16", "aiff", "-c:a pcm_s16be", 16, by_soundfile=True),
    _ff("aiff-24", "aiff", "-c:a pcm_s24be", 24, by_soundfile=True),
    _ff("aifc-float", "aifc", "-c:a pcm_f32be -f aiff", 24, by_soundfile=True),
    _ff("caf-16", "caf", "-c:a pcm_s16be", 16, by_soundfile=True),
    _ff("caf-24", "caf", "-c:a pcm_s24le", 24, by_soundfile=True),
    _ff("caf-alac", "caf", "-c:a alac", 16),
    _ff("alac-16", "m4a", "-c:a alac", 16),
    _ff("alac-24", "m4a", "-c:a alac -sample_fmt s32p", 24),
    _ff("caf-float", "caf", "-c:a pcm_f32be", 24, by_soundfile=True),
    _ff("au", "au", "-c:a pcm_s24be", 24, by_soundfile=True),
    _ff("mov-pcm", "mov", "-c:a pcm_s24le", 24),
    _ff("mkv-pcm", "mkv", "-c:a pcm_s16le", 16),
    _ff("mkv-flac", "mkv", "-c:a flac", 16),
)
LOSSY = (
    Kind("mp3-cbr", "mp3", "lame --quiet -b 128 {src} {out}", 0, 2, MP3_RATES),
    Kind("mp3-vbr", "mp3", "lame --quiet -V 2 {src} {out}", 0, 2, MP3_RATES),
    _ff("mp3-ffmpeg", "mp3", "-c:a libmp3lame", most_channels=2, rates=MP3_RATES),
    _ff("ogg", "ogg", "-c:a libvorbis -q:a 6", seconds=1.5),
    Kind("opus", "opus", "opusenc --quiet --bitrate 256 {src} {out}", out_rate=48000),
    _ff("opus-ffmpeg", "opus", "-c:a libopus -b:a 256k", rates=(48000,), out_rate=48000),
    _ff("webm", "webm", "-c:a libopus -b:a 256k", rates=(48000,), out_rate=48000),
    _ff("m4a", "m4a", "-c:a aac -b:a 512k"),
    _ff("m4a-fast", "m4a", "-c:a aac -b:a 512k -movflags faststart"),
    _ff("mp4", "mp4", "-f lavfi -i color=size=32x32:rate=10:duration=1 -c:a aac -b:a 512k"),
    _ff("mp4-film", "mp4", f"{_FILM} -c:a aac -b:a 512k"),
    _ff("webm-film", "webm", f"{_FILM} -c:a libopus -b:a 256k", rates=(48000,), out_rate=48000),
    # Matroska counts milliseconds; Debian's ffmpeg does not declare the delay of AAC in it.
    _ff("mkv-vorbis", "mkv", "-c:a libvorbis -q:a 6", extra=2048),
    _ff("mkv-aac", "mkv", "-c:a aac -b:a 512k", extra=200, lag=1024),
    _ff("mkv-film", "mkv", f"{_FILM} -c:a aac -b:a 512k", extra=200, lag=1024),
    # FFmpeg's decoder drops two frames at the beginning, its encoder adds one, and the file does
    # not declare how many it should be.
    _ff(
        "wma",
        "wma",
        "-c:a wmav2 -b:a 256k",
        most_channels=2,
        rates=(44100, 48000),
        lag=-2048,
        extra=2048,
    ),
    # These do not declare the encoder's delay.
    _ff("aac", "aac", "-c:a aac -b:a 512k", extra=2048, lag=1024),
    _ff("ac3", "ac3", "-c:a ac3 -b:a 448k", rates=(44100, 48000), extra=2048, lag=256),
)
KINDS = {kind.name: kind for kind in LOSSLESS + LOSSY}


def cases(kinds: tuple[Kind, ...]) -> list[tuple[str, int, int]]:
    """Return (name, channels, rate) for the numbers of channels and rates of each format."""
    combinations = []
    for kind in kinds:
        candidates = zip((1, 2, 6, 2), kind.rates * 3 if len(kind.rates) < 4 else kind.rates)
        pairs = {(min(channels, kind.most_channels), rate) for channels, rate in candidates}
        combinations += [(kind.name, *pair) for pair in sorted(pairs)]
    return combinations


@dataclass(frozen=True)
class Clip:
    """A file and its original samples."""

    path: Path
    kind: Kind
    rate: int
    """Sample rate of the original; an Opus file has another."""
    samples: NDArray[np.int32]
    """The original (T C), full scale 2**31."""

    @property
    def floats(self) -> NDArray[np.float32]:
        """The original (C T), full scale 1; exact up to 24 bits."""
        return np.ascontiguousarray((self.samples.T / 2.0**31).astype(np.float32))


def signal(channels: int, rate: int, bits: int, seconds: float = 0.5) -> NDArray[np.int32]:
    """Make noise below 4 kHz (T C), different in each channel, of an uneven length."""
    length = int(seconds * rate) + 23
    rng = np.random.default_rng(channels * 1000 + bits)
    spectrum = np.fft.rfft(rng.standard_normal((length, channels)), axis=0)
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    spectrum[(frequencies > 4000) | (frequencies < 200)] = 0
    if channels == 6:
        spectrum[frequencies > 80, 3] *= 0.5  # the LFE channel is quieter
    wave = np.fft.irfft(spectrum, length, axis=0)
    wave *= 0.4 / np.abs(wave).max()
    whole = np.round(wave * 2 ** (bits - 1)).astype(np.int64)
    return (whole << (32 - bits)).astype(np.int32)


class Corpus:
    """Makes clips by format, channels and rate, and files with any command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._clips: dict[tuple[str, int, int], Clip] = {}

    def clip(self, name: str, channels: int = 2, rate: int = 44100) -> Clip:
        """Return the clip of that format; make it first if needed."""
        key = (name, channels, rate)
        if key not in self._clips:
            kind = KINDS[name]
            require_tool(kind.command.split()[0])
            samples = signal(channels, rate, kind.bits or 16, kind.seconds)
            path = self.folder / f"{name}-{channels}-{rate}.{kind.suffix}"
            source = self.wav(f"src-{name}-{channels}-{rate}", samples, rate, kind.bits or 16)
            self.run(kind.command, source, path)
            source.unlink()
            self._clips[key] = Clip(path, kind, rate, samples)
        return self._clips[key]

    def wav(self, name: str, samples: NDArray[np.int32], rate: int, bits: int = 24) -> Path:
        """Write a plain WAV of those samples (T C)."""
        path = self.folder / f"{name}.wav"
        subtype = {8: "PCM_16", 16: "PCM_16", 24: "PCM_24", 32: "PCM_32"}[bits]
        layout = "WAVEX" if samples.shape[1] > 2 else "WAV"
        soundfile.write(path, samples, rate, subtype=subtype, format=layout)
        return path

    def run(self, command: str, source: Path, out: Path) -> Path:
        """Make `out` from `source` with a command line; return `out`."""
        arguments = [word.format(src=source, out=out) for word in command.split()]
        require_tool(arguments[0])
        subprocess.run(
            arguments, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
        return out


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """Provide the clips of this session."""
    yield Corpus(tmp_path_factory.mktemp("corpus"))
