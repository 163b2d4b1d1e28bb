"""Separate many tracks, skipping finished ones and resuming interrupted ones.

While one track is separated, the next one is decoded and the previous one is encoded. An error in a
track is not raised, but becomes its `TrackResult`. Files get their final names when they are
complete, and the manifest in the same folder is written last.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from demucs_infer.api import Separator
from demucs_infer.audio.gain import translate_os_errors, write_error
from demucs_infer.audio.spool import Spool, SpoolAbandoned
from demucs_infer.batch.attempts import Run
from demucs_infer.batch.chain import ChainedModelSpec
from demucs_infer.batch.custom_model import CustomModelSpec
from demucs_infer.batch.job import TrackJob as TrackJob
from demucs_infer.batch.manifest import Manifest, Stem
from demucs_infer.batch.prepare import (
    AlreadyDone,
    PreparedTrack,
    Preparer,
    Skip,
    TrackLocked,
    clean_up,
)
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.result import TrackResult, fault_of
from demucs_infer.engine.pipeline import Block, Track, TrackEvent
from demucs_infer.errors import format_error
from demucs_infer.events import Event, TrackFailed, TrackFinished
from demucs_infer.options import Request
from demucs_infer.results import check_output
from demucs_infer.system.cores import count_cores
from demucs_infer.system.threads import limit_to_one_thread

logger = logging.getLogger(__name__)

_MAX_UNWRITTEN = 2  # tracks whose files may still be written while others are separated


def open_separator(model: ModelSpec, request: Request) -> Separator:
    """Return a separator for the tracks of a request; raise `ValueError` for unknown stems."""
    if isinstance(model, ChainedModelSpec):
        return model.open(request)
    if isinstance(model, CustomModelSpec):
        separator = model.open(request)
    else:
        separator = Separator(
            model.name,
            model.repo,
            options=request.separation,
            stem_options=request.stems,
            cache_dir=model.cache_dir,
            offline=model.offline,
            trust=model.trust,
        )
    separator.free_original_weights()
    return separator


class BatchRunner:
    """Separates tracks with one model, one after the other, reading and writing in the background.

    `weights` are the digests from `ModelSpec.weights`. `skip` decides which tracks are skipped:
    those with a manifest of the same recipe ("same"), those whose files exist ("existing"), or none
    ("nothing"). With `verify`, the files of a manifest are compared by digest, not just by size.

    A track that crashed the process `max_crashes` times at the same position gets the status
    `quarantined` (None: never). `run` decides which crashes count. Tracks that were in progress
    during a crash are separated after all others, one at a time, as only one of them is the cause.

    Windows of up to `max_tracks_per_batch` tracks run as one batch. A track that another process is
    separating is left for the end: with `waits_for_others`, the runner then waits for that process;
    otherwise it skips the track. With `keeps_when_full`, a full disk leaves the samples that were
    separated for the next attempt. With `keeps_other_inputs`, a track fails that would replace the
    stems of another input. If a new run differs only in the format of its files, it reuses
    float stems of an earlier run; with `reuses_stems`, any lossless stems.
    """

    def __init__(
        self,
        separator: Separator,
        model: ModelSpec,
        request: Request,
        *,
        weights: tuple[str, ...] = (),
        skip: Skip = "same",
        verify: bool = False,
        writes_manifest: bool = True,
        max_crashes: int | None = None,
        run: Run | None = None,
        max_tracks_per_batch: int = 1,
        waits_for_others: bool = False,
        keeps_when_full: bool = True,
        reuses_stems: bool = False,
        keeps_other_inputs: bool = False,
    ) -> None:
        """Check that the stems can be written as requested; raise `ValueError` otherwise."""
        check_output(
            request.output, separator.stems, separator.samplerate, separator.audio_channels
        )
        self._separator = separator
        self._model = model
        self._preparer = Preparer(
            separator=separator,
            model=model,
            request=request,
            weights=weights,
            skip=skip,
            verify=verify,
            max_crashes=max_crashes,
            run=run or Run(),
            keeps_when_full=keeps_when_full,
            made_folders=set(),
            reuses_stems=reuses_stems,
            keeps_other_inputs=keeps_other_inputs,
        )
        self._writes_manifest = writes_manifest
        self._max_tracks_per_batch = max_tracks_per_batch
        self._waits_for_others = waits_for_others

    def run_one(self, job: TrackJob) -> TrackResult:
        """Separate one track, unless it is done; errors are results."""
        with closing(self.run([job])) as items:
            return next(item for _, item in items if isinstance(item, TrackResult))

    def run(
        self, jobs: Iterable[TrackJob]
    ) -> Generator[tuple[TrackJob, Event | TrackResult], None, None]:
        """Yield events, and one result per track; closing the generator stops the work.

        The samples that were separated by then are kept, and the next run resumes from them.
        """
        crashed_jobs: list[TrackJob] = []
        locked_jobs: list[TrackJob] = []
        yield from self._run_pipeline(self._without_crashed(jobs, crashed_jobs), locked_jobs)
        for job in crashed_jobs:
            yield from self._run_pipeline([job], locked_jobs)
        for job in locked_jobs:  # last, so that no locks are held while waiting (no deadlock)
            yield from self._run_pipeline([job], None)

    def _without_crashed(
        self, jobs: Iterable[TrackJob], crashed_jobs: list[TrackJob]
    ) -> Iterator[TrackJob]:
        """Yield the jobs in which no process crashed; put the others into `crashed_jobs`."""
        for job in jobs:
            is_counted = self._preparer.max_crashes is not None and job.result is None
            if is_counted and self._preparer.workdir(job).has_open_attempt:
                crashed_jobs.append(job)
            else:
                yield job

    def _run_pipeline(
        self, jobs: Iterable[TrackJob], locked_jobs: list[TrackJob] | None
    ) -> Generator[tuple[TrackJob, Event | TrackResult], None, None]:
        """Read, separate and write different tracks at the same time.

        Jobs that another process or thread has locked are put into `locked_jobs`. If that is None,
        they are waited for or skipped.
        """
        stop = threading.Event()
        ready: deque[PreparedTrack] = deque()
        try:
            yield from self._run_threads(jobs, stop, ready, locked_jobs)
        finally:
            for track in ready:
                track.release()

    def _run_threads(
        self,
        jobs: Iterable[TrackJob],
        stop: threading.Event,
        ready: deque[PreparedTrack],
        locked_jobs: list[TrackJob] | None,
    ) -> Generator[tuple[TrackJob, Event | TrackResult], None, None]:
        """Run the threads; `ready` gets tracks that were read but are not separated yet."""
        pending: deque[_PendingResult] = deque()
        running: dict[int, PreparedTrack] = {}

        def prepare(job: TrackJob) -> PreparedTrack | _PendingResult | None:
            prepared = self._prepare(job, stop, locked_jobs)
            if isinstance(prepared, PreparedTrack):
                ready.append(prepared)
            return prepared

        def list_tracks() -> Iterator[Track | Exception]:
            """Yield the tracks for the network; an exception in place of jobs without work."""
            for number, prepared in enumerate(map_ahead(reader, prepare, jobs)):
                if not isinstance(prepared, PreparedTrack):
                    pending.extend([prepared] if prepared else [])
                    yield SpoolAbandoned()
                    continue
                ready.popleft()
                spool, result = prepared.writer.spool, writers.submit(self._write, prepared)
                pending.append(_PendingResult(prepared.job, result, spool))
                if spool.frames < prepared.track.level.length:
                    running[number] = prepared
                    yield prepared.track
                else:
                    spool.finish()
                    yield SpoolAbandoned()

        # One thread for each track in progress, so that a separated track is written at once.
        background = self._separator.jobs or count_cores()
        devices = len(self._separator.devices)
        threads = _MAX_UNWRITTEN + self._max_tracks_per_batch + max(background, devices)
        with (
            ThreadPoolExecutor(1, "demucs-read", limit_to_one_thread) as reader,
            ThreadPoolExecutor(threads, "demucs-write", limit_to_one_thread) as writers,
        ):
            try:
                stream = self._separator.stream_blocks_many(
                    list_tracks(), max_tracks_per_batch=self._max_tracks_per_batch
                )
                with closing(stream):
                    for number, item in stream:
                        yield from _route_event(number, item, running)
                        yield from _take_results(pending, max_unwritten=_MAX_UNWRITTEN - 1)
                yield from _take_results(pending, max_unwritten=0)
            finally:
                stop.set()
                _stop_reading(running.values())
                for result in pending:
                    if result.spool:
                        result.spool.abandon()

    def _prepare(
        self, job: TrackJob, stop: threading.Event, locked_jobs: list[TrackJob] | None
    ) -> "PreparedTrack | _PendingResult | None":
        """Prepare a track, or return its result; None if it was put into `locked_jobs`."""
        start_time = perf_counter()
        may_wait = locked_jobs is None and self._waits_for_others
        try:
            return self._preparer.prepare(job, stop, start_time, wait_for_lock=may_wait)
        except AlreadyDone as done:
            result = done.result
        except TrackLocked:
            if locked_jobs is not None:
                locked_jobs.append(job)
                return None
            result = TrackResult.in_progress(job.track, self._model.name)
        except Exception as error:  # noqa: BLE001 (a track never raises)
            result = self._failure(job, error, start_time)
        future: Future[TrackResult] = Future()
        future.set_result(result)
        return _PendingResult(job, future)

    def _write(self, prepared: PreparedTrack) -> TrackResult:
        """Write the files of a track whose spool is being filled, and return its result."""
        job, writer = prepared.job, prepared.writer
        try:
            levels = writer.encode()
            manifest = self._make_manifest(prepared, levels.gains)
            with translate_os_errors(str(job.target.manifest.parent)):
                prepared.workdir.commit(
                    writer.commit, manifest if self._writes_manifest else None, job.target.manifest
                )
            return TrackResult.done(job.track, job.target.manifest, manifest, self._writes_manifest)
        except SpoolAbandoned:
            writer.abort()
            prepared.workdir.release()
            return TrackResult(
                track=job.track,
                status="failed",
                model=self._model.name,
                error="interrupted",
                fault="other",
            )
        except Exception as error:  # noqa: BLE001 (a track never raises)
            writer.spool.abandon()
            writer.abort()
            is_kept = self._preparer.keeps_when_full and writer.spool.frames > 0
            error = clean_up(error, job, prepared.workdir, keeps_when_full=is_kept)
            return self._failure(job, error, prepared.start_time)

    def _make_manifest(self, prepared: PreparedTrack, gains: Mapping[str, float]) -> Manifest:
        writer, rate = prepared.writer, self._separator.samplerate
        return Manifest(
            input=str(prepared.job.source),
            recipe=prepared.recipe,
            stems={
                name: Stem.from_file(
                    writer.sink.temp_path(name),
                    Path(os.path.relpath(path, prepared.job.target.manifest.parent)).as_posix(),
                    gains[name],
                )
                for name, path in prepared.job.target.stems(self._separator.stems).items()
            },
            sample_rate=writer.file_rate,
            channels=writer.layout.channels,
            duration_seconds=prepared.track.level.length / rate,
            resumed_seconds=prepared.resumed_frames / rate,
            gain=min(gains.values()),
            warnings=prepared.warnings,
            seconds=perf_counter() - prepared.start_time,
            device=",".join(map(str, self._separator.devices)),
        )

    def _failure(self, job: TrackJob, error: Exception, start_time: float) -> TrackResult:
        logger.debug("%s failed", job.track, exc_info=error)
        return TrackResult(
            track=job.track,
            status="failed",
            model=self._model.name,
            error=format_error(_as_write_error(job, error)),
            fault=fault_of(error),
            seconds=perf_counter() - start_time,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _PendingResult:
    """A track whose result is not reported yet; its files may still be in progress."""

    job: TrackJob
    result: Future[TrackResult]
    spool: Spool | None = None

    @property
    def is_separated(self) -> bool:
        """Whether the network is done with it."""
        return self.spool is None or self.spool.is_closed


def _stop_reading(tracks: Iterable[PreparedTrack]) -> None:
    for prepared in tracks:
        prepared.track.close()


def _route_event(
    number: int, item: TrackEvent, running: dict[int, PreparedTrack]
) -> Iterator[tuple[TrackJob, Event | TrackResult]]:
    """Append blocks to the spool of their track, and yield other events."""
    prepared = running.get(number)
    if prepared is None:
        return
    spool = prepared.writer.spool
    if isinstance(item, TrackFinished):
        del running[number]
        spool.finish()
    elif isinstance(item, TrackFailed):
        del running[number]
        spool.fail(item.error)
    elif not isinstance(item, Block):
        yield prepared.job, item
    elif spool.is_closed:  # the files could not be written
        prepared.track.abandon()
    else:
        try:
            spool.append(item.stems)
        except Exception as error:  # noqa: BLE001 (a track never raises)
            spool.fail(error)


def _take_results(
    pending: deque[_PendingResult], *, max_unwritten: int
) -> Iterator[tuple[TrackJob, TrackResult]]:
    """Yield results that are complete, in the order in which the tracks began.

    Waits while more than `max_unwritten` tracks are separated but not written.
    """
    while pending and pending[0].is_separated:
        unwritten = sum(result.is_separated for result in pending)
        if unwritten <= max_unwritten and not pending[0].result.done():
            return
        result = pending[0].result.result()
        yield pending.popleft().job, result


def _as_write_error(job: TrackJob, error: Exception) -> Exception:
    """Translate errors of the OS; those of reading are `AudioReadError` already."""
    return write_error(str(job.target.folder), error) if isinstance(error, OSError) else error


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """Yield the results of `function` in order, computing the next one while one is used."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()
