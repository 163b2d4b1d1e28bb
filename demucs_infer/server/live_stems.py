"""Send a stem as wav, flac or mp3 while it is being separated.

Shapes: C channels, t samples.
"""

import os
from collections.abc import AsyncIterator

from anyio import CapacityLimiter, move_on_after, to_thread

from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.gain import Shaper
from demucs_infer.audio.spool import SpoolReader
from demucs_infer.audio.stream_encoder import StreamEncoder
from demucs_infer.errors import AudioWriteError
from demucs_infer.server.errors import ApiError, from_exception
from demucs_infer.server.preview import LivePreview
from demucs_infer.server.queue import Job

_READ_FRAMES = 1 << 16
_POLL_SECONDS = 1.0
"""How long to wait for an event of the job, at most, before more samples are looked for."""


class LiveStem:
    """A stem of a running job as a file of 16 bits, or as mp3, which grows until the job has ended.

    Samples are those of the job's own file, apart from a gain against clipping, which is known at
    the end only, and from another sample rate, other channels or more bits that the job requests.
    """

    def __init__(
        self, job: Job, live: LivePreview, stem: str, format: str, limiter: CapacityLimiter
    ) -> None:
        """Open the samples; raise `FileNotFoundError` if there are none yet, or any more."""
        if os.name == "nt":  # an open file cannot be removed there, and the job would fail
            raise ApiError("not_done", "the job has not finished yet")
        self._job = job
        self._live = live
        self._stem = stem
        self._limiter = limiter
        output = job.item.request.output
        self._encoding = Encoding(format, bits=None if format == "mp3" else 16)
        self._shaper = Shaper.from_options(output, self._encoding)
        # Kept open, as the file is removed when the job ends.
        self._reader = SpoolReader(live.folder, (len(live.stems), live.channels))
        self._encoder: StreamEncoder | None = None

    async def begin(self) -> None:
        """Wait until the length of the track is known.

        Raises `ApiError` if the job ends before, or the format does not have the sample rate or
        the channels.
        """
        while not self._live.length:
            self._check_status()
            await self._wait()
        live = self._live
        try:
            self._encoder = StreamEncoder(
                self._encoding, live.sample_rate, live.channels, live.length
            )
        except AudioWriteError as error:
            raise from_exception(error) from error

    @property
    def num_bytes(self) -> int | None:
        """Size of the file; None if that depends on the samples."""
        if self._encoding.format != "wav":
            return None
        return 44 + 2 * self._live.channels * self._live.length

    def close(self) -> None:
        """Close the file of samples."""
        self._reader.close()
        if self._encoder:
            self._encoder.abort()

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """Yield the file, as fast as it is made; raise `ApiError` if the job fails."""
        assert self._encoder, "begin comes first"
        position, length = 0, self._live.length
        while position < length:
            is_final = self._job.record.is_final  # before reading: no samples come after it
            stop = min(position + _READ_FRAMES, length)
            count, data = await to_thread.run_sync(
                self._encode, self._encoder, position, stop, limiter=self._limiter
            )
            position += count
            if data:
                yield data
            elif not count and is_final:
                self._check_status()
                raise ApiError("failed", "the job has ended before all of its samples were sent")
            elif not count:
                await self._wait()
        yield self._encoder.finish()

    def _encode(self, encoder: StreamEncoder, start: int, stop: int) -> tuple[int, bytes]:
        """Return how many samples there are after `start`, and their bytes."""
        samples = self._reader.read(start, stop)
        blocks = dict(zip(self._live.stems, samples))
        shaped = self._shaper.shape(blocks, dict.fromkeys(blocks, 1.0))[self._stem]
        return shaped.shape[-1], encoder.encode(shaped)

    def _check_status(self) -> None:
        record = self._job.record
        if record.is_final and record.status != "done":
            raise ApiError(record.status, f"the job is {record.status}", status=409)

    async def _wait(self) -> None:
        with move_on_after(_POLL_SECONDS):
            await self._job.wait_for_update()
