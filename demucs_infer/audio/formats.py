"""Which files can be written, with what inside, and what may be asked of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from demucs_infer.errors import AudioWriteError

_SURROUND = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")
_MPEG4 = ("mono", "stereo", "3.0", "4.0", "5.0", "5.1", "6.1(back)", "7.1")
_ALAC = (*_MPEG4[:7], "7.1(wide)")

RATES = range(100, 768_001)
"""Sample rates that anything records at, from a seismometer to a bat detector."""

_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_AAC_RATES = (7350, *_MP3_RATES, 64000, 88200, 96000)
_RF64: Mapping[str, str] = {"rf64": "auto"}  # a RIFF that grows past 4 GiB becomes RF64
_M4A: Mapping[str, str] = {"brand": "M4A "}  # FFmpeg's own `ipod` takes no pictures here
_4_GIB = 1 << 32


@dataclass(frozen=True, slots=True)
class Codec:
    """What does the encoding: FFmpeg's encoder (or libsndfile's) and the samples it takes."""

    encoder: str
    samples: str
    """`s16`, `s32` or `flt`; a trailing `p` means one plane a channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of file: its names, its encoders, and the limits of what it can hold."""

    name: str
    suffixes: tuple[str, ...]
    container: str
    codecs: Mapping[int, Codec]
    """One encoder for each bit depth, the default first; a lossy format has the one depth 0."""

    layouts: tuple[str, ...] = _SURROUND
    """What one, two, ... channels are called; as many as the format holds."""

    rates: tuple[int, ...] = ()
    """The sample rates that it can hold; none listed: any. Others are resampled on the way."""

    bitrate: int | None = None
    """Default kbit/s; None: the format has no bit rate to choose."""

    bitrate_per_channel: bool = False
    """Whether that default is meant for each channel."""

    bitrates: range = range(0)
    quality: range = range(0)
    """Variable bit rate: mp3 0 (best) to 9, as LAME's -V; ogg 0 to 10 (best), as oggenc's -q."""

    default_quality: int | None = None
    preset: range = range(0)
    """Effort: mp3 2 (best) to 7 (fastest), as LAME's -q; flac 0 (fastest) to 12 (smallest)."""

    default_preset: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    cover: bool = False
    """Whether a picture can be attached."""

    max_bytes: int | None = None
    """Where the sizes in the header end; beyond it the file would lie."""

    @property
    def is_lossy(self) -> bool:
        """Whether decoding gives other samples than were written."""
        return 0 in self.codecs

    @property
    def depths(self) -> tuple[int, ...]:
        """The bit depths to choose from, the default first; none for a lossy format."""
        return () if self.is_lossy else tuple(self.codecs)

    def rate_for(self, sample_rate: int) -> int:
        """The rate a track is written at: its own, the next that the format knows, or the top."""
        if not self.rates or sample_rate in self.rates:
            return sample_rate
        return min((rate for rate in self.rates if rate > sample_rate), default=max(self.rates))


def _pcm(order: str) -> Mapping[int, Codec]:
    return {
        16: Codec(f"pcm_s16{order}", "s16"),
        24: Codec(f"pcm_s24{order}", "s32"),
        32: Codec(f"pcm_f32{order}", "flt"),
    }


_ALL = (
    Format(
        name="wav", suffixes=(".wav", ".wave"), container="wav", codecs=_pcm("le"), options=_RF64
    ),
    Format(
        name="flac",
        suffixes=(".flac",),
        container="flac",
        codecs={16: Codec("flac", "s16"), 24: Codec("flac", "s32")},
        preset=range(13),
        default_preset=5,
        cover=True,
    ),
    Format(
        name="mp3",
        suffixes=(".mp3",),
        container="mp3",
        codecs={0: Codec("libmp3lame", "fltp")},
        layouts=_SURROUND[:2],
        rates=_MP3_RATES,
        bitrate=320,
        bitrates=range(8, 321),
        quality=range(10),
        preset=range(2, 8),
        default_preset=2,
        cover=True,
    ),
    Format(
        name="ogg",
        suffixes=(".ogg", ".oga"),
        container="ogg",
        codecs={0: Codec("libsndfile", "flt")},
        quality=range(11),
        default_quality=8,
    ),
    Format(
        name="opus",
        suffixes=(".opus",),
        container="ogg",
        codecs={0: Codec("libopus", "flt")},
        layouts=_SURROUND[:4],  # FFmpeg mixes up the order of more
        rates=(48000,),
        bitrate=96,
        bitrate_per_channel=True,
        bitrates=range(6, 511),
    ),
    Format(
        name="m4a",
        suffixes=(".m4a", ".mp4"),
        container="mp4",
        codecs={0: Codec("aac", "fltp")},
        layouts=_MPEG4,
        rates=_AAC_RATES,
        bitrate=128,
        bitrate_per_channel=True,
        bitrates=range(16, 1025),
        options=_M4A,
        cover=True,
    ),
    Format(
        name="alac",
        suffixes=(".m4a",),
        container="mp4",
        codecs={16: Codec("alac", "s16p"), 24: Codec("alac", "s32p")},
        layouts=_ALAC,
        options=_M4A,
        cover=True,
    ),
    Format(
        name="aiff",
        suffixes=(".aiff", ".aif"),
        container="aiff",
        codecs={depth: codec for depth, codec in _pcm("be").items() if depth < 32},
        layouts=_SURROUND[:7],  # FFmpeg gives back eight in another order, and PyAV falls over it
        options={"write_id3v2": "1"},  # FFmpeg's own chunks hold a title and a comment only
        max_bytes=_4_GIB,
    ),
    Format(
        name="caf",
        suffixes=(".caf",),
        container="caf",
        codecs=_pcm("be"),
        layouts=_SURROUND[:7],
    ),
)

FORMATS: Mapping[str, Format] = {format_.name: format_ for format_ in _ALL}
"""Every format by the name that `--format` takes."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a track is to be encoded; one that exists can be carried out.

    `None` is the format's default.
    """

    format: str = "wav"
    bits: int | None = None
    """16, 24, or 32 for float; a lossy format has no depth and does not look at it."""

    bitrate: int | None = None
    """Kilobits a second, constant."""

    quality: int | None = None
    """Variable bit rate instead, on the format's own scale."""

    preset: int | None = None
    """Effort of the encoder, on the format's own scale."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format = {self.format!r} must be one of: {', '.join(FORMATS)}")
        kind = self.kind
        if self.bits is not None and not kind.is_lossy and self.bits not in kind.depths:
            depths = " or ".join(map(str, kind.depths))
            raise ValueError(f"bits = {self.bits} does not exist in {kind.name}: use {depths}")
        for name, allowed in (
            ("bitrate", kind.bitrates),
            ("quality", kind.quality),
            ("preset", kind.preset),
        ):
            value = getattr(self, name)
            if value is None or value in allowed:
                continue
            if not allowed:
                raise ValueError(f"{name} = {value}: {kind.name} has no {name} to choose")
            raise ValueError(f"{name} = {value} must be {allowed[0]} to {allowed[-1]}")
        if self.bitrate is not None and self.quality is not None:
            raise ValueError(f"give bitrate = {self.bitrate} or quality = {self.quality}, not both")

    @classmethod
    def for_path(
        cls,
        path: Path,
        *,
        bits: int | None = None,
        bitrate: int | None = None,
        quality: int | None = None,
        preset: int | None = None,
    ) -> "Encoding":
        """The encoding that the suffix of `path` names."""
        name = format_of(path)
        return cls(name, bits=bits, bitrate=bitrate, quality=quality, preset=preset)

    @property
    def kind(self) -> Format:
        """The entry of `FORMATS`."""
        return FORMATS[self.format]

    @property
    def depth(self) -> int:
        """Bits of a written sample: 16, 24, 32 (float), or 0 where the format is lossy."""
        kind = self.kind
        return 0 if kind.is_lossy else self.bits or kind.depths[0]

    @property
    def codec(self) -> Codec:
        """What encodes it."""
        return self.kind.codecs[self.depth]

    @property
    def is_integer(self) -> bool:
        """Whether samples are rounded to a grid and end at full scale."""
        return self.depth in (16, 24)

    @property
    def can_clip(self) -> bool:
        """Whether a sample beyond full scale is lost; only float files hold it."""
        return self.depth != 32

    def bitrate_for(self, channels: int) -> int | None:
        """Bits a second for that many channels; None where the format or the quality decides."""
        kind = self.kind
        if kind.bitrate is None or self.quality is not None:
            return None
        default = kind.bitrate * (channels if kind.bitrate_per_channel else 1)
        return 1000 * (self.bitrate or default)


def format_of(path: Path) -> str:
    """The name of the format that a suffix stands for (`.m4a` is AAC; ask for `alac` by name)."""
    suffix = path.suffix.lower()
    for name, kind in FORMATS.items():
        if suffix in kind.suffixes:
            return name
    known = ", ".join(kind.suffixes[0] for kind in FORMATS.values() if kind.name != "alac")
    raise AudioWriteError(f"{path.name!r} does not name a format by its suffix: use one of {known}")


def source_depth(bits: int | None, *, is_float: bool, format: str = "wav") -> int | None:
    """The depth that keeps what a source has: its `Info.bits` and `.is_float` -> `Encoding.bits`.

    A lossy source has no depth of its own and gets the default; a format that is too shallow
    gives its deepest; a lossy format has none.
    """
    depths = FORMATS[format].depths
    if not depths or bits is None:
        return None
    wanted = 32 if is_float or bits > 24 else bits
    return min((depth for depth in depths if depth >= wanted), default=max(depths))
