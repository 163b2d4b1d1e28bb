"""Bring a track to the level that networks expect, and stems to the level of the track.

Shapes: C channels, T samples of the track, S stems.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from demucs_infer.audio.blocks import reblock
from demucs_infer.errors import SeparationError

# Short enough that torch sums a piece in one thread: the number of threads does not matter.
PIECE = 16_384

_WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""

# If the mono mix is weaker than the channels by this factor, two channels cancel each other, and
# the mix is only their rounding error.
_CANCELLED = 1e-4

# Added to the standard deviation, as upstream does.
_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Level:
    """Mean and standard deviation of the mono mix of a track of `length` samples."""

    mean: float = 0.0
    std: float = 1.0
    length: int = 0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std = {self.std} must be above 0: silence has 1.0")

    def remove(self, track: Tensor) -> Tensor:
        """Return `track` at the level that networks were trained at, as a new tensor."""
        return (track - self.mean) / self.std

    def restore(self, stems: Tensor) -> Tensor:
        """Return `stems` at the level of the track, as a new tensor.

        The mean of the track is added to every stem, as upstream does.
        """
        return stems * self.std + self.mean

    def with_population_std(self) -> "Level":
        """Return the level with the biased standard deviation (1 / n), numpy's default."""
        if self.length < 2 or self.std == 1:  # 1: silent, or not measured
            return self
        std = (self.std - _EPSILON) * sqrt((self.length - 1) / self.length)
        return Level(self.mean, std, self.length)


def measure(blocks: Iterable[Tensor], eps: float = 1e-8) -> Level:
    """Measure the level of a track, given as consecutive `blocks` (C, t).

    Computed in float64 over pieces of a fixed length, so that a file, a tensor and a stream of
    the same samples give the same two numbers. If the mono mix is silent (silence, a constant,
    two channels that cancel), or deviates by `eps` at most, the returned level changes nothing.
    Raises `SeparationError` for samples that are NaN or infinite.
    """
    mono, channels = _Moments(), _Moments()
    for piece in reblock(blocks, PIECE):
        piece = piece.detach()
        exact = (piece.cpu() if piece.device.type in _WITHOUT_FLOAT64 else piece).double()
        channels.add(exact.flatten())
        if not isfinite(channels.mean):
            bad = mono.count + int((~exact.isfinite()).any(dim=-2).nonzero()[0])
            raise SeparationError(
                f"the track contains NaN or infinity, first at sample {bad}: "
                "repair it, or replace these samples with 0"
            )
        mono.add(exact.mean(dim=-2))
    return _make_level(mono, channels, eps)


def measure_on_device(blocks: Iterable[Tensor]) -> Level:
    """Measure the level of a track whose blocks are on a GPU, waiting for the GPU only once.

    The pieces are the same as in `measure`, but each is summed in another order: the results agree
    except for the last digits of float64.
    """
    parts: list[tuple[int, Tensor]] = []  # length and moments of pieces
    for block in blocks:
        whole = block.shape[-1] // PIECE * PIECE
        if whole:
            pieces = block[..., :whole].double().unflatten(-1, (-1, PIECE)).transpose(0, 1)
            parts.append((PIECE, _measure_pieces(pieces)))
        if whole < block.shape[-1]:
            parts.append(
                (block.shape[-1] - whole, _measure_pieces(block[None, ..., whole:].double()))
            )
    mono, channels = _Moments(), _Moments()
    counts = [count for count, moments in parts for _ in range(len(moments))]
    rows = torch.cat([moments for _, moments in parts]).tolist() if parts else []
    for count, (mean, squares, mono_mean, mono_squares, num_channels) in zip(counts, rows):
        if not isfinite(mean):
            raise SeparationError(
                f"the track contains NaN or infinity, first between samples {mono.count} and "
                f"{mono.count + count}: repair it, or replace these samples with 0"
            )
        channels.merge(count * int(num_channels), mean, squares)
        mono.merge(count, mono_mean, mono_squares)
    return _make_level(mono, channels)


def _measure_pieces(pieces: Tensor) -> Tensor:
    """Return a row of moments for each piece (n, C, t), for `measure_on_device`.

    A row has mean and sum of squared deviations of all samples, those of the mono mix, and C.
    """
    mixes = pieces.mean(dim=1)
    columns: list[Tensor] = []
    for values in (pieces.flatten(1), mixes):
        mean = values.mean(dim=1)
        columns += [mean, (values - mean[:, None]).square().sum(dim=1)]
    columns.append(torch.full_like(columns[0], pieces.shape[1]))
    return torch.stack(columns, dim=1)


def _make_level(mono: "_Moments", channels: "_Moments", eps: float = 1e-8) -> Level:
    length, std = mono.count, mono.std
    if not std > max(eps, _CANCELLED * channels.std):
        return Level(length=length)
    return Level(mono.mean, std + _EPSILON, length)


class _Moments:
    """Running mean and sum of squared deviations, merged piece by piece (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, values: Tensor) -> None:
        """Merge the moments of `values` (n,) into the running ones."""
        mean = float(values.mean())
        squares = float((values - mean).square().sum())
        self.merge(len(values), mean, squares)

    def merge(self, count: int, mean: float, squares: float) -> None:
        """Merge the moments of `count` values: their mean and sum of squared deviations."""
        total = self.count + count
        delta = mean - self.mean
        self._squares += squares + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two values."""
        return sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0
