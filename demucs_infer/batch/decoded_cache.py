"""Cache the decoded samples of a track on disk, so that it is decoded only once.

The samples are written while the level of the track is measured, and read while it is separated.
Decoding again during the separation would slow the network down by far more than its own time, as
both compete for the Python interpreter.

Shapes: C channels, t samples of a block.
"""

from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

_READ_FRAMES = 65_536


class DecodedCache:
    """A file in `folder` that `tee` writes, and `blocks` reads once and deletes."""

    def __init__(self, folder: Path, channels: int) -> None:
        self._path = folder / "decoded.f32"
        self._channels = channels

    def tee(self, blocks: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Yield the blocks (C, t) unchanged while copying them to the file; deleted on an error."""
        try:
            with self._path.open("wb") as file:
                for block in blocks:
                    file.write(block.T.contiguous().numpy().data)
                    yield block
        except BaseException:
            self.remove()
            raise

    def blocks(self) -> Generator[Tensor, None, None]:
        """Yield all samples (C, t), then delete the file."""
        try:
            with self._path.open("rb") as file:
                while piece := bytearray(file.read(4 * self._channels * _READ_FRAMES)):
                    yield torch.frombuffer(piece, dtype=torch.float32).view(-1, self._channels).T
        finally:
            self.remove()

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self._path.unlink(missing_ok=True)
