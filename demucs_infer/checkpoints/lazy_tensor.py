"""Represent a tensor in a file: validated first, and read into memory when it is needed."""

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
    """Return an untrusted value as one short line, quickly even if the value is huge."""
    if isinstance(value, Exception):
        value = str(value)
    try:
        text = ascii(value[: limit + 1]) if isinstance(value, str) else _BRIEF.repr(value)
    except ValueError:  # Python does not print numbers with thousands of digits
        text = f"an enormous {type(value).__name__}"
    return text if len(text) <= limit + 2 else text[: limit - 3] + "..."


@dataclass(slots=True)
class Storage:
    """A sequence of `numel` numbers of one dtype; `data` is the part of the file with them."""

    dtype: torch.dtype
    numel: int
    data: memoryview = memoryview(b"")

    def locate(self, data: memoryview) -> None:
        """Set `data` to the first bytes of `data`; raise `CheckpointError` if it is too short."""
        size = self.numel * self.dtype.itemsize
        if not 0 <= size <= len(data):
            raise CheckpointError(
                f"truncated or forged file: expected {size} bytes of weights, found {len(data)}"
            )
        self.data = data[:size]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A strided view of a storage.

    Raises `CheckpointError` if it extends beyond the storage, or uses a number twice.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        is_valid = (
            len(self.shape) == len(self.strides) <= MAX_DIMENSIONS
            and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
            and self.offset + self.span <= self.storage.numel
            and self.numel <= self.span
        )
        if not is_valid:
            raise CheckpointError(
                f"a tensor of shape {short_repr(self.shape)} and strides "
                f"{short_repr(self.strides)} does not fit its storage of "
                f"{self.storage.numel} numbers"
            )

    @classmethod
    def whole(cls, storage: Storage, shape: Sequence[int]) -> LazyTensor:
        """Create a row-major view of all of `storage`."""
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return cls(storage, 0, tuple(shape), tuple(reversed(strides)))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored numbers."""
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.numel * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Stored numbers from the first used one through the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))

    def read(self) -> Tensor:
        """Return a copy of the tensor in memory."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        start = self.offset * self.dtype.itemsize
        stop = start + self.span * self.dtype.itemsize
        # A bytearray copies the mapped bytes once, and is writable, which torch asks for.
        flat = torch.frombuffer(bytearray(self.storage.data[start:stop]), dtype=self.dtype)
        return flat.as_strided(self.shape, self.strides).contiguous()
