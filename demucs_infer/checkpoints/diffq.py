"""Decode weights that DiffQ has quantized: packed integers of 1 to 14 bits.

The package `diffq` is not used: its license is CC-BY-NC, and it needs a compiler.

Letters: L lines of 2048 values, P bit planes, 32 words of 64 bits per line and plane.
Bit `s` of word `j` in plane `b` of line `l` is bit `b` of value `2048 l + 32 s + j`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demucs_infer.checkpoints.lazy_tensor import LazyTensor, short_repr
from demucs_infer.checkpoints.torch_file import Placeholder
from demucs_infer.errors import CheckpointError

MAX_BITS = 14
"""Limit for the bits of a group; DiffQ allows 15, but does not write groups with 15 bits."""

_WORDS, _WORD_BITS = 32, 64
_LINE = _WORDS * _WORD_BITS

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Scheme:
    """Validated settings of the quantizer that wrote the weights."""

    is_diffq: bool
    is_packed: bool
    min_size: float = 0.01
    """Size in mebibytes of float32; parameters up to this size are not quantized."""
    float16: bool = False
    exclude: tuple[str, ...] = ()
    group_size: int = 1
    min_bits: int = 2
    bits: int = 8

    def __post_init__(self) -> None:
        if not (
            0 <= self.min_size <= 2**20
            and 1 <= self.group_size <= 2**20
            and 1 <= self.min_bits <= MAX_BITS
            and 1 <= self.bits <= MAX_BITS + 1
        ):
            raise CheckpointError(f"invalid quantizer parameters: {self}")

    def is_plain(self, name: str, numel: int) -> bool:
        """Return whether a parameter is stored unquantized."""
        full = name if "." in name else f".{name}"  # the quantizer's spelling
        names = (full, name.rpartition(".")[2])
        excluded = any(fnmatch(name, pattern) for name in names for pattern in self.exclude)
        return excluded or numel <= self.min_size * 2**20 // 4


_QUANTIZERS = {"diffq.diffq.DiffQuantizer": True, "diffq.uniform.UniformQuantizer": False}


def decode(state: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the float32 weights of each parameter.

    `shapes` has the shapes of the network's parameters by name, in the network's order.
    """
    scheme = _parse_scheme(state.get("meta"))
    plain = {name for name, shape in shapes.items() if scheme.is_plain(name, math.prod(shape))}
    plain_names = [name for name in shapes if name in plain]
    quantized_names = [name for name in shapes if name not in plain]
    weights = _sequence(state, "float16" if scheme.float16 else "others", len(plain_names))
    entries = _sequence(state, "quantized", len(quantized_names))
    for name, weight in zip(plain_names, weights):
        if not isinstance(weight, LazyTensor) or weight.shape != tuple(shapes[name]):
            raise CheckpointError(
                f"{short_repr(name)} is not a tensor of shape {tuple(shapes[name])}"
            )
        yield name, weight.read().float()
    decode_entry = _decode_diffq if scheme.is_diffq else _decode_uniform
    for name, entry in zip(quantized_names, entries):
        if not isinstance(entry, tuple | list):
            raise CheckpointError(f"the quantized weights of {short_repr(name)} are not a tuple")
        numel = math.prod(shapes[name])
        yield name, decode_entry(tuple(entry), numel, scheme).reshape(tuple(shapes[name]))


def _parse_scheme(meta: object) -> Scheme:
    match meta:
        case {"klass": Placeholder(name=name, is_call=False), "init_kwargs": dict(options), **rest}:
            pass
        case _:
            raise CheckpointError("the quantized state lacks the class or options of its quantizer")
    if name not in _QUANTIZERS:
        raise CheckpointError(
            f"unsupported quantizer {short_repr(name)}: expected one of {', '.join(_QUANTIZERS)}"
        )
    if rest.get("torch_pack"):
        raise CheckpointError("unsupported torch_pack=True: no released checkpoint uses it")
    exclude = options.get("exclude") or ()
    is_list = isinstance(exclude, list | tuple)
    if not is_list or not all(isinstance(pattern, str) for pattern in exclude):
        raise CheckpointError(f"invalid quantizer option exclude = {short_repr(exclude)}")
    return Scheme(
        is_diffq=_QUANTIZERS[name],
        is_packed=bool(rest.get("packed", False)),
        float16=bool(options.get("float16", False)),
        exclude=tuple(exclude),
        min_size=_number(options, "min_size", 0.01),
        group_size=_integer(options, "group_size", 1),
        min_bits=_integer(options, "min_bits", 2),
        bits=_integer(options, "bits", 8),
    )


def _number(options: Mapping[Any, object], key: str, default: float) -> float:
    value = options.get(key, default)
    if not isinstance(value, int | float) or not -(2**40) <= value <= 2**40:
        raise CheckpointError(f"invalid quantizer option {key} = {short_repr(value)}")
    return value


def _integer(options: Mapping[Any, object], key: str, default: int) -> int:
    value = _number(options, key, default)
    if value != int(value):
        raise CheckpointError(f"invalid quantizer option {key} = {short_repr(value)}")
    return int(value)


def _sequence(state: Mapping[str, Any], key: str, count: int) -> Sequence[object]:
    items = state.get(key)
    if not isinstance(items, list | tuple) or len(items) != count:
        have = len(items) if isinstance(items, list | tuple) else "no"
        raise CheckpointError(f"the network needs {count} weights in `{key}`, the file has {have}")
    return items


def _decode_uniform(entry: tuple[object, ...], numel: int, scheme: Scheme) -> Tensor:
    match entry:
        case (LazyTensor() as stored, [*limits]):
            read = _unpack if scheme.is_packed else _read_numbers
            levels = read(stored, numel)
            return _restore(levels, torch.tensor(float(scheme.bits)), limits)
    raise CheckpointError("uniformly quantized weights must be a tensor and its limits")


def _decode_diffq(entry: tuple[object, ...], numel: int, scheme: Scheme) -> Tensor:
    size = scheme.group_size
    if numel % size:
        raise CheckpointError(f"{numel} weights cannot be divided into groups of {size}")
    groups = numel // size
    match entry:
        case (LazyTensor() as stored, [*limits], LazyTensor() as widths) if not scheme.is_packed:
            levels, bits = _read_numbers(stored, numel), _read_numbers(widths, groups)
        case ([*planes], [*limits], LazyTensor() as widths) if scheme.is_packed:
            bits = _unpack(widths, groups) + scheme.min_bits
            levels = _gather(planes, bits, size)
        case _:
            raise CheckpointError("quantized weights must consist of levels, limits and bits")
    return _restore(levels.view(groups, size), bits[:, None], limits)


def _gather(planes: Sequence[object], bits: Tensor, size: int) -> Tensor:
    """Unpack the levels (groups size); `planes` has one packed tensor for each bit width."""
    levels = torch.empty(len(bits), size, dtype=torch.int16)
    for width in sorted(set(bits.tolist())):
        stored = planes[width - 1] if 1 <= width <= min(MAX_BITS, len(planes)) else None
        if not isinstance(stored, LazyTensor):
            raise CheckpointError(f"the weights of the groups with {width} bits are missing")
        chosen = bits == width
        levels[chosen] = _unpack(stored, int(chosen.sum()) * size).view(-1, size)
    return levels


def _unpack(stored: LazyTensor, count: int) -> Tensor:
    """Unpack the first `count` values of bit planes (L, P, 32) -> (count) int16."""
    shape = stored.shape
    is_supported = len(shape) == 3 and shape[1] <= MAX_BITS + 1 and shape[2] == _WORDS
    if not is_supported or stored.dtype != torch.int64 or shape[0] != math.ceil(count / _LINE):
        raise CheckpointError(f"wrong shape {short_repr(shape)} of {count} packed values")
    lines, planes, _ = shape
    words = stored.read().numpy().astype("<i8", copy=False)
    values = np.zeros((lines, _WORD_BITS, _WORDS), dtype=np.int16)
    for plane in range(planes):
        octets = np.ascontiguousarray(words[:, plane]).view(np.uint8).reshape(lines, _WORDS, 8)
        bits = np.unpackbits(octets, axis=-1, bitorder="little")  # (L, 32, 64)
        values |= bits.transpose(0, 2, 1).astype(np.int16) << plane
    return torch.from_numpy(values.reshape(-1)[:count])


def _read_numbers(stored: LazyTensor, count: int) -> Tensor:
    if stored.dtype not in (torch.uint8, torch.int16) or stored.numel != count:
        raise CheckpointError(
            f"quantized weights are {stored.dtype} of shape {short_repr(stored.shape)}: "
            f"expected {count} of uint8 or int16"
        )
    return stored.read().reshape(-1)


def _restore(levels: Tensor, bits: Tensor, limits: Sequence[object]) -> Tensor:
    """Map levels of `bits` bits evenly onto the range of `limits`, rounding as DiffQ does."""
    match limits:
        case (float() | int() as low, float() | int() as high) if -1e30 < low <= high < 1e30:
            unit = 1 / (2 ** bits.float() - 1)
            return levels.float() * unit * (high - low) + low
    raise CheckpointError(f"invalid limits of quantized weights: {short_repr(limits)}")
