"""Bring a track to the level that networks were trained at, and back.

Shapes: C channels, T samples of the track, S stems.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt

from torch import Tensor

from demucs_infer.audio.blocks import reblock
from demucs_infer.errors import SeparationError

# Short enough that torch sums a piece in one thread: the sum is the same for any number of
# threads.
PIECE = 16_384

# A mono mix this much below the channels is what is left of two that cancel, not music.
_CANCELLED = 1e-4


@dataclass(frozen=True, slots=True)
class Level:
    """Mean and deviation of the mono mix; `length` is that of the track it was taken from."""

    mean: float = 0.0
    std: float = 1.0
    length: int = 0

    def remove(self, track: Tensor) -> Tensor:
        """A new tensor, at the level of training."""
        return (track - self.mean) / self.std

    def restore(self, stems: Tensor) -> Tensor:
        """A new tensor, at the level of the track; every stem gets the mean, as upstream's do."""
        return stems * self.std + self.mean


def measure(blocks: Iterable[Tensor]) -> Level:
    """The level of the track that `blocks` (C t) make up, whatever their sizes.

    In float64 over pieces of a fixed length, so that a file, a tensor and a stream of the
    same samples give the same two numbers. Where the mono mix is silent (silence, a constant,
    two channels that cancel) there is no level to take, and the track is left as it is.
    """
    mono, sides = _Moments(), _Moments()
    for piece in reblock(blocks, PIECE):
        exact = piece.detach().double()
        sides.add(exact.flatten())
        if not isfinite(sides.mean):
            bad = mono.count + int((~exact.isfinite()).any(dim=-2).nonzero()[0])
            raise SeparationError(
                f"the track holds NaN or infinity, first at sample {bad}: "
                "repair it, or replace those samples by 0"
            )
        mono.add(exact.mean(dim=-2))
    length, std = mono.count, mono.std
    if not std > max(1e-8, _CANCELLED * sides.std):
        return Level(length=length)
    return Level(mono.mean, std + 1e-8, length)


class _Moments:
    """Running mean and sum of squared deviations, merged piece by piece (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, values: Tensor) -> None:
        mean = float(values.mean())
        squares = float((values - mean).square().sum())
        total = self.count + len(values)
        away = mean - self.mean
        self._squares += squares + away * away * self.count * len(values) / total
        self.mean += away * len(values) / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased deviation; 0 for fewer than two values, which have none."""
        return sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0
