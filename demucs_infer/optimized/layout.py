"""Tensors with their channels side by side in memory, and tiles of them that stay in the cache.

Shapes: B batch, C channels, F bins, T steps of time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_TILE_BYTES = 4 << 20
"""What the halves of a gate may take in a tile: each about the second-level caches of two cores."""


def tiles(count: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """`range(count)` in runs whose rows fit into the cache."""
    step = max(1, _TILE_BYTES // row_bytes)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def tiles_of_each(batch: int, rows: int, row_bytes: int) -> Iterator[tuple[int, int, int]]:
    """The same for every item of a batch."""
    for item in range(batch):
        for start, stop in tiles(rows, row_bytes):
            yield item, start, stop


def channels_last(x: Tensor) -> Tensor:
    """(B C F T), or (B C T) as an image of one row, with its channels side by side."""
    if x.dim() == 3:
        x = x[:, :, None]
    return x.contiguous(memory_format=torch.channels_last)


def empty_last(shape: tuple[int, int, int, int]) -> Tensor:
    """Room for (B C F T), channels last."""
    batch, channels, bins, steps = shape
    return torch.empty(batch, bins, steps, channels).permute(0, 3, 1, 2)


def rows_of(x: Tensor) -> Tensor:
    """One item (C F T), channels last, as it lies in memory: (F T C)."""
    return x.permute(1, 2, 0)


def read_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Bins `start` to `stop` of (1 C F T), silence outside."""
    inside = x[:, :, max(start, 0) : min(stop, x.shape[2])]
    before, after = max(-start, 0), max(stop - x.shape[2], 0)
    return F.pad(inside, (0, 0, before, after)) if before or after else inside


def as_image(weight: Tensor) -> Tensor:
    """A kernel over time as one over an image of one row."""
    return weight if weight.dim() == 4 else weight[:, :, None]
