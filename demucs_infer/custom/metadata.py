"""What a network of one's own says about itself: its parameters, and how one is made of them.

Nothing has to be inherited. A plain dataclass with `chunk_size` and `output_stem_names` will do,
and it may say more: see `Traits`.
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
    """What any class of parameters has; an attribute or a property, by itself or inherited."""

    @property
    def chunk_size(self) -> int:
        """Samples of a window that the network reads."""

    @property
    def output_stem_names(self) -> Sequence[str]:
        """What it answers, in its order."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What parameters say of a network, with what they leave unsaid."""

    chunk_size: int
    output_stem_names: tuple[str, ...]
    input_type: InputType = "waveform"
    """(B C W) sound, its spectrum, or both in that order."""
    output_type: OutputType = "waveform"
    """Sound per stem, its spectrum, or what to multiply the spectrum of the mix by."""
    input_channels: int = 2
    sample_rate: int | None = None
    """None: whatever the configuration says."""

    @classmethod
    def of(cls, params: object) -> Traits:
        """Those of any object with the names of `ModelParamsLike`."""
        if not isinstance(params, ModelParamsLike):
            own = ("chunk_size", "output_stem_names")
            missing = [name for name in own if not hasattr(params, name)]
            raise ConfigError(f"model: {type(params).__name__} has no {' and no '.join(missing)}")
        problems = []
        for name, known in (
            ("input_type", INPUTS),
            ("output_type", OUTPUTS),
            ("inference_archetype", ARCHETYPES),
        ):
            value = getattr(params, name, known[0])
            if value not in known:
                problems.append(
                    f"model.{name}: {value!r} is not one of {', '.join(known)}, "
                    "and what does not become sound cannot be separated with"
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
        """Whether there are spectra on either side."""
        return (self.input_type, self.output_type) != ("waveform", "waveform")


@dataclass(frozen=True, slots=True)
class ModelMetadata(Generic[P]):
    """A kind of network: `metadata.model(params)` makes one, without weights."""

    model_type: str
    params: type[P]
    model: Callable[[P], nn.Module]

    @classmethod
    def from_module(
        cls, module_name: str, model_cls_name: str, *, model_type: str, package: str | None = None
    ) -> ModelMetadata[P]:
        """Import a module, in which `Net` has its parameters in `NetParams`.

        A `module_name` that begins with a dot is looked for in `package`.
        """
        try:
            name = util.resolve_name(module_name, package)
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and needs something that is not
            raise ValueError(
                f"there is no module {name!r}: install its package, or put its folder on PYTHONPATH"
            ) from error
        except ImportError as error:
            raise ValueError(
                f"module {module_name!r} of package {package!r} cannot be found: {error}"
            ) from error
        except Exception as error:
            raise ValueError(
                f"module {name!r} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not hasattr(module, model_cls_name):
            raise AttributeError(f"module {name!r} has no class {model_cls_name!r}")
        if not hasattr(module, f"{model_cls_name}Params"):
            raise AttributeError(
                f"module {name!r} has no class '{model_cls_name}Params', of which an instance is "
                f"what {model_cls_name!r} is made from"
            )
        params, model = getattr(module, f"{model_cls_name}Params"), getattr(module, model_cls_name)
        return cls(model_type, cast("type[P]", params), cast("Callable[[P], nn.Module]", model))
