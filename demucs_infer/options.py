"""Declare every setting once: its type, default, limits, flag and help.

The command line, the HTTP API, the configuration file, the manifest and the table in the docs are
derived from the fields below. To add a setting, add a field here, use it, and test it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import Field as DataclassField
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

from demucs_infer.audio.filenames import valid_template
from demucs_infer.audio.formats import FORMATS, RATES, SYNONYMS, Encoding

Precision = Literal["fp32", "bf16", "fp16", "auto"]
Profile = Literal["demucs", "padded", "msst"]
Window = Literal["triangle", "hann", "hamming", "linear_fade", "edge_fade", "ones"]
Padding = Literal["constant", "reflect", "replicate"]
OtherMethod = Literal["add", "minus", "none"]
Resampler = Literal["julius", "soxr"]
ExtraChannels = Literal["mix", "first", "pairs", "error"]
Clip = Literal["track", "rescale", "clamp", "tanh", "none"]
Format = Literal["wav", "flac", "mp3", "ogg", "opus", "m4a", "stem.mp4", "alac", "aiff", "caf"]

TRACK_TEMPLATE = "{track}/{stem}.{ext}"
"""The default template of the command line, below the folder of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The properties of a setting besides its type and default."""

    help: str
    no_help: str = ""
    """Help of the `--no-` flag, for settings that are on by default."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    flags: tuple[str, ...] = ()
    """Names on the command line; by default made from the name of the field."""

    shortcuts: Mapping[str, object] = field(default_factory=dict)
    """Flags that set a value: `--flac` for `--format flac`."""

    metavar: str | None = None
    is_time: bool = False
    """Whether the command line also accepts m:ss and h:mm:ss."""

    is_fraction: bool = False
    """Whether the command line also accepts a percentage."""

    is_size: bool = False
    """Whether text may also be a number with KB, MB, GB or KiB, MiB, GiB."""

    excludes: str = ""
    """Name of a group of flags that exclude each other."""

    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Stricter limits of a front end: `{"http": {"le": 1000}}` for untrusted requests."""

    excluded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Choices that a front end does not offer."""

    not_in: Mapping[str, str] = field(default_factory=dict)
    """Front ends ("python", "cli", "http", "config") without this setting, with the reason."""

    changes_stems: bool = True
    """Whether stems depend on the setting, so that it is part of the key of the manifest."""


def setting(default: Any, **details: Any) -> Any:
    """Declare a field of one of the classes below; `details` are those of `Setting`."""
    return field(default=default, metadata={"setting": Setting(**details)})


_OPERATOR = {"http": "the operator of the server decides it"}
_SERVER_NAMES = {"http": "the server names its own files"}


class _Options:
    """Base class of the settings, which validates them."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for option in list_options(type(self)):
            option.check(getattr(self, option.name))


_Class = TypeVar("_Class", bound=_Options)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparationOptions(_Options):
    """Settings for cutting a track into windows and running the networks."""

    device: str = setting(
        "auto",
        flags=("-d", "--device"),
        help="auto, cpu, cuda, cuda:1 or mps; several, such as cuda:0,cuda:1, share the windows",
        not_in=_OPERATOR,
        changes_stems=False,
    )
    io_device: str = setting(
        "cpu",
        help="where tracks and stems are kept",
        not_in={
            **_OPERATOR,
            "cli": "files are written from the CPU",
        },
        changes_stems=False,
    )
    shifts: int = setting(
        1,
        ge=0,
        limits={"http": {"le": 1000}},
        help="average of this many passes at random offsets of up to half a second; 0 is one pass "
        "without an offset",
    )
    overlap: float = setting(
        0.25,
        ge=0,
        lt=1,
        is_fraction=True,
        help="fraction of a segment that is shared with the next one, 0.25 or 25%",
    )
    split: bool = setting(
        True,
        excludes="length",
        help="cut the track into segments",
        no_help="run each track in one piece; takes much memory",
        not_in={
            "http": "a track in one piece can take all memory of the server",
            "config": "`inference.chunk_size` decides it",
        },
    )
    segment: float | None = setting(
        None,
        gt=0,
        limits={"cli": {"ge": 0.1}, "http": {"ge": 0.5, "le": 600}},
        excludes="length",
        help="seconds of a segment (default: the model's own)",
        metavar="SECONDS",
        not_in={"config": "`inference.chunk_size` decides it"},
    )
    transition_power: float = setting(
        1.0, ge=1, help="power of the triangle that weighs a segment; higher blends neighbors less"
    )
    seed: int | None = setting(
        0,
        limits={"http": {"ge": -(2**63), "lt": 2**63}},
        help="seed of the random offsets: the same seed gives the same stems",
    )
    precision: Precision = setting(
        "fp32",
        help="arithmetic of the networks: fp32 is exact, auto is the fastest on this device",
    )
    batch_size: int | Literal["auto"] = setting(
        "auto",
        ge=1,
        help="windows that run together; auto: 1 on a CPU, from the free memory on a GPU",
        not_in=_OPERATOR,
    )
    jobs: int = setting(
        0,
        ge=0,
        flags=("-j", "--jobs"),
        help="windows that run at a time, each with its own memory; they share the threads; 0: one "
        "per core if there is memory for it",
        not_in={**_OPERATOR, "config": "it depends on the machine, not on the network"},
        changes_stems=False,
    )
    max_memory: int | None = setting(
        None,
        gt=0,
        is_size=True,
        metavar="SIZE",
        help="memory of this process, or of the GPU by it, that is not to be exceeded: fewer "
        "windows run together or at a time; bytes, or a size such as 2GB",
        not_in={**_OPERATOR, "config": "it depends on the machine, not on the network"},
        changes_stems=False,
    )
    oom: Literal["retry", "raise"] = setting(
        "retry",
        help="when memory runs out: retry with half of the batch, or fail",
        not_in=_OPERATOR,
        changes_stems=False,
    )
    cpu_fallback: bool = setting(
        True,
        help="continue on the CPU when one window does not fit on the device",
        no_help="fail when one window does not fit on the device",
        not_in=_OPERATOR,
        changes_stems=False,
    )
    compile: bool | str = setting(
        False,
        help="compile the networks with torch.compile, or one of its backends; for a GPU",
        not_in={
            **_OPERATOR,
            "cli": "it takes minutes before the first window, longer than a command runs",
        },
    )
    profile: Profile = setting(
        "demucs",
        help="grid of windows: from the first sample (demucs), padded on both sides (padded), or "
        "that of Music-Source-Separation-Training (msst)",
    )
    window: Window = setting(
        "triangle", help="shape that weighs a segment where it overlaps its neighbors"
    )
    padding: Padding = setting("constant", help="what a window reads beyond the ends of the track")
    normalize: bool = setting(
        True,
        help="bring the track to the level that networks were trained at, and the stems back",
        no_help="run the track at its own level",
    )
    gate: bool = setting(
        False,
        help="silence a stem where it is more than 60 dB below the track for over half a second",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StemOptions(_Options):
    """Settings that choose the stems to return."""

    stems: tuple[str, ...] | None = setting(
        None,
        limits={"http": {"max_length": 32}},
        excludes="stems",
        metavar="A,B",
        help="only these stems, and only the networks that they need",
    )
    two_stems: str | None = setting(
        None,
        excludes="stems",
        metavar="STEM",
        help="only STEM and no_STEM",
    )
    other_method: OtherMethod = setting(
        "add",
        help="no_STEM is the sum of the other stems (add), or minus_STEM, the track minus STEM, "
        "is written instead (minus), or neither (none)",
    )
    derive: tuple[str, ...] = setting(
        (),
        limits={"http": {"max_length": 16}},
        metavar="RULE",
        help="one more stem, such as drumless=mixture-drums or band=bass+other; repeatable",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions(_Options):
    """Settings for reading the input, or a part of it."""

    start: float = setting(
        0.0,
        ge=0,
        limits={"http": {"le": 1e6}},
        metavar="TIME",
        is_time=True,
        help="begin here in the track: seconds, m:ss or h:mm:ss",
    )
    duration: float | None = setting(
        None,
        gt=0,
        limits={"http": {"le": 1e6}},
        metavar="TIME",
        is_time=True,
        help="read no more than this: seconds, m:ss or h:mm:ss",
    )
    strict: bool = setting(False, help="treat a damaged or truncated input as an error")
    resampler: Resampler = setting(
        "julius", help="how another sample rate is converted to the model's; soxr is an extra"
    )
    extra_channels: ExtraChannels = setting(
        "mix",
        help="if the input has more channels than the model: mix surround sound down to stereo, "
        "use the first (upstream's way), a pair (--group), or fail",
    )
    group: int = setting(0, ge=0, help="which pair of channels, with extra_channels = pairs")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions(_Options):
    """Settings for writing the stems to files."""

    format: Format = setting(
        "wav",
        excludes="format",
        shortcuts={"--flac": "flac", "--mp3": "mp3"},
        excluded={"http": ("stem.mp4",)},
        help="format of the files; stem.mp4 is one file for DJ software, with four stems",
    )
    bits: Literal[16, 24, 32, "source"] | None = setting(
        None,
        excludes="bits",
        shortcuts={"--int24": 24, "--float32": 32},
        metavar="16|24|32|source",
        help="bits of a sample, 32 is float; source: as many as the input has",
    )
    bitrate: int | None = setting(
        None,
        ge=1,
        limits={"http": {"le": 2000}},
        flags=("--mp3-bitrate", "--bitrate"),
        help="kbit/s of a lossy format (320 for mp3)",
    )
    quality: int | None = setting(
        None, ge=0, le=10, help="variable bit rate instead: mp3 0 (best) to 9, ogg 0 to 10 (best)"
    )
    preset: int | None = setting(
        None,
        ge=0,
        flags=("--mp3-preset", "--preset"),
        help="effort of the encoder: mp3 2 (best) to 7 (fastest), flac 0 (fastest) to 12",
    )
    rate: int | Literal["model", "source"] = setting(
        "model", ge=RATES[0], le=RATES[-1], metavar="source|HZ", help="sample rate of the stems"
    )
    channels: int | Literal["model", "source"] = setting(
        "model", ge=1, metavar="source|N", help="channels of the stems"
    )
    clip: Clip = setting(
        "track",
        flags=("--clip-mode",),
        help="when a stem would clip: one gain for all stems (track), a gain for each (rescale, "
        "upstream's way), a hard or a soft limit (clamp, tanh), nothing (none)",
    )
    exact_sum: bool = setting(
        True,
        help="round the stems together, so that they still sum to the mix",
        no_help="round each stem by itself",
    )
    tags: bool = setting(
        True,
        help="copy tags and cover art from the input",
        no_help="do not copy tags and cover art",
    )
    template: str = setting(
        "{stem}.{ext}",
        flags=("--filename",),
        help="name of each file, from {track}, {trackext}, {stem} and {ext}",
        not_in={**_SERVER_NAMES, "config": "a network does not decide where files go"},
    )
    overwrite: bool = setting(
        True,
        help="replace files that exist; otherwise they are an error",
        not_in={
            **_SERVER_NAMES,
            "cli": "--force and --skip-existing decide it",
            "config": "a network does not decide where files go",
        },
        changes_stems=False,
    )

    def __post_init__(self) -> None:
        _Options.__post_init__(self)
        valid_template(self.template)
        self.encoding(16)

    def encoding(self, source_bits: int | None = None) -> Encoding:
        """Return how to encode a track whose input has `source_bits` bits per sample."""
        bits = source_bits if self.bits == "source" else self.bits
        return Encoding(
            self.format,
            bits=None if FORMATS[self.format].is_lossy else bits,
            bitrate=self.bitrate,
            quality=self.quality,
            preset=self.preset,
        )

    @property
    def extension(self) -> str:
        """The suffix of the files, without the dot."""
        return FORMATS[self.format].suffixes[0].removeprefix(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All settings for a track."""

    separation: SeparationOptions = field(default_factory=SeparationOptions)
    stems: StemOptions = field(default_factory=StemOptions)
    input: InputOptions = field(default_factory=InputOptions)
    output: OutputOptions = field(default_factory=lambda: OutputOptions(template=TRACK_TEMPLATE))

    def replace(self, values: Mapping[str, object]) -> Request:
        """Return a copy with some settings changed; raise `ValueError` for an unknown name."""
        rest = dict(values)
        parts = {}
        for part in PARTS:
            names = {option.name for option in list_options(PARTS[part])} & rest.keys()
            changes: dict[str, Any] = {name: rest.pop(name) for name in names}
            parts[part] = replace(getattr(self, part), **changes)
        if rest:
            raise ValueError(f"unknown setting {min(rest)!r}; the settings are {', '.join(NAMES)}")
        return replace(self, **parts)

    def stem_settings(self) -> dict[str, Any]:
        """Return the settings that the stems depend on, by name."""
        values = {name: value for part in asdict(self).values() for name, value in part.items()}
        return {name: values[name] for name in NAMES if OPTIONS[name].setting.changes_stems}


def drop_inapplicable(values: Mapping[str, object]) -> dict[str, object]:
    """Remove encoder settings that the format does not support.

    Upstream's command accepts `--mp3-bitrate` for any format, and scripts rely on that.
    """
    kind = FORMATS.get(str(values.get("format", "wav")), FORMATS["wav"])
    limits = {"bitrate": kind.bitrates, "quality": kind.quality, "preset": kind.preset}
    return {name: value for name, value in values.items() if name not in limits or limits[name]}


PARTS: Mapping[str, type[_Options]] = {
    "separation": SeparationOptions,
    "stems": StemOptions,
    "input": InputOptions,
    "output": OutputOptions,
}
"""The classes of settings, by their place in a `Request`."""


@dataclass(frozen=True, slots=True)
class Option:
    """A setting, declared by a field of one of the classes above, as front ends need it."""

    name: str
    hint: Any
    """Type of the setting."""

    default: Any
    setting: Setting

    @property
    def choices(self) -> tuple[object, ...]:
        """The values that a `Literal` in the type allows."""
        return tuple(
            value
            for hint in _alternatives(self.hint)
            if get_origin(hint) is Literal
            for value in get_args(hint)
        )

    @property
    def types(self) -> tuple[type, ...]:
        """The types besides the choices: `int` of `int | Literal["auto"] | None`."""
        return tuple(
            get_origin(hint) or hint
            for hint in _alternatives(self.hint)
            if get_origin(hint) is not Literal and hint is not NoneType
        )

    @property
    def is_optional(self) -> bool:
        """Whether None is a valid value."""
        return NoneType in _alternatives(self.hint)

    @property
    def flags(self) -> tuple[str, ...]:
        """Names on the command line; a switch that is on by default is turned off by `--no-`."""
        if self.setting.flags:
            return self.setting.flags
        prefix = "--no-" if self.default is True else "--"
        return (prefix + self.name.replace("_", "-"),)

    @property
    def long_flag(self) -> str:
        """The flag on the command line that messages mention."""
        return next(flag for flag in self.flags if flag.startswith("--"))

    def is_in(self, front_end: str) -> bool:
        """Return whether a front end ("python", "cli", "http" or "config") has the setting."""
        return front_end not in self.setting.not_in

    def check(self, value: object) -> None:
        """Raise a `ValueError` with the expectation if the value is invalid."""
        if not self._is_valid(value):
            hint = self._suggest(value)
            raise ValueError(f"{self.name} = {value!r} must be {self.expectation}{hint}")

    def _is_valid(self, value: object) -> bool:
        if value is None:
            return self.is_optional
        if any(value == choice and type(value) is type(choice) for choice in self.choices):
            return True
        return any(self._has_type(value, kind) for kind in self.types) and self._is_inside(value)

    @staticmethod
    def _has_type(value: object, kind: type) -> bool:
        if kind is float:  # a Fraction is a number too: checkpoints carry their segment as one
            return not isinstance(value, bool | str) and _is_finite(value)
        if kind is tuple:
            return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

    def _is_inside(self, value: Any) -> bool:
        if isinstance(value, bool | str | tuple):
            return True
        limits = self.setting
        # Written so that NaN fails.
        return (
            (limits.ge is None or value >= limits.ge)
            and (limits.gt is None or value > limits.gt)
            and (limits.le is None or value <= limits.le)
            and (limits.lt is None or value < limits.lt)
        )

    def limited_to(self, front_end: str) -> Option:
        """Return a copy with the stricter limits of a front end."""
        limits: dict[str, Any] = dict(self.setting.limits.get(front_end, {}))
        limits.pop("max_length", None)
        return replace(self, setting=replace(self.setting, **limits))

    def parse(self, text: str) -> object:
        """Parse text from the command line; raise a `ValueError` with the expectation."""
        for choice in self.choices:
            if text == str(choice):
                return choice
        for kind in self.types:
            if kind is tuple:
                return tuple(name.strip() for name in text.split(",") if name.strip())
            try:
                value = self._convert(text, kind)
            except ValueError:
                continue
            if self._is_valid(value):
                return value
        time = ", or a time as m:ss or h:mm:ss" if self.setting.is_time else ""
        if self.setting.is_time and re.search(r":[6-9]\d(?:\.\d+)?$", text):
            time += ", with ss below 60"
        percentage = ", or a percentage" if self.setting.is_fraction else ""
        size = ", or a size such as 2GB" if self.setting.is_size else ""
        hint = self._suggest(text)
        raise ValueError(f"{text!r} must be {self.expectation}{time}{percentage}{size}{hint}")

    def _suggest(self, value: object) -> str:
        """Return advice for a value that is similar to a choice, or an empty string."""
        choices = [choice for choice in self.choices if isinstance(choice, str)]
        if not choices or not isinstance(value, str):
            return ""
        word = value.lower().removeprefix(".")
        similar = difflib.get_close_matches(SYNONYMS.get(word, word), choices, 1)
        return f"; did you mean {similar[0]}?" if similar else ""

    def _convert(self, text: str, kind: Callable[[Any], object]) -> object:
        if self.setting.is_fraction and text.endswith("%"):
            return float(text[:-1]) / 100
        if self.setting.is_time and ":" in text:
            return _parse_time(text)
        if self.setting.is_size and not text.isdecimal():
            return _parse_size(text)
        return kind(text)

    @property
    def expectation(self) -> str:
        """The valid values, for messages: "an integer, 0 or more"."""
        words = [repr(choice) if self.types else str(choice) for choice in self.choices]
        words += [self._describe(kind) for kind in self.types]
        if not self.types:
            return f"one of {', '.join(words)}"
        return " or ".join(words)

    def _describe(self, kind: type) -> str:
        limits = self.setting
        if kind is int or kind is float:
            noun = "an integer" if kind is int else "a number"
            if limits.ge is not None and limits.lt is not None:
                return f"{noun} in [{limits.ge:g}, {limits.lt:g})"
            if limits.ge is not None and limits.le is not None:
                return f"{noun}, {limits.ge:g} to {limits.le:g}"
            if limits.ge is not None:
                return f"{noun}, {limits.ge:g} or more"
            return f"{noun} above {limits.gt:g}" if limits.gt is not None else noun
        return {bool: "True or False", str: "a string", tuple: "a tuple of strings"}[kind]


def _parse_time(text: str) -> float:
    """Return the seconds of m:ss or h:mm:ss; only the last part may have a fraction."""
    match = re.fullmatch(r"(?:(\d+):(?=\d\d:))?(\d+):([0-5]\d(?:\.\d+)?)", text)
    if match is None or (match[1] and int(match[2]) > 59):
        raise ValueError(f"{text!r} must be like 1:30 or 1:02:03")
    return 3600 * int(match[1] or 0) + 60 * int(match[2]) + float(match[3])


def _parse_size(text: str) -> int:
    """Return the bytes of a size: 500MB is 500 000 000, and 1GiB 2**30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt])(i?)b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} must be like 500MB, 2GB or 1.5GiB")
    exponent = 1 + "kmgt".index(match[2].lower())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def _is_finite(value: Any) -> bool:
    try:
        return isfinite(value)
    except TypeError:
        return False


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Take a union apart: `int | None` -> `(int, NoneType)`."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


_BY_CLASS: dict[type[_Options], tuple[Option, ...]] = {}


def list_options(part: type[_Options]) -> tuple[Option, ...]:
    """Return the settings of one class, in order."""
    if part not in _BY_CLASS:
        hints = get_type_hints(part)
        declared: tuple[DataclassField[Any], ...] = fields(part)  # type: ignore[arg-type]  # it is
        _BY_CLASS[part] = tuple(
            Option(entry.name, hints[entry.name], entry.default, entry.metadata["setting"])
            for entry in declared
        )
    return _BY_CLASS[part]


OPTIONS: Mapping[str, Option] = {
    option.name: option for part in PARTS.values() for option in list_options(part)
}
"""Every setting by its name; names are unique across the parts."""

NAMES = tuple(OPTIONS)


class InputChanges(TypedDict, total=False):
    """The fields of `InputOptions` as keyword arguments; a test checks that none is missing."""

    start: float
    duration: float | None
    strict: bool
    resampler: Resampler
    extra_channels: ExtraChannels
    group: int


class OutputChanges(TypedDict, total=False):
    """The fields of `OutputOptions` except `format` as keyword arguments.

    A test checks that none is missing.
    """

    bits: Literal[16, 24, 32, "source"] | None
    bitrate: int | None
    quality: int | None
    preset: int | None
    rate: int | Literal["model", "source"]
    channels: int | Literal["model", "source"]
    clip: Clip
    exact_sum: bool
    tags: bool
    template: str
    overwrite: bool


def change_output(
    options: OutputOptions, format: Format | None, changes: OutputChanges
) -> OutputOptions:
    """Return the options with changes; a new format starts with its own defaults."""
    if format is not None and format != options.format:
        options = replace(
            options, format=format, bits=None, bitrate=None, quality=None, preset=None
        )
    return replace(options, **changes)
