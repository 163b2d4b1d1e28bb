"""Handle tensors in channels-last memory, and cut them into tiles that fit in the cache.

Shapes: B batch, C channels, F bins, T steps of time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.system.arena import empty

TILE_BYTES = 2 << 20
"""Largest input of a gate in one tile: about the second-level caches of two cores."""


def tiles(count: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Split `count` rows into ranges that fit in the cache: yield (start, stop) of each."""
    step = max(1, TILE_BYTES // row_bytes)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def tiles_of_each(batch: int, rows: int, row_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Split the rows of every item of a batch like `tiles`: yield (item, start, stop)."""
    for item in range(batch):
        for start, stop in tiles(rows, row_bytes):
            yield item, start, stop


def channels_last(x: Tensor) -> Tensor:
    """Return `x` in channels-last memory: (B, C, F, T), or (B, C, T) as an image of one row."""
    if x.dim() == 3:
        x = x[:, :, None]
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    if is_last or x.device.type != "cpu" or x.dtype != torch.float32:
        return x.contiguous(memory_format=torch.channels_last)
    return empty_channels_last(x.shape).copy_(x)


def empty_channels_last(shape: Sequence[int]) -> Tensor:
    """Allocate (B, C, F, T) in channels-last memory."""
    batch, channels, bins, steps = shape
    return empty(batch, bins, steps, channels).permute(0, 3, 1, 2)


def view_as_rows(x: Tensor) -> Tensor:
    """View one channels-last item (C, F, T) in the order of its memory: (F, T, C)."""
    return x.permute(1, 2, 0)


def slice_bins(x: Tensor, start: int, stop: int) -> Tensor:
    """Return bins `start` to `stop` of (1, C, F, T), padded with silence outside."""
    inside = x[:, :, max(start, 0) : min(stop, x.shape[2])]
    before, after = max(-start, 0), max(stop - x.shape[2], 0)
    return F.pad(inside, (0, 0, before, after)) if before or after else inside


def slice_steps(x: Tensor, start: int, stop: int) -> Tensor:
    """Return steps `start` to `stop` of (1, C, 1, T), padded with silence outside."""
    inside = x[..., max(start, 0) : min(stop, x.shape[3])]
    before, after = max(-start, 0), max(stop - x.shape[3], 0)
    return F.pad(inside, (before, after)) if before or after else inside


def as_image(weight: Tensor) -> Tensor:
    """Turn a 1D kernel over time into a 2D kernel for an image of one row."""
    return weight if weight.dim() == 4 else weight[:, :, None]
