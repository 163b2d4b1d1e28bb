"""Read the configuration of a custom network: `Config.from_file("model.json")`.

Parsing is strict, and one `ConfigError` reports all problems with their paths. In the section
`model`, keys other than `chunk_size` and `output_stem_names` are validated by the parameters class
of the network.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import nextafter
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from demucs_infer.audio.formats import Encoding
from demucs_infer.custom import msst, splifft
from demucs_infer.custom.json_schema import (
    INVALID,
    REST,
    SchemaReader,
    config_error,
    json_schema,
    to_plain_data,
    validate,
)
from demucs_infer.engine.stems import MIXTURE, choose_stems
from demucs_infer.errors import ConfigError
from demucs_infer.options import (
    OPTIONS,
    PARTS,
    Clip,
    InputOptions,
    OutputOptions,
    Padding,
    Precision,
    Profile,
    Window,
    list_options,
)

MAX_BYTES = 2**20
SCHEMA = "https://json-schema.org/draft/2020-12/schema"

_Params = TypeVar("_Params")


def _number(default: Any, **limits: float) -> Any:
    return field(default=default, metadata=limits)


@dataclass(frozen=True, slots=True)
class LazyModelConfig:
    """The parameters that all networks share; the rest is kept for the network's own class."""

    chunk_size: int = field(metadata={"minimum": 1})
    """Samples of one window of the network."""

    output_stem_names: tuple[str, ...] = field(metadata={"minItems": 1, "uniqueItems": True})
    """Stems that the network returns, in its order."""

    rest: Mapping[str, object] = field(default_factory=dict, metadata={REST: True})
    """All other keys, as in the file."""

    def __post_init__(self) -> None:
        validate(self)

    def to_concrete(self, params_cls: type[_Params]) -> _Params:
        """Return an instance of the dataclass `params_cls`.

        Raises `ConfigError` with all unknown and missing keys and all values of a wrong type.
        """
        reader, data = SchemaReader(), cast("dict[str, object]", to_plain_data(self))
        field_names = getattr(params_cls, "__dataclass_fields__", None)
        if field_names is None:
            raise ConfigError(f"model: {params_cls.__name__} is not a dataclass")
        # A class may compute these two from other fields; then they are only compared.
        common = ("chunk_size", "output_stem_names")
        derived = [n for n in common if n not in field_names and hasattr(params_cls, n)]
        arguments = {name: value for name, value in data.items() if name not in derived}
        params = reader.read_dataclass(params_cls, arguments, "model")
        if params is not INVALID:
            for name in derived:
                value = to_plain_data(getattr(params, name))
                if value != data[name]:
                    text = f"{params_cls.__name__} derives {value}, got {data[name]}"
                    reader.add_problem(f"model.{name}", text)
        if reader.problems:
            raise config_error(f"the parameters of {params_cls.__name__}", reader.problems)
        return cast(_Params, params)


@dataclass(frozen=True, slots=True, kw_only=True)
class StftConfig:
    """Short-time Fourier transform around a network that reads spectra; frames are centered."""

    n_fft: int = _number(2048, minimum=2)
    hop_length: int = _number(512, minimum=1)
    win_length: int | None = _number(None, minimum=1)
    """Window length in samples; None: `n_fft`."""
    window: Literal["hann", "hamming", "ones"] = "hann"
    padding: Literal["reflect", "constant"] = "reflect"
    normalized: bool = False
    """Whether spectra are divided by the square root of `n_fft`."""
    spectrum: Literal["parts", "magnitude"] = "parts"
    """Input of the network: (B, C, F, T, 2), real and imaginary parts, or (B, C, F, T)."""
    masking: Literal["complex", "real"] = "complex"
    """Arithmetic for complex masks; "real" does not use complex dtypes."""

    def __post_init__(self) -> None:
        validate(self)
        if self.n_fft % 2:
            raise ConfigError(f"n_fft must be even, got {self.n_fft}")
        if self.win_length is not None and self.win_length > self.n_fft:
            raise ConfigError(
                f"win_length must be at most n_fft ({self.n_fft}), got {self.win_length}"
            )
        if not 2 * self.hop_length < (self.win_length or self.n_fft):
            raise ConfigError(
                f"hop_length must be below half the window of {self.win_length or self.n_fft} "
                f"samples, got {self.hop_length}: samples between frames would be lost"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioConfig:
    """Audio format of the network."""

    sample_rate: int = _number(44100, minimum=1)
    channels: int | None = _number(None, minimum=1)
    """None: `input_channels` of the parameters, 2 by default."""
    normalize: bool = False
    """Normalize each track to mean 0 and standard deviation 1, as Demucs networks need it."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceConfig:
    """How the network is run; sizes are in samples, or in seconds under the longer name."""

    chunk_size: int | None = _number(None, minimum=1)
    """Samples of a window; None: `model.chunk_size`."""
    chunk_size_seconds: float | None = _number(None, exclusiveMinimum=0)
    hop_size: int | None = _number(None, minimum=1)
    """Samples between windows, instead of `chunking.overlap`."""
    hop_size_seconds: float | None = _number(None, exclusiveMinimum=0)
    batch_size: int | Literal["auto"] = _number("auto", minimum=1)
    precision: Precision = "fp32"
    """Precision of the arithmetic."""
    weights_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Data type of the weights; None: that with which the network creates them."""
    device: str = "auto"
    io_device: str = "cpu"
    """Device of the track and the stems."""
    compile: bool | str = False
    """Whether to use `torch.compile`, or the name of its backend."""
    shifts: int = _number(0, minimum=0)
    seed: int | None = 0
    fs: int | None = _number(None, minimum=1)
    """Repeats `audio.sample_rate`; another value is an error."""

    def __post_init__(self) -> None:
        validate(self)
        for name in ("chunk_size", "hop_size"):
            if getattr(self, name) is not None and getattr(self, f"{name}_seconds") is not None:
                raise ConfigError(f"{name} and {name}_seconds are mutually exclusive: omit one")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkingConfig:
    """How a track is cut into windows and the windows are blended."""

    overlap: float | None = _number(None, minimum=0, exclusiveMaximum=1)
    """Fraction of a window shared with the next; None: from `inference.hop_size`, else 0.5."""
    profile: Profile = "padded"
    """Grid of windows: padded by an overlap on both sides, or from the first sample (Demucs)."""
    window: Window = "hann"
    padding: Padding = "reflect"
    """Samples read beyond the ends of the track."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Which stems are returned, and the default format of files."""

    stems: tuple[str, ...] | None = field(
        default=None, metadata={"minItems": 1, "uniqueItems": True}
    )
    """Stems to return; None: all. Unless a derived stem is among them, all of these are added."""
    format: str = "wav"
    bits: int | None = None
    bitrate: int | None = None
    clip: Clip = "track"

    def __post_init__(self) -> None:
        validate(self)
        _ = self.encoding

    @property
    def encoding(self) -> Encoding:
        """The encoder settings."""
        return Encoding(self.format, bits=self.bits, bitrate=self.bitrate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Configuration of a custom network: everything except its weights."""

    model_type: str
    """Name under which the `ModelMetadata` is registered."""
    model: LazyModelConfig
    identifier: str = ""
    """Display name of this variant of the model type."""
    stft: StftConfig | None = None
    audio: AudioConfig = field(default_factory=AudioConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    chunking: ChunkingConfig = field(default_factory=ChunkingConfig)
    derived_stems: Mapping[str, str] = field(default_factory=dict)
    """Additional stems, such as `{"drumless": "mixture - drums"}`."""
    output: OutputConfig = field(default_factory=OutputConfig)
    options: Mapping[str, object] = field(default_factory=dict)
    """Any other setting by its name, such as `{"transition_power": 2, "exact_sum": false}`."""

    def __post_init__(self) -> None:
        validate(self)
        sections = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if problems := list(_find_conflicts(sections)):
            raise config_error("the configuration", problems)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Read a JSON file, or a YAML file of Music-Source-Separation-Training.

        See `apply_overrides` for `overrides`.
        """
        path = Path(path)
        is_yaml = path.suffix.lower() in (".yaml", ".yml")
        data = msst.read_yaml(path) if is_yaml else read_json(path)
        return cls.from_dict(data, overrides, source=str(path), name=path.stem if is_yaml else "")

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, object],
        overrides: Sequence[str] = (),
        *,
        source: str = "the configuration",
        name: str = "",
    ) -> Config:
        """Read JSON data in the format of this package, splifft or MSST.

        MSST is Music-Source-Separation-Training, whose configurations get `name` as `identifier`.
        Raises `ConfigError` with all problems; its message begins with `source`.
        """
        if msst.is_msst(data) and (problems := msst.find_unknown_overrides(data, overrides)):
            raise config_error(source, problems)
        data, reader = apply_overrides(data, overrides), SchemaReader()
        translation = splifft.translate(data) if splifft.is_splifft(data) else None
        if msst.is_msst(data):
            translation = msst.translate(data, name)
            if translation.problems:
                raise config_error(source, translation.problems)
        sections = reader.read_fields(cls, translation.data if translation else data, "")
        problems = [*reader.problems, *_find_conflicts(sections)]
        if translation:
            problems = [*translation.problems, *map(translation.rename, problems)]
        if problems:
            raise config_error(source, problems)
        return cls(**cast("dict[str, Any]", sections))

    @classmethod
    def load(
        cls,
        config: Config | Mapping[str, object] | str | os.PathLike[str],
        overrides: Sequence[str] = (),
    ) -> Config:
        """Return a configuration from a `Config`, parsed JSON or a file, changed by `overrides`."""
        if isinstance(config, Config):
            return cls.from_dict(config.to_dict(), overrides) if overrides else config
        if isinstance(config, Mapping):
            return cls.from_dict(config, overrides)
        return cls.from_file(config, overrides)

    def to_dict(self) -> dict[str, object]:
        """Return the configuration as JSON data, defaults included."""
        return cast("dict[str, object]", to_plain_data(self))

    @classmethod
    def json_schema(cls) -> dict[str, object]:
        """Return the JSON Schema of what `from_dict` accepts."""
        return {"$schema": SCHEMA, "title": "demucs-infer model configuration", **json_schema(cls)}

    @property
    def chunk_size(self) -> int:
        """Samples of a window."""
        return _sizes(self.inference, self.chunking, self.model, self.audio)[0]

    @property
    def overlap(self) -> float:
        """Fraction of a window shared with the next."""
        chunk, hop = _sizes(self.inference, self.chunking, self.model, self.audio)
        return self.chunking.overlap if self.chunking.overlap is not None else _overlap(chunk, hop)

    @property
    def rules(self) -> tuple[str, ...]:
        """The derived stems as rules (`name=terms`), in order."""
        return tuple(f"{name}={terms}" for name, terms in self.derived_stems.items())

    @property
    def preferences(self) -> dict[str, object]:
        """Options that every separation with this network uses by default."""
        return {
            "profile": self.chunking.profile,
            "window": self.chunking.window,
            "padding": self.chunking.padding,
            "normalize": self.audio.normalize,
        }

    @property
    def settings(self) -> dict[str, object]:
        """All settings of the separation and of the stems, by name."""
        inference = self.inference
        sections = {
            **self.preferences,
            "overlap": self.overlap,
            "shifts": inference.shifts,
            "seed": inference.seed,
            "precision": inference.precision,
            "batch_size": inference.batch_size,
            "device": inference.device,
            "io_device": inference.io_device,
            "compile": inference.compile,
            "stems": self.output.stems,
            "derive": self.rules,
        }
        return {**sections, **self._options_of("separation"), **self._options_of("stems")}

    @property
    def input_options(self) -> InputOptions:
        """How tracks are read."""
        return InputOptions(**cast("dict[str, Any]", self._options_of("input")))

    @property
    def output_options(self) -> OutputOptions:
        """How files are written."""
        output = self.output
        sections = {
            "format": output.format,
            "bits": output.bits,
            "bitrate": output.bitrate,
            "clip": output.clip,
        }
        return OutputOptions(**cast("dict[str, Any]", {**sections, **self._options_of("output")}))

    def _options_of(self, part: str) -> dict[str, object]:
        """Return the settings in `options` that belong to one part of a request."""
        names = {option.name for option in list_options(PARTS[part])}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.options.items()
            if name in names
        }


def read_json(path: str | os.PathLike[str]) -> Mapping[str, object]:
    """Read a file with one JSON object; duplicate keys raise `ConfigError`."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: a configuration may have at most {MAX_BYTES} bytes")
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_reject_duplicates)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(data).__name__}")
    return data


def _reject_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    counts = Counter(key for key, _ in pairs)
    duplicates = sorted(key for key, count in counts.items() if count > 1)
    if duplicates:
        raise ValueError(f"duplicate keys: {', '.join(duplicates)}")
    return dict(pairs)


def apply_overrides(data: Mapping[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """Return a copy of `data` with values such as `inference.batch_size=2` inserted.

    Values are parsed as JSON, or else taken as strings; missing objects are created.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of strings, such as [{overrides!r}]")
    result = copy.deepcopy(dict(data))
    for line in overrides:
        path, equals, text = line.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {line!r} must look like 'inference.batch_size=2'")
        target: dict[str, object] = result
        for key in keys[:-1]:
            child = target.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {line!r}: {key} is {child!r}, not an object")
            target = child
        target[keys[-1]] = _json_or_text(text.strip())
    return result


def _json_or_text(text: str) -> object:
    try:
        return cast(object, json.loads(text))
    except (ValueError, RecursionError):
        return text


def _sizes(
    inference: InferenceConfig, chunking: ChunkingConfig, model: LazyModelConfig, audio: AudioConfig
) -> tuple[int, int]:
    """Return (chunk, hop) in samples."""
    rate, chunk, hop = audio.sample_rate, inference.chunk_size, inference.hop_size
    if inference.chunk_size_seconds is not None:
        chunk = round(inference.chunk_size_seconds * rate)
    if inference.hop_size_seconds is not None:
        hop = round(inference.hop_size_seconds * rate)
    chunk = model.chunk_size if chunk is None else chunk
    if hop is None:
        overlap = 0.5 if chunking.overlap is None else chunking.overlap
        hop = int((1 - overlap) * chunk)
    return chunk, hop


def _overlap(chunk: int, hop: int) -> float:
    """Return an overlap from which the engine computes exactly this hop, despite truncation."""
    overlap = 1 - hop / chunk
    while int((1 - overlap) * chunk) < hop:
        overlap = nextafter(overlap, 0)
    return overlap


def _find_conflicts(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield contradictions between sections; sections that could not be read are omitted."""
    needed = ("inference", "chunking", "model", "audio")
    if all(name in sections for name in needed):
        yield from _find_chunking_problems(*(sections[name] for name in needed))
    if "model" in sections and "derived_stems" in sections:
        yield from _find_stem_problems(
            sections["model"], sections["derived_stems"], sections.get("output")
        )
    yield from _find_option_problems(sections.get("options", {}))


def _find_option_problems(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        option = OPTIONS.get(name)
        if option is None:
            close = get_close_matches(name, OPTIONS, 1)
            yield f"options.{name}: there is no such setting{f'; {close[0]}?' if close else ''}"
        elif not option.is_in("config"):
            yield f"options.{name} cannot be set here: {option.setting.not_in['config']}"
        else:
            try:
                option.check(tuple(value) if isinstance(value, list) else value)
            except ValueError as error:
                yield f"options.{error}"


def _find_chunking_problems(
    inference: InferenceConfig, chunking: ChunkingConfig, model: LazyModelConfig, audio: AudioConfig
) -> Iterator[str]:
    hop_keys = [k for k in ("hop_size", "hop_size_seconds") if getattr(inference, k) is not None]
    if hop_keys and chunking.overlap is not None:
        yield f"chunking.overlap: excludes inference.{hop_keys[0]}: omit one"
    if inference.fs not in (None, audio.sample_rate):
        rate = audio.sample_rate
        yield f"inference.fs: must equal audio.sample_rate ({rate}), got {inference.fs}"
    chunk, hop = _sizes(inference, chunking, model, audio)
    if chunk < 1:
        seconds = inference.chunk_size_seconds
        yield f"inference.chunk_size_seconds: must be at least one sample, got {seconds} s"
    elif hop < 1 and hop_keys:
        value = getattr(inference, hop_keys[0])
        yield f"inference.{hop_keys[0]}: must be at least one sample, got {value}"
    elif hop < 1:
        yield (
            f"chunking.overlap: {chunking.overlap} of {chunk} samples leaves a hop of 0 samples: "
            "choose a smaller overlap"
        )
    elif hop > chunk:
        yield f"inference.{hop_keys[0]}: must be at most the window of {chunk} samples, got {hop}"


def _find_stem_problems(
    model: LazyModelConfig, derived: Mapping[str, str], output: OutputConfig | None
) -> Iterator[str]:
    sources = model.output_stem_names
    if MIXTURE in sources or "" in sources:
        yield f"model.output_stem_names: {MIXTURE!r} and '' are not valid stem names"
        return
    rules = [f"{name}={terms}" for name, terms in derived.items()]
    try:
        choose_stems(sources, derive=rules)
    except ValueError as error:
        yield from (f"derived_stems: {line}" for line in str(error).splitlines())
        return
    try:
        choose_stems(sources, derive=rules, stems=None if output is None else output.stems)
    except ValueError as error:
        yield from (f"output.stems: {line}" for line in str(error).splitlines())
