"""Encode all files of a track at the same time; they appear together or not at all.

Shapes: C channels, T samples of a block.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from demucs_infer.audio.encoders.pyav import pieces
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.writer import AudioWriter, Target
from demucs_infer.system.threads import limit_to_one_thread

_MAX_WAITING = 4  # pieces that may wait for one encoder, before `write` waits for it


class Sink(Protocol):
    """Encodes the stems of one track to files."""

    @property
    def name(self) -> str:
        """Name of the files in messages."""

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """Encode the next samples of every stem."""

    def finish(self) -> None:
        """Complete the files, still under temporary names."""

    def temp_path(self, stem: str) -> Path:
        """Return the path of a stem's file until `commit`."""

    def commit(self) -> None:
        """Rename the temporary files to their final names."""

    def abort(self) -> None:
        """Remove the files."""


class StemFiles:
    """One file per stem: `with StemFiles({"vocals": "v.flac", ...}, 44100, 2, Encoding("flac"))`.

    Samples are encoded unchanged: `StemWriter` prevents clipping before. Until `commit` the files
    have temporary names in `temp_folder`, by default their final folder.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        sample_rate: int,
        channels: int,
        encoding: Encoding,
        *,
        tags: Mapping[str, Mapping[str, str]] | None = None,
        cover: bytes | None = None,
        overwrite: bool = True,
        temp_folder: Path | None = None,
    ) -> None:
        self._threads: dict[str, _EncoderThread] = {}
        try:
            for stem, target in targets.items():
                self._threads[stem] = _EncoderThread(
                    AudioWriter(
                        target,
                        sample_rate,
                        channels,
                        format=encoding.format,
                        bits=encoding.bits,
                        bitrate=encoding.bitrate,
                        quality=encoding.quality,
                        preset=encoding.preset,
                        tags=(tags or {}).get(stem),
                        cover=cover,
                        overwrite=overwrite,
                        temp_folder=temp_folder,
                    )
                )
        except BaseException:
            self.abort()
            raise

    @property
    def name(self) -> str:
        """Name of the files in messages."""
        first, *others = (thread.writer.name for thread in self._threads.values())
        return f"{first} and {len(others)} more" if others else first

    def temp_path(self, stem: str) -> Path:
        """Return the path of a stem's file until `commit`."""
        return self._threads[stem].writer.temp_path

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """Encode the next samples of every stem: name -> (C, T), all equally long."""
        if set(blocks) != set(self._threads):
            raise ValueError(f"blocks for {sorted(blocks)}, expected {sorted(self._threads)}")
        for moment in zip(*map(pieces, blocks.values()), strict=True):
            for stem, piece in zip(blocks, moment):
                self._threads[stem].write(piece)

    def finish(self) -> None:
        """Complete the files, still under temporary names."""
        for thread in self._threads.values():
            thread.start_finish()
        for thread in self._threads.values():
            thread.wait()

    def commit(self) -> None:
        """Complete all files, then rename them to their final names."""
        self.finish()
        for thread in self._threads.values():
            thread.writer.close()

    def abort(self) -> None:
        """Remove the files."""
        for thread in self._threads.values():
            thread.abort()

    def __enter__(self) -> "StemFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                self.commit()
            except BaseException:
                self.abort()
                raise
        else:
            self.abort()


class _EncoderThread:
    """A thread that encodes one file."""

    def __init__(self, writer: AudioWriter) -> None:
        self.writer = writer
        self._thread = ThreadPoolExecutor(1, initializer=limit_to_one_thread)
        self._waiting: deque[Future[None]] = deque()
        self._is_finishing = False

    def write(self, piece: Tensor) -> None:
        """Queue a copy of `piece` (C, T), as soon as there is room; raise errors of the encoder."""
        while len(self._waiting) >= _MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self.writer.write, piece.clone()))

    def start_finish(self) -> None:
        """Queue the completion of the file."""
        if not self._is_finishing:
            self._is_finishing = True
            self._waiting.append(self._thread.submit(self.writer.finish))

    def wait(self) -> None:
        """Wait until everything is encoded; raise errors of the encoder."""
        while self._waiting:
            self._waiting.popleft().result()
        self._thread.shutdown()

    def abort(self) -> None:
        """Remove the file."""
        self._thread.shutdown(cancel_futures=True)
        self.writer.abort()
