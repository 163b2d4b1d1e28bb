"""A tensor that is still in its file: what it will be is known before memory is taken for it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demucs_infer.errors import CheckpointError

MAX_DIMENSIONS = 8


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxtuple, _BRIEF.maxlist, _BRIEF.maxdict = 2, 4, 4, 4


def short_repr(value: object, limit: int = 80) -> str:
    """A value from a file, fit for one line of a message; never long to make, whatever it is."""
    if isinstance(value, Exception):
        value = str(value)
    try:
        shown = ascii(value[: limit + 1]) if isinstance(value, str) else _BRIEF.repr(value)
    except ValueError:  # a number of more digits than Python likes to print
        shown = f"an enormous {type(value).__name__}"
    return shown if len(shown) <= limit + 2 else shown[: limit - 3] + "..."


@dataclass(slots=True)
class Storage:
    """A run of `numel` equal numbers; `data` is where they are in the file."""

    dtype: torch.dtype
    numel: int
    data: memoryview = memoryview(b"")

    def locate(self, data: memoryview) -> None:
        """Say where the numbers are; refused if there are fewer than were announced."""
        size = self.numel * self.dtype.itemsize
        if not 0 <= size <= len(data):
            raise CheckpointError(
                f"the file announces {size} bytes of weights where it holds {len(data)}; "
                "it is truncated or was made to mislead"
            )
        self.data = data[:size]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A view into a storage, valid if it exists: nothing outside the storage, nothing repeated."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        sane = (
            len(self.shape) == len(self.strides) <= MAX_DIMENSIONS
            and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
            and self.offset + self.span <= self.storage.numel
            and self.numel <= self.span
        )
        if not sane:
            raise CheckpointError(
                f"a tensor of shape {short_repr(self.shape)} and strides "
                f"{short_repr(self.strides)} does not fit into its "
                f"{self.storage.numel} stored numbers"
            )

    @classmethod
    def whole(cls, storage: Storage, shape: Sequence[int]) -> LazyTensor:
        """All of `storage`, in row-major order."""
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return cls(storage, 0, tuple(shape), tuple(reversed(strides)))

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def span(self) -> int:
        """How many stored numbers lie between the first that is used and the last, both in."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        start = self.offset * self.dtype.itemsize
        stop = start + self.span * self.dtype.itemsize
        # bytearray copies once out of the mapped file and is writable, as torch wants it.
        flat = torch.frombuffer(bytearray(self.storage.data[start:stop]), dtype=self.dtype)
        return flat.as_strided(self.shape, self.strides).contiguous()
