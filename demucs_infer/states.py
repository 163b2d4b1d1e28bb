"""From a checkpoint file to a network ready to run: float32, on the CPU, in evaluation mode.

The network is first built without memory, on the meta device; the file must then agree with it,
name by name and shape by shape, before a single weight is read.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from demucs_infer.checkpoints.diffq import decode
from demucs_infer.checkpoints.lazy_tensor import LazyTensor, short_repr
from demucs_infer.checkpoints.reader import Architecture, Package, read_package
from demucs_infer.checkpoints.torchaudio_names import architecture as torchaudio_architecture
from demucs_infer.checkpoints.torchaudio_names import is_torchaudio, to_ours
from demucs_infer.demucs import Demucs
from demucs_infer.errors import CheckpointError, DemucsError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

_Network = TypeVar("_Network", bound=nn.Module)

# The only classes that a file can ask for. Names of this package are the same as upstream's.
_CLASSES: dict[str, type[nn.Module]] = {
    "demucs.Demucs": Demucs,
    "hdemucs.HDemucs": HDemucs,
    "htdemucs.HTDemucs": HTDemucs,
    "wdemucs.WDemucs": HDemucs,  # its name before HDemucs absorbed it
}

_LAYERS = {"depth", "dconv_depth", "dconv_attn", "dconv_lstm", "multi_freqs_depth", "lstm_layers"}
_COUNTS = _LAYERS | {"t_layers", "t_heads", "audio_channels", "growth", "stride", "time_stride"}
_DRAWS = {"normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"}

MAX_COUNT = 256
"""Layers, heads, strides: more than any network has, few enough to build in no time."""

MAX_NUMBER = 10**7
MAX_TEXT = 200
MAX_SOURCES = 64


def load_model(
    path: str | os.PathLike[str],
    *,
    architecture: Architecture | None = None,
    trust: bool = False,
) -> nn.Module:
    """The network in a `.th` or `.safetensors` file, or in a bare state dict.

    `architecture` says what a bare state dict belongs to (torchaudio's are recognised). `trust`
    unpickles the file as Python would, which lets it run code: only for a file of your own.
    """
    path = Path(path)
    package = read_package(path, trust=trust)
    try:
        return _network(package, architecture)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_weights(model: _Network, path: str | os.PathLike[str], *, strict: bool = True) -> _Network:
    """Fill `model` from a file's state, and return it.

    The prefixes that wrappers leave (`model.`, `module.`) are taken off. Names that do not match
    are an error that lists them; with `strict=False`, a warning.
    """
    path = Path(path)
    package = read_package(path)
    try:
        if "__quantized" in package.state:
            _fill_quantized(model, package)
        else:
            _fill(model, _without_prefix(package.state, model), package.size, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model


def _network(package: Package, architecture: Architecture | None) -> nn.Module:
    state, known = package.state, package.architecture or architecture
    if package.architecture is None and "__quantized" not in state and is_torchaudio(state):
        known = architecture or torchaudio_architecture(state)
        state = to_ours(state)
    if known is None:
        raise CheckpointError(
            "it holds weights but does not say of which network; "
            "give load_model its architecture, or fill a network of yours with load_weights"
        )
    model = build(known)
    if "__quantized" in state:
        _fill_quantized(model, package)
    else:
        _fill(model, _without_prefix(state, model), package.size)
    return model.eval()


def build(architecture: Architecture) -> nn.Module:
    """The network itself on the meta device: shapes, and no memory yet."""
    klass = _class(architecture.klass)
    arguments = _arguments(klass, architecture)
    for name, value in arguments.items():
        _check(name, value)
    try:
        with torch.device("meta"), _SkipRandomInit():
            return klass(**arguments).requires_grad_(False)
    except DemucsError:
        raise
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"no {klass.__name__} can be built of its arguments: {short_repr(e, 300)}"
        ) from e


class _SkipRandomInit(TorchFunctionMode):
    """No random numbers for weights that are about to be replaced.

    Not only is there no memory to draw them into: a meta tensor's `normal_` also makes torch import
    its whole compiler, seconds and a hundred megabytes of it.
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


def _class(name: str) -> type[nn.Module]:
    module, _, klass = name.rpartition(".")
    for known, found in _CLASSES.items():
        package, _, rest = known.rpartition(".")
        if klass == rest and module in ("", f"demucs.{package}", f"demucs_infer.{package}"):
            return found
    names = ", ".join(f"demucs.{known}" for known in _CLASSES)
    raise CheckpointError(
        f"its network is {short_repr(name)}; the ones that can be built are {names}"
    )


def _arguments(klass: type[nn.Module], architecture: Architecture) -> dict[str, Any]:
    """All arguments by name; those that the network no longer has are dropped, and said."""
    parameters = inspect.signature(klass).parameters
    if len(architecture.args) > len(parameters):
        raise CheckpointError(f"{klass.__name__} takes fewer than {len(architecture.args)} values")
    arguments = dict(zip(parameters, architecture.args))
    twice = sorted(arguments.keys() & architecture.kwargs.keys())
    if twice:
        raise CheckpointError(f"its arguments are given twice: {short_repr(twice)}")
    unknown = sorted(architecture.kwargs.keys() - parameters.keys())
    if unknown:
        warnings.warn(
            f"{klass.__name__} no longer has these arguments of the checkpoint, which are "
            f"dropped: {', '.join(short_repr(name) for name in unknown)}",
            stacklevel=6,
        )
    kept = {name: value for name, value in architecture.kwargs.items() if name in parameters}
    return arguments | kept


def _check(name: str, value: object) -> None:
    """An argument within reason: nothing that would take long, or much, to build or run."""
    if name == "sources":
        fine = (
            isinstance(value, list | tuple)
            and 1 <= len(value) <= MAX_SOURCES
            and all(isinstance(one, str) and 0 < len(one) <= MAX_TEXT for one in value)
            and len(set(value)) == len(value)
        )
    elif name == "segment":
        fine = isinstance(value, int | float | Fraction) and 0 < value <= 3600
    elif name == "samplerate":
        fine = isinstance(value, int) and 1000 <= value <= 768_000
    else:
        fine = all(_is_reasonable(name, one) for one in _flat(value))
    if not fine:
        raise CheckpointError(
            f"its argument {name} is {short_repr(value)}, which is out of all range"
        )


def _flat(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        value = [*value.items()]
    if not isinstance(value, list | tuple):
        return [value]
    return [one for part in value for one in _flat(part)]


def _is_reasonable(name: str, value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    limit = MAX_COUNT if name in _COUNTS else MAX_NUMBER
    if isinstance(value, int | float | Fraction):
        return -limit <= value <= limit
    return value is None


# ── weights into a network ──


def _without_prefix(state: Mapping[str, LazyTensor], model: nn.Module) -> Mapping[str, LazyTensor]:
    """Names as the network has them, where wrappers put their own in front."""
    wanted = model.state_dict().keys()
    for prefix in ("module.", "model.") * 2:
        bare = {name.removeprefix(prefix): weight for name, weight in state.items()}
        if len(bare) == len(state) and len(wanted & bare.keys()) >= len(wanted & state.keys()):
            state = bare
    return state


def _fill(
    model: nn.Module, state: Mapping[str, LazyTensor], size: int, *, strict: bool = True
) -> None:
    wanted = model.state_dict()
    problems = _differences(wanted, state)
    if problems and strict:
        raise CheckpointError(f"its weights are not those of the network: {'; '.join(problems)}")
    if problems:
        warnings.warn(
            f"weights that do not match are left out: {'; '.join(problems)}", stacklevel=4
        )
    chosen = {
        name: state[name]
        for name, tensor in wanted.items()
        if name in state and state[name].shape == tensor.shape
    }
    if sum(weight.nbytes for weight in chosen.values()) > size:
        raise CheckpointError(f"its tensors use the same bytes again and again: it has only {size}")
    _assign(model, {name: _number(name, weight, wanted[name]) for name, weight in chosen.items()})


def _fill_quantized(model: nn.Module, package: Package) -> None:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    # Each weight takes a bit of the file at the least; a network beyond that is not in it.
    if sum(shape.numel() for shape in shapes.values()) > 8 * package.size:
        raise CheckpointError(f"a file of {package.size} bytes cannot hold the network it names")
    _assign(model, dict(decode(package.state, shapes)))


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the network its weights; one that was built without memory takes them as they are."""
    is_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        model.load_state_dict(model.state_dict() | tensors, assign=is_meta)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"the network's {name} is not in the file")


def _number(name: str, weight: LazyTensor, wanted: Tensor) -> Tensor:
    # What is counted in a network (batches that a norm has seen, say) is no weight.
    if weight.dtype == wanted.dtype and not wanted.is_floating_point():
        return weight.read()
    if not weight.dtype.is_floating_point:
        raise CheckpointError(f"its weight {short_repr(name)} is {weight.dtype}, not a real number")
    return weight.read().float()


def _differences(wanted: Mapping[str, Tensor], state: Mapping[str, LazyTensor]) -> list[str]:
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)} where {tuple(wanted[name].shape)} is needed"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    return [
        f"{len(found)} {kind} ({', '.join(short_repr(name, 200) for name in found[:5])}"
        f"{', …' if len(found) > 5 else ''})"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("differ", shapes))
        if found
    ]
