"""What a checkpoint file says: a network's name and arguments, and weights not yet in memory.

Three layouts are read: upstream's pickled packages (`klass`, `args`, `kwargs`, `state`), its
safetensors files (the same as JSON in the header), and bare state dicts, Lightning's included.
"""

from __future__ import annotations

import json
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demucs_infer.checkpoints.lazy_tensor import LazyTensor, Storage, short_repr
from demucs_infer.checkpoints.torch_file import Placeholder, map_file, read_torch_file
from demucs_infer.errors import CheckpointError, ModelLoadingError

MAX_HEADER_BYTES = 8 * 2**20
"""A safetensors header of fifty thousand tensors; a Demucs file's is a hundredth of it."""

MAX_ARGUMENTS = 4096
"""Values in a network's arguments, nested ones counted; released files have about eighty."""

MAX_NESTING = 16
"""Of lists and tables in arguments; released files have three levels."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network to build: its class by name (`HTDemucs`, `demucs.htdemucs.HTDemucs`), arguments."""

    klass: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Package:
    """A file's content; `architecture` is `None` where it holds weights alone."""

    architecture: Architecture | None
    state: Mapping[str, Any]
    size: int
    """Bytes of the file: no honest state is larger."""


def read_package(path: Path, *, trust: bool = False) -> Package:
    """Read `path` without running anything in it; `trust` unpickles it the dangerous way."""
    try:
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            return _from_safetensors(map_file(path), size)
        content = _unpickle_trusted(path) if trust else read_torch_file(path)
        return _from_pickle(content, size)
    except OSError as error:
        raise ModelLoadingError(f"cannot read {path}: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be used: {error}") from error
    except RecursionError as error:
        problem = "it is nested deeper than any that was written by a training"
        raise CheckpointError(f"{path} is not a checkpoint that can be used: {problem}") from error


def _from_pickle(content: object, size: int) -> Package:
    if isinstance(content, Placeholder):
        raise CheckpointError(f"it is a {short_repr(content.name)}, where a dictionary is expected")
    if not isinstance(content, dict):
        raise CheckpointError(f"it is a {type(content).__name__}, where a dictionary is expected")
    if "klass" in content:
        klass, state = content["klass"], content.get("state")
        if not isinstance(klass, Placeholder) or klass.is_call:
            raise CheckpointError(f"its klass is no class but {_shown(klass)}")
        args, kwargs = content.get("args", ()), content.get("kwargs", {})
        return Package(_architecture(klass.name, args, kwargs), _state(state), size)
    for key in ("state_dict", "state", "model_state_dict"):
        if isinstance(content.get(key), dict):
            return Package(None, _state(content[key]), size)
    return Package(None, _state(content), size)


def _architecture(klass: str, args: object, kwargs: object) -> Architecture:
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise CheckpointError(f"its arguments are {_shown(args)} and {_shown(kwargs)}")
    _check_values([args, kwargs])
    if not all(isinstance(key, str) for key in kwargs):
        raise CheckpointError("its arguments have names that are not text")
    return Architecture(klass, tuple(args), kwargs)


def _state(state: object) -> Mapping[str, Any]:
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"its state is {_shown(state)}, where named weights are expected")
    if "__quantized" in state:
        return state
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise CheckpointError(
                f"its state holds {_shown(value)} as {short_repr(name)}, no tensor"
            )
    return state


def _shown(value: object) -> str:
    if isinstance(value, Placeholder):
        return f"a {'call of ' if value.is_call else ''}{short_repr(value.name)}"
    if isinstance(value, str | int | float | None):
        return short_repr(value)
    return f"a {type(value).__name__}"


def _check_values(values: list[object]) -> None:
    """Arguments are plain values, few of them; anything that a file only named is refused."""
    plain = (str, int, float, bool, Fraction, type(None))
    rest, seen = [(value, 0) for value in values], 0
    while rest:
        value, level = rest.pop()
        seen += 1
        if seen > MAX_ARGUMENTS:
            raise CheckpointError(f"its arguments have more than {MAX_ARGUMENTS} values")
        if level > MAX_NESTING:
            raise CheckpointError(f"its arguments are nested more than {MAX_NESTING} deep")
        if isinstance(value, dict | list | tuple):
            inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            rest += [(part, level + 1) for part in inside[:MAX_ARGUMENTS]]
        elif not isinstance(value, plain):
            raise CheckpointError(f"its arguments hold {_shown(value)}, which is not a plain value")


# ── safetensors: eight bytes of length, a JSON header, the numbers ──

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _from_safetensors(data: memoryview, size: int) -> Package:
    if len(data) < 8:
        raise CheckpointError("it is shorter than any header")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError(f"its header claims {length} bytes of a file of {len(data)}")
    header = _json(bytes(data[8 : 8 + length]))
    if not isinstance(header, dict):
        raise CheckpointError("its header is not a table")
    metadata = header.pop("__metadata__", {})
    weights = _weights(header, data[8 + length :])
    if not isinstance(metadata, dict) or "klass" not in metadata:
        return Package(None, _state(weights), size)
    state: object = weights
    if "structure" in metadata:
        state = _unfold(_json(metadata["structure"]), weights)
    arguments = [_argument(_json(metadata.get(key, empty))) for key, empty in _EMPTY.items()]
    return Package(_architecture(str(metadata["klass"]), *arguments), _state(state), size)


_EMPTY = {"args": "[]", "kwargs": "{}"}


def _json(text: object) -> Any:
    try:
        return json.loads(text) if isinstance(text, str | bytes) else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError("its header is not the JSON that it should be") from error


def _weights(header: dict[str, Any], data: memoryview) -> dict[str, LazyTensor]:
    """The tensors of a header; together they are the rest of the file, without a gap."""
    found = {}
    end = 0
    places = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
                numbers = all(type(part) is int and 0 <= part < 2**48 for part in shape)
            case _:
                raise CheckpointError(f"its tensor {short_repr(name)} is not described as one")
        dtype = _DTYPES.get(kind)
        if dtype is None or not numbers or len(shape) > 8:
            raise CheckpointError(
                f"its tensor {short_repr(name)} is {short_repr(kind)} {short_repr(shape)}"
            )
        numel = math.prod(shape)
        if not 0 <= start <= stop <= len(data) or stop - start != numel * dtype.itemsize:
            raise CheckpointError(f"its tensor {short_repr(name)} lies outside the file")
        places.append((start, stop))
        found[name] = LazyTensor.whole(Storage(dtype, numel, data[start:stop]), shape)
    for start, stop in sorted(places):
        if start != end:
            raise CheckpointError("its tensors overlap, or leave a gap")
        end = stop
    if end != len(data):
        raise CheckpointError("its tensors do not fill the file: it was cut or added to")
    return found


def _argument(value: object) -> object:
    """JSON as upstream writes arguments: a fraction is a table of two numbers."""
    if isinstance(value, list):
        return [_argument(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("_type") == "fraction":
        match value:
            case {"numerator": int(above), "denominator": int(below)} if below:
                return Fraction(above, below)
        raise CheckpointError("its arguments hold a fraction that is not two numbers")
    return {key: _argument(item) for key, item in value.items()}


def _unfold(node: object, weights: Mapping[str, LazyTensor]) -> object:
    """A nested state from its JSON description; a class in it is a name and nothing more."""
    match node:
        case {"_tensor": str(key)} if key in weights:
            return weights[key]
        case {"_dict": [*pairs]} if all(isinstance(p, list) and len(p) == 2 for p in pairs):
            return {str(key): _unfold(item, weights) for key, item in pairs}
        case {"_list": [*items]}:
            return [_unfold(item, weights) for item in items]
        case {"_tuple": [*items]}:
            return tuple(_unfold(item, weights) for item in items)
        case {"_class": str(name)}:
            return Placeholder(name[:200])
        case None | bool() | int() | float() | str():
            return node
    raise CheckpointError("the structure of its state is not one that upstream writes")


# ── the way around all of this, for a file that somebody vouches for ──


def _unpickle_trusted(path: Path) -> object:
    warnings.warn(
        f"{path} is unpickled because it was said to be trusted: it can run any code here",
        stacklevel=5,
    )
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(f"unpickling it failed ({short_repr(error)})") from error
    return _described(content)


def _described(value: object) -> object:
    """Live objects as this module describes what it reads itself."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy().data)
        return LazyTensor.whole(Storage(value.dtype, value.numel(), data), value.shape)
    if isinstance(value, type):
        return Placeholder(f"{value.__module__}.{value.__qualname__}")
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_described(item) for item in value)
    return value
