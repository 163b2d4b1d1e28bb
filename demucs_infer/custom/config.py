"""How a network of one's own is built and run, as one file: `Config.from_file("model.json")`.

Nothing is ignored and nothing is guessed: whatever is wrong with a file is said in one
`ConfigError`, each problem with its place. What `model` holds beyond two names is for the network's
own class of parameters to judge.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nextafter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from demucs_infer.audio.formats import Encoding
from demucs_infer.custom.json_schema import (
    INVALID,
    REST,
    SchemaReader,
    check,
    plain,
    refusal,
    schema,
)
from demucs_infer.engine.stems import MIXTURE, choose_stems
from demucs_infer.errors import ConfigError

if TYPE_CHECKING:
    from demucs_infer.settings import Parameters

MAX_BYTES = 2**20
SCHEMA = "https://json-schema.org/draft/2020-12/schema"

_Params = TypeVar("_Params")


def _number(default: Any, **limits: float) -> Any:
    return field(default=default, metadata=limits)


@dataclass(frozen=True, slots=True)
class LazyModelConfig:
    """What everybody must know of a network; the rest waits for its own class of parameters."""

    chunk_size: int = field(metadata={"minimum": 1})
    """Samples of a window that the network reads."""

    output_stem_names: tuple[str, ...] = field(metadata={"minItems": 1, "uniqueItems": True})
    """What it answers, in its order."""

    rest: Mapping[str, object] = field(default_factory=dict, metadata={REST: True})
    """Everything else, as it stands in the file."""

    def __post_init__(self) -> None:
        check(self)

    def to_concrete(self, params_cls: type[_Params]) -> _Params:
        """The parameters themselves, with nothing unknown, missing or of the wrong type."""
        reader, given = SchemaReader(), cast("dict[str, object]", plain(self))
        names = getattr(params_cls, "__dataclass_fields__", None)
        if names is None:
            raise ConfigError(f"model: {params_cls.__name__} is not a dataclass")
        # A class may work these two out of others; then they are compared and not passed.
        own = ("chunk_size", "output_stem_names")
        worked_out = [name for name in own if name not in names and hasattr(params_cls, name)]
        kept = {name: value for name, value in given.items() if name not in worked_out}
        params = reader.record(params_cls, kept, "model")
        if params is not INVALID:
            for name in worked_out:
                if plain(getattr(params, name)) != given[name]:
                    text = f"{given[name]} is not the {plain(getattr(params, name))} it comes to"
                    reader.complain(f"model.{name}", text)
        if reader.problems:
            raise refusal(f"the parameters of {params_cls.__name__}", reader.problems)
        return cast(_Params, params)


@dataclass(frozen=True, slots=True, kw_only=True)
class StftConfig:
    """The spectra of a network that does not take sound itself, centred on their frames."""

    n_fft: int = _number(2048, minimum=2)
    hop_length: int = _number(512, minimum=1)
    win_length: int | None = _number(None, minimum=1)
    """Samples of the window; None: `n_fft`."""
    window: Literal["hann", "hamming", "ones"] = "hann"
    padding: Literal["reflect", "constant"] = "reflect"
    normalized: bool = False
    """Whether spectra are divided by the root of `n_fft`."""
    spectrum: Literal["parts", "magnitude"] = "parts"
    """What the network reads: (B C F T 2), real and imaginary, or (B C F T)."""
    masking: Literal["complex", "real"] = "complex"
    """Arithmetic that a mask of two parts is applied with; "real" needs no complex numbers."""

    def __post_init__(self) -> None:
        check(self)
        if self.n_fft % 2:
            raise ConfigError(f"n_fft = {self.n_fft} must be even")
        if self.win_length is not None and self.win_length > self.n_fft:
            raise ConfigError(f"win_length = {self.win_length} must be at most {self.n_fft = }")
        if not 2 * self.hop_length < (self.win_length or self.n_fft):
            raise ConfigError(
                f"hop_length = {self.hop_length} must be below half the window of "
                f"{self.win_length or self.n_fft}: otherwise samples between frames are lost"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioConfig:
    """What the network hears."""

    sample_rate: int = _number(44100, minimum=1)
    channels: int | None = _number(None, minimum=1)
    """None: what the parameters say, otherwise 2."""
    normalize: bool = False
    """Bring each track to mean 0 and deviation 1 first, as Demucs networks need it."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceConfig:
    """How the network runs; sizes are in samples, or in seconds under the longer name."""

    chunk_size: int | None = _number(None, minimum=1)
    """Samples of a window; None: the model's."""
    chunk_size_seconds: float | None = _number(None, exclusiveMinimum=0)
    hop_size: int | None = _number(None, minimum=1)
    """Samples between windows, instead of `chunking.overlap`."""
    hop_size_seconds: float | None = _number(None, exclusiveMinimum=0)
    batch_size: int | Literal["auto"] = _number("auto", minimum=1)
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Arithmetic; the weights stay what they are."""
    weights_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the weights themselves; None: as the network makes them."""
    device: str = "auto"
    io_device: str = "cpu"
    """Where tracks and stems are."""
    compile: bool | str = False
    """Whether `torch.compile` takes the network, or with which of its backends."""
    shifts: int = _number(0, minimum=0)
    seed: int | None = 0

    def __post_init__(self) -> None:
        check(self)
        for name in ("chunk_size", "hop_size"):
            if getattr(self, name) is not None and getattr(self, f"{name}_seconds") is not None:
                raise ConfigError(f"{name} and {name}_seconds exclude each other: leave one out")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkingConfig:
    """How a track is cut, and put together again."""

    overlap: float | None = _number(None, minimum=0, exclusiveMaximum=1)
    """Fraction of a window shared with the next; None: as `inference.hop_size`, otherwise 0.5."""
    profile: Literal["padded", "demucs"] = "padded"
    """Grid: padded by an overlap on both sides, or from the first sample as Demucs does."""
    window: Literal["hann", "hamming", "linear_fade", "triangle", "ones"] = "hann"
    padding: Literal["reflect", "constant", "replicate"] = "reflect"
    """What a window reads beyond the track."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """What is handed out, and the files it goes to where none are described otherwise."""

    stems: tuple[str, ...] | None = field(
        default=None, metadata={"minItems": 1, "uniqueItems": True}
    )
    """Of the model, and derived ones come besides; or all, if it names derived ones; None: all."""
    format: str = "wav"
    bits: int | None = None
    bitrate: int | None = None
    clip: Literal["track", "rescale", "clamp", "tanh", "none"] = "track"

    def __post_init__(self) -> None:
        check(self)
        _ = self.encoding

    @property
    def encoding(self) -> Encoding:
        """The same in the words of the encoders."""
        return Encoding(self.format, bits=self.bits, bitrate=self.bitrate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything about a network of one's own but its weights."""

    model_type: str
    """Name under which its `ModelMetadata` is known."""
    model: LazyModelConfig
    identifier: str = ""
    """Which of all networks of that type; for people."""
    stft: StftConfig | None = None
    audio: AudioConfig = field(default_factory=AudioConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    chunking: ChunkingConfig = field(default_factory=ChunkingConfig)
    derived_stems: Mapping[str, str] = field(default_factory=dict)
    """More stems by name, such as `{"drumless": "mixture - drums"}`."""
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check(self)
        if problems := list(_contradictions(vars_of(self))):
            raise refusal("the configuration", problems)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Read a JSON file; `overrides` are as `apply_overrides` takes them."""
        return cls.from_dict(read_json(path), overrides, what=str(path))

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, object],
        overrides: Sequence[str] = (),
        *,
        what: str = "the configuration",
    ) -> Config:
        """Read plain data; `what` is what an error calls it."""
        reader = SchemaReader()
        parts = reader.fields(cls, apply_overrides(data, overrides), "")
        problems = [*reader.problems, *_contradictions(parts)]
        if problems:
            raise refusal(what, problems)
        return cls(**cast("dict[str, Any]", parts))

    @classmethod
    def of(
        cls,
        config: Config | Mapping[str, object] | str | os.PathLike[str],
        overrides: Sequence[str] = (),
    ) -> Config:
        """A configuration from whatever holds one."""
        if isinstance(config, Config):
            return cls.from_dict(config.to_dict(), overrides) if overrides else config
        if isinstance(config, Mapping):
            return cls.from_dict(config, overrides)
        return cls.from_file(config, overrides)

    def to_dict(self) -> dict[str, object]:
        """Plain data that says the same, defaults included."""
        return cast("dict[str, object]", plain(self))

    @classmethod
    def json_schema(cls) -> dict[str, object]:
        """JSON Schema of what `from_dict` takes."""
        return {"$schema": SCHEMA, "title": "demucs-infer model configuration", **schema(cls)}

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
        """The derived stems as lines, in order."""
        return tuple(f"{name}={terms}" for name, terms in self.derived_stems.items())

    @property
    def preferences(self) -> Parameters:
        """What a network of this kind wants however it is run."""
        return {
            "profile": self.chunking.profile,
            "window": self.chunking.window,
            "padding": self.chunking.padding,
            "normalize": self.audio.normalize,
        }

    @property
    def parameters(self) -> Parameters:
        """All that a `Separator` is told."""
        inference = self.inference
        return {
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


def vars_of(config: Config) -> dict[str, object]:
    """The sections by name."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def read_json(path: str | os.PathLike[str]) -> Mapping[str, object]:
    """A file with one JSON table, in which no key stands twice."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: a configuration of more than {MAX_BYTES} bytes is none")
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not a table")
    return data


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands in it twice")
    return dict(pairs)


def apply_overrides(data: Mapping[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """`data` with values put in: `inference.batch_size=2`, read as JSON, or else as text."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides = {overrides!r} must be a list of lines, [{overrides!r}] say")
    result = copy.deepcopy(dict(data))
    for line in overrides:
        path, equals, text = line.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {line!r} must look like 'inference.batch_size=2'")
        at: dict[str, object] = result
        for key in keys[:-1]:
            inside = at.setdefault(key, {})
            if not isinstance(inside, dict):
                raise ConfigError(f"override {line!r}: {key} is {inside!r}, and has no keys")
            at = inside
        at[keys[-1]] = _json_or_text(text.strip())
    return result


def _json_or_text(text: str) -> object:
    try:
        return cast(object, json.loads(text))
    except (ValueError, RecursionError):
        return text


def _sizes(
    inference: InferenceConfig, chunking: ChunkingConfig, model: LazyModelConfig, audio: AudioConfig
) -> tuple[int, int]:
    """(chunk, hop) in samples."""
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
    """The fraction that comes to just this hop when it is truncated again."""
    overlap = 1 - hop / chunk
    while int((1 - overlap) * chunk) < hop:
        overlap = nextafter(overlap, 0)
    return overlap


def _contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between sections, as far as they could be read."""
    needed = ("inference", "chunking", "model", "audio")
    if all(name in parts for name in needed):
        yield from _impossible_chunking(*(parts[name] for name in needed))
    if "model" in parts and "derived_stems" in parts:
        yield from _impossible_stems(parts["model"], parts["derived_stems"], parts.get("output"))


def _impossible_chunking(
    inference: InferenceConfig, chunking: ChunkingConfig, model: LazyModelConfig, audio: AudioConfig
) -> Iterator[str]:
    hop_names = [n for n in ("hop_size", "hop_size_seconds") if getattr(inference, n) is not None]
    if hop_names and chunking.overlap is not None:
        yield f"chunking.overlap: {hop_names[0]} of inference says it too; leave one out"
    chunk, hop = _sizes(inference, chunking, model, audio)
    if chunk < 1:
        yield f"inference.chunk_size_seconds: {inference.chunk_size_seconds} s are no sample"
    elif hop < 1 and hop_names:
        yield f"inference.{hop_names[0]}: {getattr(inference, hop_names[0])} is not one sample"
    elif hop < 1:
        yield f"chunking.overlap: {chunking.overlap} of {chunk} samples leaves none to advance by"
    elif hop > chunk:
        yield f"inference.{hop_names[0]}: a hop of {hop} samples leaves gaps between {chunk}"


def _impossible_stems(
    model: LazyModelConfig, derived: Mapping[str, str], output: OutputConfig | None
) -> Iterator[str]:
    sources = model.output_stem_names
    if MIXTURE in sources or "" in sources:
        yield f"model.output_stem_names: {MIXTURE!r} and '' cannot be stems"
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
