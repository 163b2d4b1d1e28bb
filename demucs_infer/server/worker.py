"""One track through one network, on the thread that a device has: everything that takes time."""

import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from demucs_infer.api import Separator
from demucs_infer.audio.reader import probe
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.runner import BatchRunner, TrackJob
from demucs_infer.errors import AudioReadError, DemucsError, ModelLoadingError
from demucs_infer.events import ChunkProcessed, Event
from demucs_infer.server.errors import ApiError, no_room
from demucs_infer.server.model_pool import ModelPool

logger = logging.getLogger(__name__)

_MAX_DEATHS = 3
_UNEXPECTED = re.compile(r"\[Errno|\w+(Error|Exception|Interrupt): ")


@dataclass(slots=True, eq=False, kw_only=True)
class WorkItem:
    """What a worker needs to know of a job."""

    source: Path
    name: str
    """The client's name for the track."""

    target: OutputPaths
    model: ModelSpec
    order: SeparationRequest
    weights: tuple[str, ...]
    seconds: float
    """How long it may take."""

    max_duration_seconds: float
    cancel: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the server ends: what is done so far is kept for the next one."""


class Cancelled(Exception):
    """Nobody wants the stems any more."""


class Stopped(Exception):
    """The server ends; the next one continues."""


def check_length(source: Path, name: str, order: SeparationRequest, max_seconds: float) -> None:
    """Refuse what is no audio, or by its own words too long, before anything is decoded."""
    try:
        said = probe(source).duration_seconds
    except AudioReadError as error:
        raise ApiError(422, "unreadable_audio", _plain(str(error), source, name)) from error
    if said is not None and min(said - order.start, order.duration or said) > max_seconds:
        raise _too_long(max_seconds)


def separate(task: WorkItem, pool: ModelPool, tell: Callable[[Event], None]) -> TrackResult:
    """Make the stems; raises `ApiError`, `Cancelled` or `Stopped`."""
    deadline = time.monotonic() + task.seconds
    batch = BatchRunner(
        _ready(task, pool),
        task.model,
        task.order,
        weights=task.weights,
        max_crashes=_MAX_DEATHS,
        keeps_when_full=False,  # nobody may ever ask for it again
    )
    work = TrackJob(source=task.source, target=task.target, track=task.name)
    with closing(batch.run([work])) as items:
        for _, item in items:
            if isinstance(item, TrackResult):
                return _checked(item, task)
            tell(item)
            _check(item, task, deadline)
    raise AssertionError("a track ends with its result")


def _ready(task: WorkItem, pool: ModelPool) -> Separator:
    try:
        return pool.ready(task.model, task.order)
    except ModelLoadingError as error:
        logger.error("%s cannot be loaded: %s", task.model.name, error)
        raise ApiError(
            503, "model_unavailable", f"the model {task.model.name!r} cannot be loaded now", 60
        ) from error
    except (ValueError, DemucsError) as error:
        raise ApiError(422, "invalid_parameters", str(error)) from error


def _check(item: Event, task: WorkItem, deadline: float) -> None:
    if task.cancel.is_set():
        raise Cancelled
    if task.stop.is_set():
        raise Stopped
    if time.monotonic() > deadline:
        raise ApiError(
            504, "out_of_time", f"not done after {task.seconds:g} s; send a shorter track"
        )
    if isinstance(item, ChunkProcessed) and item.seconds_total > task.max_duration_seconds:
        raise _too_long(task.max_duration_seconds)


def _checked(result: TrackResult, task: WorkItem) -> TrackResult:
    if result.ok:
        return result
    if result.fault == "input":
        message = _plain(result.error, task.source, task.name)
        raise ApiError(422, "unreadable_audio", message)
    if result.fault == "disk":
        logger.error("job on %s failed: %s", task.source.name, result.error)
        raise no_room()
    if _UNEXPECTED.match(result.error) or result.status == "quarantined":
        logger.error("job on %s failed: %s", task.source.name, result.error)
        raise ApiError(500, "failed", "the separation failed; the log of the server says why")
    raise ApiError(422, "cannot_separate", _plain(result.error, task.source, task.name))


def _plain(message: str, source: Path, name: str) -> str:
    """`message` with the client's name for the track in place of ours."""
    return message.replace(str(source), name).replace(source.name, name)


def _too_long(max_seconds: float) -> ApiError:
    return ApiError(
        413, "too_long", f"the track is longer than {max_seconds:g} s; send a part, or a duration"
    )


class ModelWorker:
    """A thread with the networks of a device; does one thing after the other."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._inbox: queue.SimpleQueue[Callable[[ModelPool], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"demucs-{pool.device}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def give(self, work: Callable[[ModelPool], None]) -> None:
        """The next thing to do."""
        self._inbox.put(work)

    def stop(self) -> None:
        """End after the thing at hand."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._inbox.get()) is not None:
            work(self._pool)
        self._pool.close()
