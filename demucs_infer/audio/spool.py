"""Final samples on disk between the network and the encoders, so that neither waits for the other.

Every block is entered in a journal with its checksum: what was interrupted, even by a power cut,
is verified and continued. Memory does not grow with the track; disk does, by 4 bytes a sample.

Shapes: S stems, C channels, t samples of a block.
"""

import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_PIECE = 65_536  # frames that are read at a time


class SpoolAbandoned(Exception):
    """Raised for those who read a spool that will not be completed."""


class Spool:
    """Filled by one thread, followed by others: `append` blocks, then `finish`.

    `Spool(folder, stems, channels)` takes up what lies in `folder` already; `frames` tells how
    much that is.
    """

    def __init__(self, folder: Path, stems: int, channels: int) -> None:
        self.shape = (stems, channels)
        self._data = folder / "samples.f32"
        self._journal = folder / "journal"
        self._changed = threading.Condition()
        self._is_finished = False
        self._error: Exception | None = None
        self.frames, end_of_journal = self._verified()
        self._data_file = self._data.open("ab")
        self._data_file.truncate(self.frames * self._frame_bytes)
        self._journal_file = self._journal.open("a", encoding="ascii")
        self._journal_file.truncate(end_of_journal)

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will come, for better or worse."""
        return self._is_finished

    @property
    def _frame_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def _verified(self) -> tuple[int, int]:
        """How many frames are whole, and how much of the journal tells of them."""
        frames = end = 0
        if not self._journal.exists() or not self._data.exists():
            return 0, 0
        with self._data.open("rb") as data, self._journal.open("rb") as journal:
            for line in journal:
                try:
                    count, checksum = (int(word) for word in line.split())
                except ValueError:
                    break
                # A line that was cut short may still read as two numbers.
                if not line.endswith(b"\n") or not self._is_whole(data, count, checksum):
                    break
                frames, end = frames + count, end + len(line)
        return frames, end

    def _is_whole(self, data: BinaryIO, count: int, checksum: int) -> bool:
        left, found = count * self._frame_bytes, 0
        while left > 0:
            piece = data.read(min(left, 1 << 20))
            if not piece:
                return False
            left, found = left - len(piece), zlib.crc32(piece, found)
        return left == 0 and found == checksum

    def append(self, block: Tensor) -> None:
        """Add the next samples of all stems: (S C t)."""
        if tuple(block.shape[:-1]) != self.shape:
            raise ValueError(f"a block of shape {tuple(block.shape)} in a spool of {self.shape}")
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
        """Nothing more will come: those who follow reach the end."""
        self._end(None)

    def fail(self, error: Exception) -> None:
        """Nothing more will come: those who follow get this error. The files stay."""
        self._end(error)

    def abandon(self) -> None:
        """As `fail`, with `SpoolAbandoned`; also those who only read what is there have to stop."""
        self._end(SpoolAbandoned())

    def abandon_unless_finished(self) -> None:
        """As `abandon`, if nobody said yet how it ended."""
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
            with suppress(OSError):  # of a full disk, which is told already
                file.close()

    def blocks(self) -> Iterator[Tensor]:
        """All samples from the first, in blocks (S C t), waiting for those still to come."""
        at = 0
        with self._data.open("rb") as data:
            while True:
                stop = self._wait_for_more(at)
                if stop == at:
                    return
                while at < stop and self._error is None:
                    count = min(_PIECE, stop - at)
                    piece = bytearray(data.read(count * self._frame_bytes))
                    frames = torch.frombuffer(piece, dtype=torch.float32)
                    yield frames.view(count, *self.shape).permute(1, 2, 0).contiguous()
                    at += count

    def _wait_for_more(self, at: int) -> int:
        """How many frames there are; `at` itself where there will be no more."""
        with self._changed:
            while self.frames == at and not self._is_finished:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            return self.frames
