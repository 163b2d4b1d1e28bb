"""Limit the space that uploads, running jobs and stems take on disk, before bytes are accepted."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import anyio
from anyio import to_thread

from demucs_infer.options import OutputOptions
from demucs_infer.server.errors import ApiError

_MIN_SCAN_SECONDS = 1.0
_SCANS_PER_TIME = 0.1
"""The largest part of the time that is spent on scans of a slow disk."""

_SAMPLE_RATE = 48_000  # the highest of a network that is offered
_CHANNELS = 2
_FLOAT_BYTES = 4
_UNKNOWN_STEMS = 6


@dataclass(eq=False)  # without slots, which on Python 3.10 allow no weak references
class Promise:
    """Bytes that an upload or a download may write; it ends with the last reference to it."""

    size: int = 0
    written: int = 0

    @property
    def left(self) -> int:
        """The bytes that may still follow."""
        return max(self.size - self.written, 0)


@dataclass(frozen=True, slots=True)
class JobSpace:
    """Bytes that a job takes in the folder of results."""

    files: int = 0
    """The stems."""

    samples: int = 0
    """The uncompressed samples of track and stems, while it runs."""

    @property
    def total(self) -> int:
        """The bytes at the end of the separation, before the samples are deleted."""
        return self.files + self.samples


def estimate_space(
    output: OutputOptions, stems: tuple[str, ...] | None, seconds: float
) -> JobSpace:
    """Return what the stems of a track take at most, None for those of a model not loaded yet."""
    number = _UNKNOWN_STEMS if stems is None else len(stems)
    rate = output.rate if isinstance(output.rate, int) else _SAMPLE_RATE
    file_rate = output.encoding(16).bytes_per_second(rate, _CHANNELS)
    sample_rate = _SAMPLE_RATE * _CHANNELS * _FLOAT_BYTES
    return JobSpace(
        files=int(seconds * number * file_rate), samples=int(seconds * (number + 1) * sample_rate)
    )


class DiskBudget:
    """The space of the folder of data: what is used, what was promised, and what is left.

    The folders are scanned at most once a second. What is promised after a scan is added to it;
    what is deleted after a scan counts until the next one.
    """

    def __init__(
        self,
        uploads: Path,
        results: Path,
        *,
        max_bytes: int,
        min_free_bytes: int,
        max_running: int,
        list_jobs: Callable[[], Iterable[tuple[str, JobSpace]]],
    ) -> None:
        """Create a budget without limit if `max_bytes` is 0.

        `list_jobs` returns the results that unfinished jobs will make, of which `max_running` are
        made at a time.
        """
        self.max_bytes = max_bytes
        self.used_bytes = 0
        """Size of uploads, results and the files of running jobs, at the last scan."""

        self.free_bytes = 0
        """Free space of the disk, at the last scan."""

        self._uploads, self._results = uploads, results
        self._min_free_bytes = min_free_bytes
        self._max_running = max_running
        self._list_jobs = list_jobs
        self._promises: WeakSet[Promise] = WeakSet()
        self._promised_at_scan = 0
        self._promised_since = 0
        self._next_scan = 0.0
        self._turn = anyio.Lock()
        self._scanner = anyio.CapacityLimiter(1)  # a thread of its own, however many others block

    @property
    def promised_bytes(self) -> int:
        """The bytes that uploads, downloads and unfinished jobs may still write."""
        return self._promised_at_scan + self._promised_since

    async def reserve(self, size: int) -> Promise:
        """Promise space to an input; raise `ApiError` if there is too little."""
        async with self._turn:
            await self._scan_if_old()
            self._check(size)
            return self.promise(size)

    async def reserve_for_job(self, space: JobSpace) -> None:
        """Promise space to a job, which `list_jobs` returns from now on, or raise `ApiError`."""
        async with self._turn:
            await self._scan_if_old()
            self._check(space.total)
            self._promised_since += space.total

    def promise(self, size: int) -> Promise:
        """Promise space to an input that was accepted before."""
        promise = Promise(size)
        self._promises.add(promise)
        self._promised_since += size
        return promise

    async def refresh(self) -> None:
        """Update the numbers, unless they are recent, or the disk fails."""
        async with self._turn:
            with suppress(OSError):
                await self._scan_if_old()

    def _check(self, size: int) -> None:
        available = self.free_bytes - self._min_free_bytes
        if self.max_bytes:
            available = min(available, self.max_bytes - self.used_bytes)
        if size > available - self.promised_bytes:
            raise ApiError(
                "no_room", f"the server's disk has no room for {size} bytes: try again later"
            )

    async def _scan_if_old(self) -> None:
        began = time.monotonic()
        if began < self._next_scan:
            return
        # Before the scan: bytes that are written meanwhile may count twice, but never not at all.
        since = self._promised_since
        inputs = sum(promise.left for promise in self._promises)
        jobs = dict(self._list_jobs())
        used, sizes, free = await to_thread.run_sync(self._scan, limiter=self._scanner)
        self.used_bytes, self.free_bytes = used, free
        self._promised_at_scan = inputs + self._sum_left(jobs, sizes)
        self._promised_since -= since
        now = time.monotonic()
        self._next_scan = now + max(_MIN_SCAN_SECONDS, (now - began) / _SCANS_PER_TIME)

    def _sum_left(self, jobs: dict[str, JobSpace], sizes: dict[str, int]) -> int:
        """Return what jobs will still write, given the sizes of their folders."""
        begun = [name for name in jobs if sizes.get(name)]
        waiting = [space for name, space in jobs.items() if not sizes.get(name)]
        samples = sorted((space.samples for space in waiting), reverse=True)
        return (
            sum(max(jobs[name].total - sizes[name], 0) for name in begun)
            + sum(space.files for space in waiting)
            + sum(samples[: max(self._max_running - len(begun), 0)])
        )

    def _scan(self) -> tuple[int, dict[str, int], int]:
        """Return the bytes in use, those of each result, and the free space."""
        sizes = {entry.name: _measure(entry.path) for entry in os.scandir(self._results)}
        used = _measure(self._uploads) + sum(sizes.values())
        return used, sizes, shutil.disk_usage(self._results).free


def _measure(folder: str | Path) -> int:
    """Return the size of the files in a folder; those deleted meanwhile have none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total
