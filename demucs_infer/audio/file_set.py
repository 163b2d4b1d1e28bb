"""Several files of one track, encoded side by side, that appear together or not at all.

Shapes: C channels, T samples of a block.
"""

import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from demucs_infer.audio.encoders.pyav import pieces
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.gain import Clip, LevelWriter
from demucs_infer.audio.writer import AudioWriter, Target
from demucs_infer.system.threads import limit_to_one_thread

_AHEAD = 4  # pieces that may wait for one encoder; then whoever brings more waits for it


class StemFileSet(LevelWriter):
    """One file a name: `with StemFileSet({"vocals": "v.flac", ...}, 44100, 2, Encoding("flac"))`.

    `write({"vocals": block, ...})` takes the next samples of all; `close()` says the levels.
    `clip` and `exact_sum` are explained at `CLIP_MODES` and `round_together`.
    """

    def __init__(
        self,
        paths: Mapping[str, Target],
        sample_rate: int,
        channels: int,
        encoding: Encoding,
        *,
        clip: Clip = "track",
        exact_sum: bool = True,
        tags: Mapping[str, Mapping[str, str]] | None = None,
        cover: bytes | None = None,
        overwrite: bool = True,
    ) -> None:
        sink = _ParallelSink()
        try:
            for name, path in paths.items():
                writer = AudioWriter(
                    path,
                    sample_rate,
                    channels,
                    format=encoding.format,
                    bits=encoding.bits,
                    bitrate=encoding.bitrate,
                    quality=encoding.quality,
                    preset=encoding.preset,
                    tags=(tags or {}).get(name),
                    cover=cover,
                    overwrite=overwrite,
                )
                sink.add(name, writer)
        except BaseException:
            sink.abort()
            raise
        folders = [Path(p).parent for p in paths.values() if isinstance(p, (str, os.PathLike))]
        super().__init__(
            sink,
            tuple(paths),
            channels,
            encoding,
            clip=clip,
            exact_sum=exact_sum,
            # The disk that must hold the result; the system's temporary folder may be memory.
            spool_folder=folders[0] if folders else None,
        )


class _EncoderThread:
    """A writer and the one thread that feeds it."""

    def __init__(self, writer: AudioWriter) -> None:
        self.writer = writer
        self._thread = ThreadPoolExecutor(1, initializer=limit_to_one_thread)
        self._waiting: deque[Future[None]] = deque()

    def put(self, piece: Tensor) -> None:
        """Hand on a copy of (C T); waits for its turn, and raises what went wrong before."""
        while len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self.writer.write, piece.clone()))

    def start_finish(self) -> None:
        """Let the encoder complete its file behind what still waits."""
        self._waiting.append(self._thread.submit(self.writer.finish))

    def wait(self) -> None:
        """Until nothing waits; raises what went wrong."""
        while self._waiting:
            self._waiting.popleft().result()
        self._thread.shutdown()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._thread.shutdown(cancel_futures=True)
        self.writer.abort()


class _ParallelSink:
    """The sink of a `StemFileSet`: one lane a file."""

    def __init__(self) -> None:
        self._lanes: dict[str, _EncoderThread] = {}

    @property
    def name(self) -> str:
        """What to call the files in a message."""
        return ", ".join(lane.writer.name for lane in self._lanes.values())

    def add(self, name: str, writer: AudioWriter) -> None:
        """One more file."""
        self._lanes[name] = _EncoderThread(writer)

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """The next samples of every file, encoded at the same time."""
        for moment in zip(*map(pieces, blocks.values()), strict=True):
            for name, piece in zip(blocks, moment):
                self._lanes[name].put(piece)

    def close(self) -> None:
        """Complete all; then rename all."""
        for lane in self._lanes.values():
            lane.start_finish()
        for lane in self._lanes.values():
            lane.wait()
        for lane in self._lanes.values():
            lane.writer.close()

    def abort(self) -> None:
        """Leave nothing behind."""
        for lane in self._lanes.values():
            lane.abort()
