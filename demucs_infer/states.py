"""Load networks from checkpoint files, and save them.

A network is first built on torch's meta device, which uses no memory for weights. Weights are read
only if their names and shapes match it exactly. A loaded network is in evaluation mode, on the CPU
and in float32.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from demucs_infer.checkpoints.diffq import decode
from demucs_infer.checkpoints.lazy_tensor import LazyTensor, short_repr
from demucs_infer.checkpoints.reader import Architecture, Package, read_package
from demucs_infer.checkpoints.torchaudio_names import (
    infer_architecture,
    is_torchaudio_state,
    rename_weights,
)
from demucs_infer.demucs import Demucs
from demucs_infer.errors import CheckpointError, DemucsError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.system.lazy import make_getattr
from demucs_infer.utils import capture_init as capture_init

_Network = TypeVar("_Network", bound=nn.Module)

StateDictTransform: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]

# The only classes that a checkpoint can refer to, under upstream's names.
_CLASSES: dict[str, type[nn.Module]] = {
    "demucs.Demucs": Demucs,
    "hdemucs.HDemucs": HDemucs,
    "htdemucs.HTDemucs": HTDemucs,
    "wdemucs.WDemucs": HDemucs,  # the former name
}

_LAYERS = {"depth", "dconv_depth", "dconv_attn", "dconv_lstm", "multi_freqs_depth", "lstm_layers"}
_COUNTS = _LAYERS | {"t_layers", "t_heads", "audio_channels", "growth", "stride", "time_stride"}
_DRAWS = {"normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"}

_FACTORIES = {"empty", "ones", "zeros", "rand", "randn", "full", "arange"}

MAX_COUNT = 256
"""Limit for the numbers of layers, heads and strides, so that building never takes long."""

MAX_NUMBER = 10**7
MAX_TEXT = 200
MAX_SOURCES = 64


LEFT_OUT = {
    "get_quantizer": "it is only for training; load_model reads quantized checkpoints without it"
}
"""Names of upstream that are not here, and why."""

__getattr__ = make_getattr(__name__, {}, LEFT_OUT)


def load_model(
    path_or_package: str | os.PathLike[str] | Mapping[str, Any],
    strict: bool = False,
    *,
    architecture: Architecture | None = None,
    trust: bool = False,
) -> nn.Module:
    """Load a network from a `.th` or `.safetensors` file, or from a `serialize_model` package.

    Arguments that the network no longer has are ignored with a warning; with `strict`, they are an
    error. A file that contains only weights needs `architecture`, unless torchaudio released it.
    `trust=True` unpickles the file, which can run any code: use it for your own files only.

    Raises `ModelLoadingError` if the file cannot be read, and `CheckpointError` if it is not valid.
    """
    if isinstance(path_or_package, Mapping):
        return _load_package(path_or_package, strict=strict)
    if not isinstance(path_or_package, str | os.PathLike):
        raise ValueError(
            f"expected the path of a checkpoint or a package of serialize_model, "
            f"got {short_repr(path_or_package)}"
        )
    path = Path(path_or_package)
    package = read_package(path, trust=trust)
    try:
        return _load_network(package, architecture, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _load_package(package: Mapping[str, Any], *, strict: bool) -> nn.Module:
    """Load a network from a package in memory, as `serialize_model` returns it."""
    missing = {"klass", "args", "kwargs", "state"} - package.keys()
    if missing:
        raise CheckpointError(f"the package lacks {', '.join(sorted(missing))}")
    klass = package["klass"]
    architecture = Architecture("", args=tuple(package["args"]), kwargs=package["kwargs"])
    model: nn.Module = klass(**_bind_arguments(klass, architecture, strict=strict))
    set_state(model, package["state"])
    return model.requires_grad_(False).eval()


def serialize_model(
    model: nn.Module, training_args: Any, quantizer: Any = None, half: bool = True
) -> dict[str, Any]:
    """Return the class, arguments and weights of a network as a package for `load_model`.

    `training_args` may be a mapping or an OmegaConf configuration. Raises `ValueError` for a
    network whose class does not record its arguments with `capture_init`.
    """
    if not hasattr(model, "_init_args_kwargs"):
        raise ValueError(
            f"the arguments of this {type(model).__name__} are not recorded: "
            "decorate the __init__ of its class with capture_init"
        )
    args, kwargs = cast("tuple[Any, Any]", model._init_args_kwargs)
    if not isinstance(training_args, Mapping):
        from omegaconf import OmegaConf  # installed wherever such arguments come from

        training_args = OmegaConf.to_container(training_args, resolve=True)
    return {
        "klass": type(model),
        "args": args,
        "kwargs": kwargs,
        "state": get_state(model, quantizer, half),
        "training_args": dict(training_args),
    }


def save_with_checksum(content: object, path: Path) -> None:
    """Save `content` as `STEM-CHECKSUM.SUFFIX`, the form that a local repository verifies."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    path.with_name(f"{path.stem}-{checksum}{path.suffix}").write_bytes(buffer.getvalue())


def get_state(model: nn.Module, quantizer: Any = None, half: bool = False) -> dict[str, Any]:
    """Return the weights on the CPU, in half precision if asked for, or as diffq quantizes them."""
    if quantizer is not None:
        return {**quantizer.get_quantized_state(), "__quantized": True}
    dtype = torch.half if half else None
    return {
        name: weight.detach().to(device="cpu", dtype=dtype)
        for name, weight in model.state_dict().items()
    }


def set_state(
    model: nn.Module, state: Mapping[str, Any], quantizer: Any = None
) -> Mapping[str, Any]:
    """Copy the weights of `get_state` into `model`; return them."""
    if not state.get("__quantized"):
        model.load_state_dict(state)
    elif quantizer is not None:
        quantizer.restore_quantized_state(model, state["quantized"])
    else:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        _assign(model, dict(decode(state, shapes)))
    return state


def copy_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the weights on the CPU."""
    return {name: weight.cpu().clone() for name, weight in state.items()}


@contextmanager
def swap_state(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the weights of `model` inside a `with` block."""
    before = copy_state(model.state_dict())
    model.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(before)


def load_weights(
    model: _Network,
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    *,
    strict: bool = True,
    state_dict_transform: StateDictTransform | None = None,
) -> _Network:
    """Copy the weights of a file into `model`, move it to `device`, and return it.

    Prefixes that wrappers add (`model.`, `module.`) are removed, then `state_dict_transform` may
    rename, change or drop weights; None for `device` leaves the model where it is. Weights that do
    not match raise a `CheckpointError` that lists them, or a warning with `strict=False`.
    """
    path = Path(path)
    package = read_package(path)
    try:
        if "__quantized" in package.state:
            if state_dict_transform is not None:
                raise CheckpointError(
                    "the weights are quantized: load them without state_dict_transform"
                )
            _fill_quantized(model, package)
        else:
            state = _strip_prefix(package.state, model)
            if state_dict_transform is None:
                _fill(model, state, package.size, strict=strict)
            else:
                _check_total_size(state.values(), package.size)
                tensors = {name: weight.read() for name, weight in state.items()}
                transformed = state_dict_transform(tensors)
                _fill(model, transformed, None, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model if device is None else model.to(device)


def _load_network(
    package: Package, architecture: Architecture | None, *, strict: bool = False
) -> nn.Module:
    state = package.state
    if package.architecture is not None:
        architecture = package.architecture
    elif "__quantized" not in state and is_torchaudio_state(state):
        architecture = architecture or infer_architecture(state)
        state = rename_weights(state)
    if architecture is None:
        raise CheckpointError(
            "the file contains only weights, and not the class of their network: "
            "pass its architecture to load_model, or use load_weights on an existing network; with "
            "its YAML or JSON file, use Separator.from_pretrained, or --config and --checkpoint"
        )
    model = build(architecture, strict=strict)
    if "__quantized" in state:
        _fill_quantized(model, package)
    else:
        _fill(model, _strip_prefix(state, model), package.size)
    return model.eval()


def build(architecture: Architecture, *, strict: bool = False) -> nn.Module:
    """Build a network on torch's meta device, which uses no memory for weights."""
    klass = _find_class(architecture.klass)
    arguments = _bind_arguments(klass, architecture, strict=strict)
    for name, value in arguments.items():
        _check_argument(name, value)
    try:
        with torch.device("meta"), _SkipRandomInit():
            return klass(**arguments).requires_grad_(False)
    except DemucsError:
        raise
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{klass.__name__} cannot be built from its arguments: {short_repr(e, 300)}"
        ) from e


class _SkipRandomInit(TorchFunctionMode):
    """Skip the random initialization of weights that are about to be replaced.

    `normal_` on a meta tensor would make torch import its compiler, which takes seconds and a
    hundred megabytes.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class AllocationLimit(_SkipRandomInit):
    """Raise `CheckpointError` when building a network creates more than `num_values` numbers.

    The random initialization of the weights is skipped, as they are about to be replaced.
    """

    def __init__(self, num_values: int) -> None:
        super().__init__()
        self._left = num_values

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in _FACTORIES and isinstance(result, Tensor):
            self._left -= result.numel()
            if self._left < 0:
                raise CheckpointError("the file is too small for this network")
        return result


def _find_class(name: str) -> type[nn.Module]:
    module, _, class_name = name.rpartition(".")
    for path, klass in _CLASSES.items():
        submodule, _, supported = path.rpartition(".")
        modules = ("", f"demucs.{submodule}", f"demucs_infer.{submodule}")
        if class_name == supported and module in modules:
            return klass
    names = ", ".join(f"demucs.{path}" for path in _CLASSES)
    raise CheckpointError(f"unsupported network {short_repr(name)}: expected one of {names}")


def _bind_arguments(
    klass: type[nn.Module], architecture: Architecture, *, strict: bool
) -> dict[str, Any]:
    """Return all arguments by name.

    Warns of arguments that the network no longer has, or with `strict` raises `CheckpointError`.
    """
    parameters = inspect.signature(klass).parameters
    if len(architecture.args) > len(parameters):
        raise CheckpointError(
            f"{klass.__name__} takes fewer than {len(architecture.args)} arguments"
        )
    arguments = dict(zip(parameters, architecture.args))
    duplicates = sorted(arguments.keys() & architecture.kwargs.keys())
    if duplicates:
        raise CheckpointError(f"duplicate arguments: {short_repr(duplicates)}")
    unknown = sorted(architecture.kwargs.keys() - parameters.keys())
    if unknown and strict:
        raise CheckpointError(
            f"{klass.__name__} has no arguments {', '.join(map(short_repr, unknown))}: "
            "load it without strict=True to ignore them"
        )
    if unknown:
        warnings.warn(
            f"ignoring arguments of the checkpoint that {klass.__name__} no longer has: "
            f"{', '.join(short_repr(name) for name in unknown)}",
            stacklevel=6,
        )
    supported = {name: value for name, value in architecture.kwargs.items() if name in parameters}
    return arguments | supported


def _check_argument(name: str, value: object) -> None:
    """Raise `CheckpointError` for an argument that would make the network extremely large."""
    if name == "sources":
        is_valid = (
            isinstance(value, list | tuple)
            and 1 <= len(value) <= MAX_SOURCES
            and all(isinstance(stem, str) and 0 < len(stem) <= MAX_TEXT for stem in value)
            and len(set(value)) == len(value)
        )
    elif name == "segment":
        is_valid = isinstance(value, int | float | Fraction) and 0 < value <= 3600
    elif name == "samplerate":
        is_valid = isinstance(value, int) and 1000 <= value <= 768_000
    else:
        is_valid = all(_is_in_range(name, item) for item in _flatten(value))
    if not is_valid:
        raise CheckpointError(f"argument out of range: {name} = {short_repr(value)}")


def _flatten(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        value = [*value.items()]
    if not isinstance(value, list | tuple):
        return [value]
    return [item for part in value for item in _flatten(part)]


def _is_in_range(name: str, value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    limit = MAX_COUNT if name in _COUNTS else MAX_NUMBER
    if isinstance(value, int | float | Fraction):
        return -limit <= value <= limit
    return value is None


# ── weights ──


def _strip_prefix(state: Mapping[str, LazyTensor], model: nn.Module) -> Mapping[str, LazyTensor]:
    """Return the weights under the network's names, without the prefixes that wrappers add."""
    names = model.state_dict().keys()
    for prefix in ("module.", "model.", "net.", "_orig_mod.") * 2:
        bare = {name.removeprefix(prefix): weight for name, weight in state.items()}
        if len(bare) == len(state) and len(names & bare.keys()) >= len(names & state.keys()):
            state = bare
    return state


def _fill(
    model: nn.Module,
    state: Mapping[str, LazyTensor] | Mapping[str, Tensor],
    size: int | None,
    *,
    strict: bool = True,
) -> None:
    targets = model.state_dict()
    problems = _find_differences(targets, state)
    if problems and strict:
        raise CheckpointError(f"its weights do not match the network: {'; '.join(problems)}")
    if problems:
        warnings.warn(f"ignoring weights that do not match: {'; '.join(problems)}", stacklevel=4)
    weights = {
        name: state[name]
        for name, tensor in targets.items()
        if name in state and state[name].shape == tensor.shape
    }
    if size is not None:
        _check_total_size(weights.values(), size)
    _assign(model, {name: _read(name, weight, targets[name]) for name, weight in weights.items()})


def _check_total_size(weights: Iterable[LazyTensor | Tensor], size: int) -> None:
    if sum(weight.nbytes for weight in weights) > size:
        raise CheckpointError(
            f"its tensors overlap: their total size exceeds that of the file ({size} bytes)"
        )


def _fill_quantized(model: nn.Module, package: Package) -> None:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    # Each weight takes at least one bit of the file.
    if sum(shape.numel() for shape in shapes.values()) > 8 * package.size:
        raise CheckpointError(f"a file of {package.size} bytes is too small for its network")
    _assign(model, dict(decode(package.state, shapes)))


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set the weights of a network; one on the meta device adopts them without a copy."""
    is_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        model.load_state_dict(model.state_dict() | tensors, assign=is_meta)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"{name} of the network is not in the file")


def _read(name: str, weight: LazyTensor | Tensor, target: Tensor) -> Tensor:
    # Counters, such as the number of batches in a batch norm, remain integers.
    if weight.dtype == target.dtype and not target.is_floating_point():
        return weight if isinstance(weight, Tensor) else weight.read()
    if not weight.dtype.is_floating_point:
        raise CheckpointError(
            f"weight {short_repr(name)} is {weight.dtype}: expected floating point"
        )
    return (weight if isinstance(weight, Tensor) else weight.read()).float()


def _find_differences(
    targets: Mapping[str, Tensor], state: Mapping[str, LazyTensor] | Mapping[str, Tensor]
) -> list[str]:
    missing = sorted(targets.keys() - state.keys())
    unexpected = sorted(state.keys() - targets.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(targets[name].shape)}"
        for name in sorted(targets.keys() & state.keys())
        if state[name].shape != targets[name].shape
    ]
    return [
        f"{len(names)} {kind} ({', '.join(short_repr(name, 200) for name in names[:5])}"
        f"{', …' if len(names) > 5 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("differ", shapes))
        if names
    ]
