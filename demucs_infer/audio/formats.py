"""Describe the audio formats that can be written, and validate encoding settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from demucs_infer.errors import AudioWriteError

_SURROUND = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")
_MPEG4 = ("mono", "stereo", "3.0", "4.0", "5.0", "5.1", "6.1(back)", "7.1")
_ALAC = (*_MPEG4[:7], "7.1(wide)")

RATES = range(100, 768_001)
"""Plausible sample rates, from seismometers to bat detectors."""

_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
MPEG_1_BITRATES = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
"""kbit/s of mp3 at 32000 Hz or more, in the order of the standard's table."""

MPEG_2_BITRATES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
"""kbit/s of mp3 at lower sample rates."""

_AAC_RATES = (7350, *_MP3_RATES, 64000, 88200, 96000)
_RF64: Mapping[str, str] = {"rf64": "auto"}  # a RIFF that grows past 4 GiB becomes RF64
_MOV_FLAGS: Mapping[str, str] = {"brand": "M4A "}  # FFmpeg's muxer `ipod` takes no pictures
_4_GIB = 1 << 32

NUM_STEMS = 4
"""Stems in a `.stem.mp4` file, as the format and its players require."""


@dataclass(frozen=True, slots=True)
class Codec:
    """An encoder of FFmpeg or libsndfile, and the sample format that it takes."""

    encoder: str
    samples: str
    """`s16`, `s32` or `flt`; a trailing `p` means one plane per channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A file format: names, encoders, limits and defaults."""

    name: str
    suffixes: tuple[str, ...]
    container: str
    codecs: Mapping[int, Codec]
    """One encoder for each bit depth, the default first; a lossy format has the one depth 0."""

    layouts: tuple[str, ...] = _SURROUND
    """FFmpeg's channel layout for one, two, ... channels, up to the maximum of the format."""

    rates: tuple[int, ...] = ()
    """Supported sample rates; empty: any. Other rates are resampled."""

    bitrate: int | None = None
    """Default kbit/s; None: not supported."""

    bitrate_per_channel: bool = False
    """Whether `bitrate` is for each channel."""

    bitrates: Sequence[int] = range(0)
    """kbit/s that exist for some sample rate and number of channels."""

    bitrates_for: Callable[[int, int], Sequence[int]] | None = None
    """kbit/s that exist for a sample rate and a number of channels; None: `bitrates`."""

    quality: range = range(0)
    """Variable bit rate: mp3 0 (best) to 9, as LAME's -V; ogg 0 to 10 (best), as oggenc's -q."""

    default_quality: int | None = None
    preset: range = range(0)
    """Effort: mp3 2 (best) to 7 (fastest), as LAME's -q; flac 0 (fastest) to 12 (smallest)."""

    default_preset: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    cover: bool = False
    """Whether a picture can be attached."""

    holds_all_stems: bool = False
    """Whether all stems of a track are in one file."""

    max_bytes: int | None = None
    """Largest size that the header can express."""

    @property
    def is_lossy(self) -> bool:
        """Whether encoding changes the samples."""
        return 0 in self.codecs

    @property
    def depths(self) -> tuple[int, ...]:
        """Supported bit depths, the default first; empty for a lossy format."""
        return () if self.is_lossy else tuple(self.codecs)

    def rate_for(self, sample_rate: int) -> int:
        """Return the rate to write at: the same, the next supported one above, or the highest."""
        if not self.rates or sample_rate in self.rates:
            return sample_rate
        return min((rate for rate in self.rates if rate > sample_rate), default=max(self.rates))


def _pcm(order: str) -> Mapping[int, Codec]:
    return {
        16: Codec(f"pcm_s16{order}", "s16"),
        24: Codec(f"pcm_s24{order}", "s32"),
        32: Codec(f"pcm_f32{order}", "flt"),
    }


def _mp3_bitrates(sample_rate: int, channels: int) -> Sequence[int]:  # noqa: ARG001
    if sample_rate >= 32000:
        return MPEG_1_BITRATES
    # LAME writes no more than 64 kbit/s at the rates of MPEG-2.5.
    return MPEG_2_BITRATES if sample_rate >= 16000 else MPEG_2_BITRATES[:8]


def _opus_bitrates(sample_rate: int, channels: int) -> Sequence[int]:  # noqa: ARG001
    return range(6, min(510, 256 * channels) + 1)


def _aac_bitrates(sample_rate: int, channels: int) -> Sequence[int]:
    # FFmpeg's encoder writes no more than 6144 bits in a frame of 1024 samples of a channel.
    return range(16, min(1024, 6 * sample_rate * channels // 1000) + 1)


_M4A = Format(
    name="m4a",
    suffixes=(".m4a", ".mp4"),
    container="mp4",
    codecs={0: Codec("aac", "fltp")},
    layouts=_MPEG4,
    rates=_AAC_RATES,
    bitrate=128,
    bitrate_per_channel=True,
    bitrates=range(16, 1025),
    bitrates_for=_aac_bitrates,
    options=_MOV_FLAGS,
    cover=True,
)

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
        bitrates=sorted({*MPEG_1_BITRATES, *MPEG_2_BITRATES}),
        bitrates_for=_mp3_bitrates,
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
        bitrates_for=_opus_bitrates,
    ),
    _M4A,
    replace(
        _M4A,
        name="stem.mp4",
        suffixes=(".stem.mp4",),
        layouts=_MPEG4[:2],
        holds_all_stems=True,
    ),
    Format(
        name="alac",
        suffixes=(".m4a",),
        container="mp4",
        codecs={16: Codec("alac", "s16p"), 24: Codec("alac", "s32p")},
        layouts=_ALAC,
        options=_MOV_FLAGS,
        cover=True,
    ),
    Format(
        name="aiff",
        suffixes=(".aiff", ".aif"),
        container="aiff",
        codecs={depth: codec for depth, codec in _pcm("be").items() if depth < 32},
        layouts=_SURROUND[:7],  # FFmpeg reads eight in another order, which crashes PyAV
        options={"write_id3v2": "1"},  # AIFF's own chunks have room for title and comment only
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
"""All formats by name."""

SYNONYMS: Mapping[str, str] = {
    **{suffix[1:]: name for name, kind in FORMATS.items() for suffix in kind.suffixes[1:]},
    "aac": "m4a",
    "aifc": "aiff",
    "mp4": "m4a",
    "mpeg": "mp3",
    "mpga": "mp3",
    "vorbis": "ogg",
}
"""What else formats are called, for advice."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encoding settings, validated on construction; `None` is the format's default."""

    format: str = "wav"
    bits: int | None = None
    """16, 24, or 32 for float; ignored by lossy formats."""

    bitrate: int | None = None
    """Constant bit rate in kbit/s."""

    quality: int | None = None
    """Quality of a variable bit rate, on the format's own scale."""

    preset: int | None = None
    """Encoder effort, on the format's own scale."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format = {self.format!r} must be one of: {', '.join(FORMATS)}")
        kind = self.kind
        if self.bits is not None and not kind.is_lossy and self.bits not in kind.depths:
            depths = " or ".join(map(str, kind.depths))
            raise ValueError(f"unsupported bits = {self.bits} for {kind.name}: use {depths}")
        for name, allowed in (
            ("bitrate", kind.bitrates),
            ("quality", kind.quality),
            ("preset", kind.preset),
        ):
            value = getattr(self, name)
            if value is None or value in allowed:
                continue
            if not allowed:
                raise ValueError(
                    f"unsupported {name} = {value} for {kind.name}: omit it, or choose another "
                    "format"
                )
            raise ValueError(
                f"unsupported {name} = {value} for {kind.name}: {_describe(allowed, value)}"
            )
        if self.bitrate is not None and self.quality is not None:
            raise ValueError(f"give bitrate = {self.bitrate} or quality = {self.quality}, not both")

    def check_bitrate(self, sample_rate: int, channels: int) -> None:
        """Check that the bit rate exists at this sample rate of a file with so many channels.

        Encoders silently take another one, or fail after the separation.

        Raises:
            ValueError: It does not exist.
        """
        kind = self.kind
        if self.bitrate is None or kind.bitrates_for is None:
            return
        allowed = kind.bitrates_for(sample_rate, channels)
        if self.bitrate not in allowed:
            raise ValueError(
                f"unsupported bitrate = {self.bitrate} for {kind.name} of {sample_rate} Hz and "
                f"{channels} {'channel' if channels == 1 else 'channels'}: "
                f"{_describe(allowed, self.bitrate)}"
            )

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
        """The encoder of this format and depth."""
        return self.kind.codecs[self.depth]

    @property
    def is_integer(self) -> bool:
        """Whether samples are rounded to integers."""
        return self.depth in (16, 24)

    @property
    def can_clip(self) -> bool:
        """Whether samples beyond full scale are lost; only float files keep them."""
        return self.depth != 32

    def bitrate_for(self, channels: int) -> int | None:
        """Return the bit rate in bit/s for `channels`; None if it is variable or does not apply."""
        kind = self.kind
        if kind.bitrate is None or self.quality is not None:
            return None
        default = kind.bitrate * (channels if kind.bitrate_per_channel else 1)
        return 1000 * (self.bitrate or default)

    def bytes_per_second(self, sample_rate: int, channels: int) -> float:
        """Return the size of a second; without a fixed bit rate, before it is compressed."""
        bits = self.bitrate_for(channels) or sample_rate * channels * (self.depth or 16)
        return bits / 8


def nearest_bitrate(kind: Format, bitrate: int, sample_rate: int, channels: int) -> int:
    """Return the bit rate in kbit/s that an encoder takes for one that does not exist."""
    allowed = kind.bitrates_for(sample_rate, channels) if kind.bitrates_for else kind.bitrates
    return min(allowed, key=lambda entry: abs(entry - bitrate))


def _describe(allowed: Sequence[int], value: int) -> str:
    """Return which values to use instead: the whole range, or the nearest ones if it has gaps."""
    first, last = allowed[0], allowed[-1]
    if len(allowed) == last - first + 1:
        return f"use {first} to {last}"
    below = [entry for entry in allowed if entry < value][-1:]
    above = [entry for entry in allowed if entry > value][:1]
    return f"use {' or '.join(map(str, below + above))}"


def format_of(path: Path) -> str:
    """Return the name of the format for the suffix of `path` (`.m4a` is AAC, not ALAC).

    Raises:
        AudioWriteError: No format has this suffix.
    """
    suffix = path.suffix.lower()
    for name, kind in FORMATS.items():
        if suffix in kind.suffixes:
            return name
    suffixes = ", ".join(kind.suffixes[0] for kind in FORMATS.values() if kind.name != "alac")
    raise AudioWriteError(f"unsupported suffix of {path.name!r}: use one of {suffixes}")


def source_depth(bits: int | None, *, is_float: bool, format: str = "wav") -> int | None:
    """Return the `Encoding.bits` that preserve the precision of a source of `AudioInfo.bits`.

    If no depth of the format suffices, its highest one; None (the default of the format) for a
    lossy source or format.
    """
    depths = FORMATS[format].depths
    if not depths or bits is None:
        return None
    needed = 32 if is_float or bits > 24 else bits
    return min((depth for depth in depths if depth >= needed), default=max(depths))
