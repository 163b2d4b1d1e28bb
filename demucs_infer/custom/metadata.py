"""Describe a custom network: its parameters class and its constructor.

No base class is required: a plain dataclass with `chunk_size` and `output_stem_names` is enough.
`Traits` lists the optional attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar, cast, runtime_checkable

from demucs_infer.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

InputType = Literal["waveform", "spectrogram", "waveform_and_spectrogram"]
OutputType = Literal["waveform", "spectrogram", "spectrogram_mask"]
INPUTS = ("waveform", "spectrogram", "waveform_and_spectrogram")
OUTPUTS = ("waveform", "spectrogram", "spectrogram_mask")
ARCHETYPES = ("standard_end_to_end", "frequency_masking")

P = TypeVar("P")


@runtime_checkable
class ModelParamsLike(Protocol):
    """The attributes or properties that every parameters class must have."""

    if TYPE_CHECKING:  # read-only, so that frozen dataclasses and properties match

        @property
        def chunk_size(self) -> int:
            """Samples of one window of the network."""

        @property
        def output_stem_names(self) -> Sequence[str]:
            """Stems that the network returns, in its order."""

    else:  # a dataclass that inherits a property would use it as the default of its field
        chunk_size: int
        output_stem_names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Traits:
    """Interface of a network, from its parameters and the defaults."""

    chunk_size: int
    output_stem_names: tuple[str, ...]
    input_type: InputType = "waveform"
    """Waveform (B, C, W), its spectrum, or both in that order."""
    output_type: OutputType = "waveform"
    """Per stem: waveform, spectrum, or a mask for the spectrum of the mixture."""
    input_channels: int = 2
    sample_rate: int | None = None
    """None: `audio.sample_rate` of the configuration."""

    @classmethod
    def from_params(cls, params: object) -> Traits:
        """Read the traits of any object with the attributes of `ModelParamsLike`.

        Raises `ConfigError` for missing attributes and for types that are not audio.
        """
        required = ("chunk_size", "output_stem_names")
        if missing := [name for name in required if not hasattr(params, name)]:
            raise ConfigError(f"model: {type(params).__name__} has no {' and no '.join(missing)}")
        params = cast(ModelParamsLike, params)
        problems = []
        for name, choices in (
            ("input_type", INPUTS),
            ("output_type", OUTPUTS),
            ("inference_archetype", ARCHETYPES),
        ):
            value = getattr(params, name, choices[0])
            if value not in choices:
                problems.append(
                    f"model.{name}: expected one of {', '.join(choices)}, got {value!r}"
                )
        if problems:
            raise ConfigError("\n".join(problems))
        return cls(
            chunk_size=params.chunk_size,
            output_stem_names=tuple(params.output_stem_names),
            input_type=getattr(params, "input_type", "waveform"),
            output_type=getattr(params, "output_type", "waveform"),
            input_channels=getattr(params, "input_channels", 2),
            sample_rate=getattr(params, "sample_rate", None),
        )

    @property
    def needs_stft(self) -> bool:
        """Whether the input or the output is a spectrum."""
        return (self.input_type, self.output_type) != ("waveform", "waveform")


@dataclass(frozen=True, slots=True)
class ModelMetadata(Generic[P]):
    """A type of network: `metadata.model(params)` creates one, without trained weights."""

    model_type: str
    params: type[P]
    model: Callable[[P], nn.Module]

    @classmethod
    def from_module(
        cls, module_name: str, model_cls_name: str, *, model_type: str, package: str | None = None
    ) -> ModelMetadata[P]:
        """Import the class `model_cls_name` and its parameters class, named `...Params`.

        A `module_name` that begins with a dot is relative to `package`. Raises `ValueError` if the
        module cannot be imported and `AttributeError` if it lacks one of the classes.
        """
        try:
            name = util.resolve_name(module_name, package)
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists; one that it imports does not
            raise ValueError(
                f"no module {name!r}: install its package, or add its folder to PYTHONPATH"
            ) from error
        except ImportError as error:
            raise ValueError(
                f"cannot find module {module_name!r} of package {package!r}: {error}"
            ) from error
        except Exception as error:
            raise ValueError(
                f"cannot import module {name!r}: {type(error).__name__}: {error}"
            ) from error
        if not hasattr(module, model_cls_name):
            raise AttributeError(f"module {name!r} has no class {model_cls_name!r}")
        if not hasattr(module, f"{model_cls_name}Params"):
            raise AttributeError(
                f"module {name!r} has no class '{model_cls_name}Params', the parameters class of "
                f"{model_cls_name!r}"
            )
        params, model = getattr(module, f"{model_cls_name}Params"), getattr(module, model_cls_name)
        return cls(model_type, cast("type[P]", params), cast("Callable[[P], nn.Module]", model))
