"""Send a stem as a wav file while it is being separated.

Shapes: C channels, t samples.
"""

import os
import struct
from collections.abc import AsyncIterator

from anyio import CapacityLimiter, move_on_after, to_thread
from torch import Tensor

from demucs_infer.audio.spool import SpoolReader
from demucs_infer.server.errors import ApiError
from demucs_infer.server.preview import LivePreview, encode_pcm
from demucs_infer.server.queue import Job

_READ_FRAMES = 1 << 16
_POLL_SECONDS = 1.0
"""How long to wait for an event of the job, at most, before more samples are looked for."""


class LiveStem:
    """A stem of a running job as a wav file of 16 bits, which grows until the job has ended.

    Samples above full scale are limited, as the gain against clipping is known at the end only.
    """

    def __init__(self, job: Job, live: LivePreview, stem: str, limiter: CapacityLimiter) -> None:
        """Open the samples; raise `FileNotFoundError` if there are none yet, or any more."""
        if os.name == "nt":  # an open file cannot be removed there, and the job would fail
            raise ApiError("not_done", "the job has not finished yet")
        self._job = job
        self._live = live
        self._index = live.stems.index(stem)
        self._limiter = limiter
        # Kept open, as the file is removed when the job ends.
        self._reader = SpoolReader(live.folder, (len(live.stems), live.channels))

    async def wait_for_length(self) -> None:
        """Wait until the length of the track is known; raise `ApiError` if the job ends before."""
        while not self._live.length:
            self._check_status()
            await self._wait()

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return 44 + self._data_bytes

    @property
    def _data_bytes(self) -> int:
        return 2 * self._live.channels * self._live.length

    def close(self) -> None:
        """Close the file of samples."""
        self._reader.close()

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """Yield the file, as fast as it is made; raise `ApiError` if the job fails."""
        yield self._make_header()
        position, length = 0, self._live.length
        while position < length:
            is_final = self._job.record.is_final  # before reading: no samples come after it
            stop = min(position + _READ_FRAMES, length)
            samples = await to_thread.run_sync(self._read, position, stop, limiter=self._limiter)
            if samples.shape[-1]:
                position += samples.shape[-1]
                yield encode_pcm(samples)
            elif is_final:
                self._check_status()
                raise ApiError("failed", "the job has ended before all of its samples were sent")
            else:
                await self._wait()

    def _read(self, start: int, stop: int) -> Tensor:
        return self._reader.read(start, stop)[self._index]

    def _check_status(self) -> None:
        record = self._job.record
        if record.is_final and record.status != "done":
            raise ApiError(record.status, f"the job is {record.status}", status=409)

    async def _wait(self) -> None:
        with move_on_after(_POLL_SECONDS):
            await self._job.wait_for_update()

    def _make_header(self) -> bytes:
        channels, rate, size = self._live.channels, self._live.sample_rate, self._data_bytes
        return struct.pack(
            "<4sI4s4sIHHIIHH4sI",
            *(b"RIFF", min(36 + size, 0xFFFFFFFF), b"WAVE", b"fmt ", 16, 1, channels, rate),
            *(2 * channels * rate, 2 * channels, 16, b"data", min(size, 0xFFFFFFFF)),
        )
