"""The samples of a track on disk: decoded once, heard for the level, then by the network.

A decoder in Python takes turns with the network at every step of either, which costs the network
far more than the decoder's own time. What lies on disk is there at once.

Shapes: C channels, t samples of a block.
"""

from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

_PIECE = 65_536  # samples that are read at a time


class DecodedCache:
    """A file in `folder` that is written by `kept`, read once by `blocks`, and gone after it."""

    def __init__(self, folder: Path, channels: int) -> None:
        self._path = folder / "decoded.f32"
        self._channels = channels

    def tee(self, blocks: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """The same blocks (C t), of which a copy stays once all have been taken."""
        try:
            with self._path.open("wb") as file:
                for block in blocks:
                    file.write(block.T.contiguous().numpy().data)
                    yield block
        except BaseException:
            self.remove()
            raise

    def blocks(self) -> Generator[Tensor, None, None]:
        """All that was kept: (C t)."""
        try:
            with self._path.open("rb") as file:
                while piece := bytearray(file.read(4 * self._channels * _PIECE)):
                    yield torch.frombuffer(piece, dtype=torch.float32).view(-1, self._channels).T
        finally:
            self.remove()

    def remove(self) -> None:
        """Nobody will read it any more."""
        self._path.unlink(missing_ok=True)
