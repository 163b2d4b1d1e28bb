"""Weights from the quantised states that DiffQ wrote: whole numbers on 1 to 14 bits, packed.

Letters: L lines of 2048 values, P bit planes, 32 words of 64 bits in a line and plane.
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
"""DiffQ codes groups on up to 15 bits, but its writer leaves those on 15 out of the file."""

_WORDS, _WORD_BITS = 32, 64
_LINE = _WORDS * _WORD_BITS

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a state was quantised: what a quantiser was told, valid if it exists."""

    is_diffq: bool
    is_packed: bool
    min_size: float = 0.01
    """Mebibytes of float32; a parameter up to this size is kept as it is."""
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
            raise CheckpointError(f"it was quantised in a way that no quantiser offers: {self}")

    def keeps(self, name: str, numel: int) -> bool:
        """Whether a parameter is stored as plain numbers."""
        full = name if "." in name else f".{name}"  # as the quantiser spells it
        names = (full, name.rpartition(".")[2])
        excluded = any(fnmatch(one, pattern) for one in names for pattern in self.exclude)
        return excluded or numel <= self.min_size * 2**20 // 4


_QUANTIZERS = {"diffq.diffq.DiffQuantizer": True, "diffq.uniform.UniformQuantizer": False}


def decode(state: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of a network with these `shapes` (in its own order), float32."""
    scheme = _scheme(state.get("meta"))
    kept = [name for name, shape in shapes.items() if scheme.keeps(name, math.prod(shape))]
    coded = [name for name in shapes if name not in set(kept)]
    plain = _sequence(state, "float16" if scheme.float16 else "others", len(kept))
    entries = _sequence(state, "quantized", len(coded))
    for name, weight in zip(kept, plain):
        if not isinstance(weight, LazyTensor) or weight.shape != tuple(shapes[name]):
            raise CheckpointError(f"the weights of {short_repr(name)} have another shape")
        yield name, weight.read().float()
    unpack = _diffq if scheme.is_diffq else _uniform
    for name, entry in zip(coded, entries):
        if not isinstance(entry, tuple | list):
            raise CheckpointError(f"the quantised weights of {short_repr(name)} are not described")
        numel = math.prod(shapes[name])
        yield name, unpack(tuple(entry), numel, scheme).reshape(tuple(shapes[name]))


def _scheme(meta: object) -> Scheme:
    match meta:
        case {"klass": Placeholder(name=name, is_call=False), "init_kwargs": dict(options), **rest}:
            pass
        case _:
            raise CheckpointError("the quantised state does not say how it was made")
    if name not in _QUANTIZERS:
        raise CheckpointError(f"it was quantised by {short_repr(name)}, which is not known here")
    if rest.get("torch_pack"):
        raise CheckpointError("it was packed with torch_pack=True, which no release was")
    exclude = options.get("exclude") or ()
    if not isinstance(exclude, list | tuple) or not all(isinstance(one, str) for one in exclude):
        raise CheckpointError(f"its quantiser's exclude is {short_repr(exclude)}")
    return Scheme(
        is_diffq=_QUANTIZERS[name],
        is_packed=bool(rest.get("packed", False)),
        float16=bool(options.get("float16", False)),
        exclude=tuple(exclude),
        min_size=_number(options, "min_size", 0.01),
        group_size=_whole(options, "group_size", 1),
        min_bits=_whole(options, "min_bits", 2),
        bits=_whole(options, "bits", 8),
    )


def _number(options: Mapping[Any, object], key: str, default: float) -> float:
    value = options.get(key, default)
    if not isinstance(value, int | float) or not -(2**40) <= value <= 2**40:
        raise CheckpointError(f"its quantiser's {key} is {short_repr(value)}")
    return value


def _whole(options: Mapping[Any, object], key: str, default: int) -> int:
    value = _number(options, key, default)
    if value != int(value):
        raise CheckpointError(f"its quantiser's {key} is {short_repr(value)}")
    return int(value)


def _sequence(state: Mapping[str, Any], key: str, count: int) -> Sequence[object]:
    found = state.get(key)
    if not isinstance(found, list | tuple) or len(found) != count:
        have = len(found) if isinstance(found, list | tuple) else "no"
        raise CheckpointError(f"it has {have} {key} weights where the network has {count}")
    return found


def _uniform(entry: tuple[object, ...], numel: int, scheme: Scheme) -> Tensor:
    match entry:
        case (LazyTensor() as stored, [*limits]):
            packed = scheme.is_packed
            levels = _unpack(stored, numel) if packed else _numbers(stored, numel)
            return _restore(levels, torch.tensor(float(scheme.bits)), limits)
    raise CheckpointError("uniformly quantised weights are not described as such")


def _diffq(entry: tuple[object, ...], numel: int, scheme: Scheme) -> Tensor:
    size = scheme.group_size
    if numel % size:
        raise CheckpointError(f"{numel} weights do not divide into groups of {size}")
    groups = numel // size
    match entry:
        case (LazyTensor() as stored, [*limits], LazyTensor() as widths) if not scheme.is_packed:
            levels, bits = _numbers(stored, numel), _numbers(widths, groups)
        case ([*planes], [*limits], LazyTensor() as widths) if scheme.is_packed:
            bits = _unpack(widths, groups) + scheme.min_bits
            levels = _gather(planes, bits, size)
        case _:
            raise CheckpointError("quantised weights are not described as such")
    return _restore(levels.view(groups, size), bits[:, None], limits)


def _gather(planes: Sequence[object], bits: Tensor, size: int) -> Tensor:
    """The levels of all groups, (groups size), from one pack for each number of bits."""
    levels = torch.empty(len(bits), size, dtype=torch.int16)
    for width in sorted(set(bits.tolist())):
        stored = planes[width - 1] if 1 <= width <= min(MAX_BITS, len(planes)) else None
        if not isinstance(stored, LazyTensor):
            raise CheckpointError(f"it has groups on {width} bits but not their weights")
        chosen = bits == width
        levels[chosen] = _unpack(stored, int(chosen.sum()) * size).view(-1, size)
    return levels


def _unpack(stored: LazyTensor, count: int) -> Tensor:
    """The first `count` values of packed planes (L P 32) -> (count) int16."""
    shape = stored.shape
    supports = len(shape) == 3 and shape[1] <= MAX_BITS + 1 and shape[2] == _WORDS
    if not supports or stored.dtype != torch.int64 or shape[0] != math.ceil(count / _LINE):
        raise CheckpointError(f"packed weights of shape {short_repr(shape)} for {count} values")
    lines, planes, _ = shape
    words = stored.read().numpy().astype("<i8", copy=False)
    values = np.zeros((lines, _WORD_BITS, _WORDS), dtype=np.int16)
    for plane in range(planes):
        octets = np.ascontiguousarray(words[:, plane]).view(np.uint8).reshape(lines, _WORDS, 8)
        bits = np.unpackbits(octets, axis=-1, bitorder="little")  # (L 32 64)
        values |= bits.transpose(0, 2, 1).astype(np.int16) << plane
    return torch.from_numpy(values.reshape(-1)[:count])


def _numbers(stored: LazyTensor, count: int) -> Tensor:
    if stored.dtype not in (torch.uint8, torch.int16) or stored.numel != count:
        raise CheckpointError(f"quantised weights of shape {short_repr(stored.shape)} for {count}")
    return stored.read().reshape(-1)


def _restore(levels: Tensor, bits: Tensor, limits: Sequence[object]) -> Tensor:
    """Levels on so many bits, spread evenly between two limits; the roundings are DiffQ's."""
    match limits:
        case (float() | int() as low, float() | int() as high) if -1e30 < low <= high < 1e30:
            unit = 1 / (2 ** bits.float() - 1)
            return levels.float() * unit * (high - low) + low
    raise CheckpointError(f"quantised weights between {short_repr(limits)}")
