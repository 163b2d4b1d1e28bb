"""Define what all encoders share: their protocol, pieces of a block, rounding, the file object.

Shapes: C channels, T samples of a block.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

PIECE = 65536
"""Samples encoded at once, so that a long block needs little extra memory."""


class Encoder(Protocol):
    """Encodes float samples into an open file."""

    def write(self, block: Tensor) -> None:
        """Encode the next samples (C, T)."""

    def finish(self) -> None:
        """Write what the encoder still buffers, and the header."""

    def abort(self) -> None:
        """Stop encoding, in any state, and leave the file incomplete."""


def pieces(block: Tensor, length: int = PIECE) -> Iterator[Tensor]:
    """Yield a block (C, T) as views of at most `length` samples."""
    for start in range(0, block.shape[-1], length):
        yield block[:, start : start + length]


def quantize(block: Tensor, bits: int) -> Tensor:
    """Round floats to integers of `bits` bits (as int32), saturated at full scale.

    Full scale is 2**(bits - 1), as in reading, so that decoded samples come back bit-identical.
    """
    scale = 1 << (bits - 1)
    return (block * scale).round_().clamp_(-scale, scale - 1).to(torch.int32)


class FileProxy:
    """A file object for an encoder library, which ignores everything after an abort.

    A library also writes when its container is closed, which must not change the file after an
    error. `error` is the first error of the file, which the library may not pass on.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.is_aborted = False
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write to the file; drop the data after an abort."""
        if self.is_aborted:
            return len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move in the file."""
        return 0 if self.is_aborted else self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in the file."""
        return 0 if self.is_aborted else self.file.tell()
