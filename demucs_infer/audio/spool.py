"""Buffer separated samples on disk, so that network and encoders do not wait for each other.

A journal file has the length and checksum of each block, so that an interrupted track can be
verified and continued, even after a power loss. Uses 4 bytes of disk per sample; memory does not
grow with the track. Hand-written, as array formats (npy, zarr) can neither be read while they are
written nor be continued after a crash.

Shapes: S stems, C channels, t samples of a block.
"""

import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_READ_FRAMES = 65_536
_DATA = "samples.f32"


class SpoolAbandoned(Exception):
    """Raised in readers of a spool that will not be completed."""


def count_frames(folder: Path, shape: tuple[int, int]) -> int:
    """Return how many samples the spool in `folder` has so far; it may still be growing."""
    return (folder / _DATA).stat().st_size // (4 * shape[0] * shape[1])


def read_frames(folder: Path, shape: tuple[int, int], start: int, stop: int) -> Tensor:
    """Return the samples [`start`, `stop`) of a spool (S, C, t), as far as it has them."""
    with closing(SpoolReader(folder, shape)) as reader:
        return reader.read(start, stop)


class SpoolReader:
    """Reads samples of a spool, also after its files were removed."""

    def __init__(self, folder: Path, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._data = (folder / _DATA).open("rb")

    def read(self, start: int, stop: int) -> Tensor:
        """Return the samples [`start`, `stop`) (S, C, t), as far as the spool has them."""
        samples = self._shape[0] * self._shape[1]
        self._data.seek(4 * samples * start)
        piece = bytearray(self._data.read(4 * samples * (stop - start)))
        count = len(piece) // (4 * samples)
        if not count:  # which `frombuffer` refuses
            return torch.zeros(*self._shape, 0)
        frames = torch.frombuffer(piece, dtype=torch.float32, count=count * samples)
        return frames.view(count, *self._shape).permute(1, 2, 0)

    def close(self) -> None:
        """Close the file."""
        self._data.close()


class Spool:
    """A file that one thread appends blocks to, until `finish`, while other threads read them.

    If `folder` has the files of an interrupted spool, they are continued; `frames` is the number of
    samples so far.
    """

    def __init__(self, folder: Path, stems: int, channels: int) -> None:
        self.shape = (stems, channels)
        self._data = folder / _DATA
        self._journal = folder / "journal"
        self._changed = threading.Condition()
        self._is_finished = False
        self._error: Exception | None = None
        self.frames, end_of_journal = self._verify()
        self._data_file = self._data.open("ab")
        self._data_file.truncate(self.frames * self._frame_bytes)
        self._journal_file = self._journal.open("a", encoding="ascii")
        self._journal_file.truncate(end_of_journal)

    @property
    def is_closed(self) -> bool:
        """Whether the spool was finished, failed or abandoned."""
        return self._is_finished

    @property
    def _frame_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def _verify(self) -> tuple[int, int]:
        """Return the number of valid frames, and the bytes of the journal that describe them."""
        frames = end = 0
        if not self._journal.exists() or not self._data.exists():
            return 0, 0
        with self._data.open("rb") as data, self._journal.open("rb") as journal:
            for line in journal:
                try:
                    count, checksum = (int(word) for word in line.split())
                except ValueError:
                    break
                # A truncated line may still be two numbers.
                if not line.endswith(b"\n") or not self._is_valid(data, count, checksum):
                    break
                frames, end = frames + count, end + len(line)
        return frames, end

    def _is_valid(self, data: BinaryIO, count: int, checksum: int) -> bool:
        remaining, actual = count * self._frame_bytes, 0
        while remaining > 0:
            piece = data.read(min(remaining, 1 << 20))
            if not piece:
                return False
            remaining, actual = remaining - len(piece), zlib.crc32(piece, actual)
        return remaining == 0 and actual == checksum

    def append(self, block: Tensor) -> None:
        """Add the next samples of all stems: (S, C, t)."""
        if tuple(block.shape[:-1]) != self.shape:
            raise ValueError(
                f"invalid block of shape {tuple(block.shape)}: expected (*{self.shape}, samples)"
            )
        frames = block.detach().to("cpu", torch.float32).flatten(0, 1).T.contiguous().numpy()
        data = frames.data
        self._data_file.write(data)
        self._data_file.flush()
        self._journal_file.write(f"{len(frames)} {zlib.crc32(data)}\n")
        self._journal_file.flush()
        with self._changed:
            self.frames += len(frames)
            self._changed.notify_all()

    def finish(self) -> None:
        """Mark the spool as complete, so that readers end after the last sample."""
        self._end(None)

    def fail(self, error: Exception) -> None:
        """Mark the spool as failed: its readers raise `error`. The files are kept."""
        self._end(error)

    def abandon(self) -> None:
        """Fail with `SpoolAbandoned`: readers stop, even if there is data left to read."""
        self._end(SpoolAbandoned())

    def abandon_unless_finished(self) -> None:
        """Abandon the spool, if it is not closed."""
        if not self._is_finished:
            self.abandon()

    def _end(self, error: Exception | None) -> None:
        with self._changed:
            self._is_finished = True
            self._error = self._error or error
            self._changed.notify_all()
        self._close()

    def _close(self) -> None:
        for file in (self._data_file, self._journal_file):
            with suppress(OSError):  # on a full disk, which was reported before
                file.close()

    def blocks(self) -> Iterator[Tensor]:
        """Yield all samples from the first on in blocks (S, C, t); wait for samples to be added."""
        position = 0
        with self._data.open("rb") as data:
            while True:
                stop = self._wait_for_more(position)
                if stop == position:
                    return
                while position < stop and self._error is None:
                    count = min(_READ_FRAMES, stop - position)
                    piece = bytearray(data.read(count * self._frame_bytes))
                    frames = torch.frombuffer(piece, dtype=torch.float32)
                    yield frames.view(count, *self.shape).permute(1, 2, 0).contiguous()
                    position += count

    def _wait_for_more(self, position: int) -> int:
        """Wait until there are frames after `position`, or none will come; return their number.

        Raises the error of a spool that failed.
        """
        with self._changed:
            while self.frames == position and not self._is_finished:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            return self.frames
