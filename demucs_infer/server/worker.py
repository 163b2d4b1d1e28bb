"""Separate the tracks of jobs, a thread for each that runs, within the limits of each job."""

import errno
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from demucs_infer.api import Separator
from demucs_infer.audio.reader import probe
from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.runner import BatchRunner
from demucs_infer.batch.workdir import WorkDir
from demucs_infer.errors import AudioReadError, DemucsError, ModelLoadingError
from demucs_infer.events import ChunkProcessed, Event
from demucs_infer.options import Request
from demucs_infer.server.errors import ApiError, disk_full, from_exception, model_unavailable
from demucs_infer.server.model_pool import ModelPool
from demucs_infer.server.preview import LivePreview
from demucs_infer.system.threads import count_threads

logger = logging.getLogger(__name__)

_MAX_CRASHES = 3
_UNEXPECTED = re.compile(r"\[Errno|\w+(Error|Exception|Interrupt): |cannot write the file: ")
_OF_SERVER = re.compile(
    "|".join(map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EACCES))), re.IGNORECASE
)
"""Reasons for which an upload cannot be read that are no fault of its client."""


@dataclass(slots=True, eq=False, kw_only=True)
class WorkItem:
    """The parts of a job that a worker needs."""

    source: Path
    name: str
    """The client's name for the track."""

    output: OutputPaths
    model: ModelSpec
    request: Request
    weights: tuple[str, ...]
    client: str
    """Clients take turns; so do the tracks of each."""

    max_seconds: float
    """Limit of the processing time."""

    max_duration_seconds: float
    """Limit of the track's duration."""

    min_free_bytes: int = 0
    """Free space below which the job fails."""

    duration: float | None = None
    """Seconds of the track, if its header states them."""

    waits_for_others: bool = False
    """Whether another server may still have the files of the track open."""

    cancel: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the server shuts down: finished parts are kept for the next process."""


class JobCancelled(Exception):
    """Raised when the client has cancelled the job or disconnected."""


class WorkerStopped(Exception):
    """Raised when the server shuts down; the job is resumed after a restart."""


def check_duration(
    source: Path, name: str, request: Request, max_duration_seconds: float
) -> float | None:
    """Return the seconds to separate by the header of a file, or None; decode nothing.

    Raises `ApiError` if the file is not audio, or too long.
    """
    try:
        duration = probe(source).duration_seconds
    except AudioReadError as error:
        if _OF_SERVER.search(str(error)):
            logger.error("an upload cannot be read: %s", error)
            raise ApiError("failed", "internal error: see the server log") from error
        raise from_exception(error, _with_client_name(str(error), source, name)) from error
    if duration is None:
        return None
    duration = min(duration - request.input.start, request.input.duration or duration)
    if duration > max_duration_seconds:
        raise _too_long(max_duration_seconds)
    return duration


def separate(
    item: WorkItem,
    pool: ModelPool,
    on_event: Callable[[Event], None],
    on_start: Callable[[LivePreview], None],
) -> TrackResult:
    """Write the stems of a track; raise `ApiError`, `JobCancelled` or `WorkerStopped`."""
    deadline = time.monotonic() + item.max_seconds
    with ExitStack() as stack:
        separator = _open_separator(item, pool, stack)
        on_start(_make_preview(item, separator))
        return _separate(item, separator, on_event, deadline)


def _separate(
    item: WorkItem, separator: Separator, on_event: Callable[[Event], None], deadline: float
) -> TrackResult:
    try:
        batch = BatchRunner(
            separator,
            item.model,
            item.request,
            weights=item.weights,
            max_crashes=_MAX_CRASHES,
            keeps_when_full=False,  # the same track may never be sent again
            waits_for_others=item.waits_for_others,
        )
    except ValueError as error:  # files that cannot be written as requested
        raise from_exception(error) from error
    job = TrackJob(source=item.source, target=item.output, track=item.name)
    with closing(batch.run([job])) as events:
        for _, event in events:
            if isinstance(event, TrackResult):
                return check_result(event, item)
            on_event(event)
            _check_limits(event, item, deadline)
    raise AssertionError("the track's events ended without a result")


def _make_preview(item: WorkItem, separator: Separator) -> LivePreview:
    folder = WorkDir(item.output.folder, item.output.manifest).data_folder
    return LivePreview(folder, separator.stems, separator.audio_channels, separator.samplerate)


def _open_separator(item: WorkItem, pool: ModelPool, stack: ExitStack) -> Separator:
    try:
        return stack.enter_context(pool.open(item.model, item.request, item.client))
    except ModelLoadingError as error:
        raise model_unavailable(item.model, error) from error
    except (ValueError, DemucsError) as error:
        raise from_exception(error) from error


def _check_limits(event: Event, item: WorkItem, deadline: float) -> None:
    if item.cancel.is_set():
        raise JobCancelled
    if item.stop.is_set():
        raise WorkerStopped
    if time.monotonic() > deadline:
        raise ApiError(
            "out_of_time",
            f"job exceeded its time limit of {item.max_seconds:g} s: send a shorter track",
        )
    if shutil.disk_usage(item.output.folder.parent).free < item.min_free_bytes:
        logger.error("less than %d bytes are free: a job fails", item.min_free_bytes)
        raise disk_full()
    if isinstance(event, ChunkProcessed) and event.seconds_total > item.max_duration_seconds:
        raise _too_long(item.max_duration_seconds)


def check_result(result: TrackResult, item: WorkItem) -> TrackResult:
    """Return a result, or raise the `ApiError` for one that failed."""
    if result.ok:
        return result
    message = _with_client_name(result.error, item.source, item.name)
    if result.fault == "input" and not _OF_SERVER.search(result.error):
        raise ApiError("unreadable_audio", message)
    is_unexpected = _UNEXPECTED.match(result.error) or result.fault == "input"
    is_unexpected = is_unexpected or result.status == "quarantined"
    if result.fault != "disk" and not is_unexpected:
        raise ApiError("cannot_separate", message)
    logger.error("job on %s failed: %s", item.source.name, result.error)
    if result.fault == "disk":
        raise disk_full()
    raise ApiError("failed", "the separation failed: see the server log")


def _with_client_name(message: str, source: Path, name: str) -> str:
    """Return `message` with the client's name for the track in place of the upload's."""
    return message.replace(str(source), name).replace(source.name, name)


def _too_long(max_duration_seconds: float) -> ApiError:
    return ApiError(
        "too_long",
        f"the track is longer than {max_duration_seconds:g} s: send a part of it, or set duration",
    )


class ModelWorker:
    """A thread that separates one track after the other, with the models of one device."""

    def __init__(self, pool: ModelPool, on_death: Callable[["ModelWorker"], None]) -> None:
        """Create the thread; it calls `on_death` if it ends because of a bug."""
        self.pool = pool
        self._on_death = on_death
        self._is_stopping = False
        self._has_begun = threading.Event()
        self._inbox: queue.SimpleQueue[Callable[[ModelPool], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"demucs-{pool.device}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        self._has_begun.wait()

    @property
    def is_dead(self) -> bool:
        """Whether the thread has ended by itself."""
        return self._thread.ident is not None and not (self._thread.is_alive() or self._is_stopping)

    def submit(self, work: Callable[[ModelPool], None]) -> None:
        """Queue a function to call with the models."""
        self._inbox.put(work)

    def stop(self) -> None:
        """End the thread once the current work is done, and wait for it."""
        self._is_stopping = True
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        count_threads()  # the thread takes the default over now
        self._has_begun.set()
        try:
            while (work := self._inbox.get()) is not None:
                work(self.pool)
        except BaseException:
            logger.critical("the worker of %s died", self.pool.device, exc_info=True)
            self._on_death(self)
