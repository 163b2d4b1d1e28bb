"""Read the class and arguments of a network from a checkpoint file, and its weights lazily.

Three layouts are supported: upstream's pickled packages (`klass`, `args`, `kwargs`, `state`),
upstream's safetensors files (the same fields as JSON in the header), and files of weights alone,
including those of Lightning.

`safetensors.safe_open` is not used. It would be one more compiled dependency, and it accepts
headers of 100 MB (one of 80 MB took 16 s and 1.1 GB); the limit here is 8 MiB. Weights of all
layouts become `LazyTensor`s, which stay in the file until they are read.
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
from demucs_infer.errors import CheckpointError, CheckpointNotFound, ModelLoadingError

MAX_HEADER_BYTES = 8 * 2**20
"""Limit for a safetensors header: enough for 50,000 tensors; Demucs has about 600."""

MAX_ARGUMENTS = 4096
"""Limit for the values in a network's arguments, including nested ones; Demucs has about 80."""

MAX_NESTING = 16
"""Limit for the levels of lists and tables in arguments; Demucs has three."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The class name (`HTDemucs`, `demucs.htdemucs.HTDemucs`) and arguments of a network."""

    klass: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Package:
    """The content of a checkpoint; `architecture` is `None` if the file has only weights."""

    architecture: Architecture | None
    state: Mapping[str, Any]
    size: int
    """Size of the file in bytes, an upper limit for the size of the weights."""


def read_package(path: Path, *, trust: bool = False) -> Package:
    """Read a checkpoint without running code from it, unless `trust` is set.

    With `trust`, Python unpickles the file, which can run any code.

    Raises `ModelLoadingError` if it cannot be opened, `CheckpointError` if it is not valid.
    """
    try:
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            return _from_safetensors(map_file(path), size)
        content = _unpickle_trusted(path) if trust else read_torch_file(path)
        return _from_pickle(content, size)
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"cannot read {path}: {error.strerror}") from error
    except OSError as error:
        raise ModelLoadingError(f"cannot read {path}: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a valid checkpoint: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is not a valid checkpoint: nested too deeply") from error


def _from_pickle(content: object, size: int) -> Package:
    if isinstance(content, Placeholder):
        raise CheckpointError(f"expected a dictionary, got {short_repr(content.name)}")
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a dictionary, got {type(content).__name__}")
    if "klass" in content:
        klass, state = content["klass"], content.get("state")
        if not isinstance(klass, Placeholder) or klass.is_call:
            raise CheckpointError(f"its klass must be a class, got {_describe(klass)}")
        args, kwargs = content.get("args", ()), content.get("kwargs", {})
        return Package(_parse_architecture(klass.name, args, kwargs), _check_state(state), size)
    for key in ("state_dict", "state", "model_state_dict", "model"):
        if isinstance(content.get(key), dict):
            return Package(None, _check_state(content[key]), size)
    return Package(None, _check_state(content), size)


def _parse_architecture(klass: str, args: object, kwargs: object) -> Architecture:
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise CheckpointError(
            f"its args must be a list and its kwargs a dictionary, got {_describe(args)} and "
            f"{_describe(kwargs)}"
        )
    _check_values([args, kwargs])
    if not all(isinstance(key, str) for key in kwargs):
        raise CheckpointError("the names in its kwargs must be text")
    return Architecture(klass, tuple(args), kwargs)


def _check_state(state: object) -> Mapping[str, Any]:
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f"its state must be a dictionary of weights by name, got {_describe(state)}"
        )
    if "__quantized" in state:
        return state
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise CheckpointError(
                f"{short_repr(name)} in its state must be a tensor, got {_describe(value)}"
            )
    return state


def _describe(value: object) -> str:
    if isinstance(value, Placeholder):
        return f"a {'call of ' if value.is_call else ''}{short_repr(value.name)}"
    if isinstance(value, str | int | float | None):
        return short_repr(value)
    return f"a {type(value).__name__}"


def _check_values(values: list[object]) -> None:
    """Raise `CheckpointError` if arguments are not plain, too many or too deeply nested."""
    plain = (str, int, float, bool, Fraction, type(None))
    pending, count = [(value, 0) for value in values], 0
    while pending:
        value, level = pending.pop()
        count += 1
        if count > MAX_ARGUMENTS:
            raise CheckpointError(f"its arguments have more than {MAX_ARGUMENTS} values")
        if level > MAX_NESTING:
            raise CheckpointError(f"its arguments are nested more than {MAX_NESTING} deep")
        if isinstance(value, dict | list | tuple):
            items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            pending += [(item, level + 1) for item in items[:MAX_ARGUMENTS]]
        elif not isinstance(value, plain):
            raise CheckpointError(f"its arguments contain {_describe(value)}, not a plain value")


# ── safetensors files: the header's length (eight bytes), the header (JSON), the weights ──

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
        raise CheckpointError("truncated file: it has no header")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError(f"invalid header length: {length} bytes in a file of {len(data)}")
    header = _parse_json(bytes(data[8 : 8 + length]))
    if not isinstance(header, dict):
        raise CheckpointError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    weights = _parse_header(header, data[8 + length :])
    if not isinstance(metadata, dict) or "klass" not in metadata:
        return Package(None, _check_state(weights), size)
    state: object = weights
    if "structure" in metadata:
        state = _unflatten(_parse_json(metadata["structure"]), weights)
    args, kwargs = (
        _decode_argument(_parse_json(metadata.get(key, default)))
        for key, default in (("args", "[]"), ("kwargs", "{}"))
    )
    architecture = _parse_architecture(str(metadata["klass"]), args, kwargs)
    return Package(architecture, _check_state(state), size)


def _parse_json(text: object) -> Any:
    try:
        # Given bytes, `json` would also accept UTF-16 and UTF-32, and import their codecs.
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError("its header is not valid JSON") from error


def _parse_header(header: dict[str, Any], data: memoryview) -> dict[str, LazyTensor]:
    """Return the tensors that a safetensors header describes.

    Raises `CheckpointError` unless they cover `data` without gaps or overlaps.
    """
    tensors = {}
    ranges = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
                is_shape = all(type(part) is int and 0 <= part < 2**48 for part in shape)
            case _:
                raise CheckpointError(f"invalid description of tensor {short_repr(name)}")
        dtype = _DTYPES.get(kind)
        if dtype is None or not is_shape or len(shape) > 8:
            raise CheckpointError(
                f"unsupported dtype or shape of tensor {short_repr(name)}: "
                f"{short_repr(kind)} {short_repr(shape)}"
            )
        numel = math.prod(shape)
        if not 0 <= start <= stop <= len(data) or stop - start != numel * dtype.itemsize:
            raise CheckpointError(f"tensor {short_repr(name)} lies outside the file")
        ranges.append((start, stop))
        tensors[name] = LazyTensor.whole(Storage(dtype, numel, data[start:stop]), shape)
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            raise CheckpointError("its tensors overlap or leave a gap")
        end = stop
    if end != len(data):
        raise CheckpointError("bytes after the last tensor: the file is damaged")
    return tensors


def _decode_argument(value: object) -> object:
    """Convert a JSON value to an argument, including the objects that stand for fractions."""
    if isinstance(value, list):
        return [_decode_argument(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("_type") == "fraction":
        match value:
            case {"numerator": int(above), "denominator": int(below)} if below:
                return Fraction(above, below)
        raise CheckpointError("invalid fraction in its arguments")
    return {key: _decode_argument(item) for key, item in value.items()}


def _unflatten(node: object, weights: Mapping[str, LazyTensor]) -> object:
    """Rebuild a nested state from its JSON description, with a `Placeholder` for each class."""
    match node:
        case {"_tensor": str(key)} if key in weights:
            return weights[key]
        case {"_dict": [*pairs]} if all(
            isinstance(pair, list) and len(pair) == 2 for pair in pairs
        ):
            return {str(key): _unflatten(item, weights) for key, item in pairs}
        case {"_list": [*items]}:
            return [_unflatten(item, weights) for item in items]
        case {"_tuple": [*items]}:
            return tuple(_unflatten(item, weights) for item in items)
        case {"_class": str(name)}:
            return Placeholder(name[:200])
        case None | bool() | int() | float() | str():
            return node
    raise CheckpointError("invalid structure of its state")


# ── trusted files ──


def _unpickle_trusted(path: Path) -> object:
    warnings.warn(
        f"unpickling {path} because of trust=True: the file can run any code",
        stacklevel=5,
    )
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(f"unpickling failed: {short_repr(error)}") from error
    return _convert_objects(content)


def _convert_objects(value: object) -> object:
    """Convert unpickled tensors and classes to the types that `read_torch_file` returns."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy().data)
        return LazyTensor.whole(Storage(value.dtype, value.numel(), data), value.shape)
    if isinstance(value, type):
        return Placeholder(f"{value.__module__}.{value.__qualname__}")
    if isinstance(value, dict):
        return {key: _convert_objects(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_convert_objects(item) for item in value)
    return value
