"""The item function: a row of a manifest in, committed stems and a row of results out.

Every engine calls it, in as many processes as it likes; it never raises for the sake of a row.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.batch.result import TrackResult, fault_of
from demucs_infer.batch.runner import BatchRunner, Skip, TrackJob, ahead, open_separator
from demucs_infer.distributed.manifest import ResultRow, TrackRow
from demucs_infer.distributed.storage import is_remote
from demucs_infer.distributed.transfer import StagedTrack, Transfer, failed

logger = logging.getLogger(__name__)

# A processor runs one window at a time, and gains nothing by more.
_TOGETHER = {"cuda": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What every worker is told, wherever it runs."""

    model: ModelSpec
    order: SeparationRequest
    out: str
    """A folder, or the URI of one."""

    device: str = "auto"
    jobs: int = 0
    skip: Skip = "same"
    max_crashes: int = 2
    """After how many deaths of its worker a track is left out."""

    run_id: str = ""
    """As `BatchRunner` takes it: crashes before this run do not count against a track."""

    conflicting: frozenset[int] = frozenset()
    """As `OutputConflicts` has it: paths that several rows would write to."""

    together: int = 0
    """Tracks whose windows share batches of the network; 0: as many as pay on its device."""


class TrackWorker:
    """Turns rows into results with one model, which it loads with its first row.

    Tracks are fetched, read, separated, written and sent side by side, one of each at a time.
    """

    def __init__(self, assignment: WorkerConfig) -> None:
        self._assignment = assignment
        self._batch: BatchRunner | None = None
        self._courier: Transfer | None = None

    def __call__(self, rows: Iterable[TrackRow]) -> Generator[ResultRow, None, None]:
        """One answer for every row; those of tracks that may kill their worker come last."""
        try:
            batch, courier = self._opened()
        except Exception as error:  # noqa: BLE001 (every row has an answer)
            yield from (self._refused(row, error) for row in rows)
            return
        suspects: list[TrackRow] = []
        yield from _side_by_side(batch, courier, rows, suspects)
        for row in suspects:  # alone: nobody else is to be blamed for what it does
            yield from _side_by_side(batch, courier, [row], None)

    def open(self) -> None:
        """Load the model now, so that what is wrong with it is an exception."""
        self._opened()

    def _opened(self) -> tuple[BatchRunner, Transfer]:
        if self._batch is None or self._courier is None:
            told = self._assignment
            separator = open_separator(told.model, told.order, device=told.device, jobs=told.jobs)
            weights = told.model.weights() or ()
            far = is_remote(told.out)
            self._courier = Transfer(
                model=told.model,
                order=told.order,
                weights=weights,
                out=told.out,
                skip=told.skip,
                max_crashes=told.max_crashes,
                run_id=told.run_id,
                conflicting=told.conflicting,
            )
            self._batch = BatchRunner(
                separator,
                told.model,
                told.order,
                weights=weights,
                # Of what lies far away the courier knows more than the batch.
                skip="nothing" if far else told.skip,
                max_crashes=None if far else told.max_crashes,
                run_id=told.run_id,
                max_tracks_per_batch=told.together or _TOGETHER.get(separator.device.type, 1),
                waits_for_others=True,
                keeps_when_full=not far,  # a folder for one attempt
            )
        return self._batch, self._courier

    def _refused(self, row: TrackRow, error: Exception) -> ResultRow:
        logger.debug("the model could not be opened", exc_info=error)
        return answer(failed(row, self._assignment.model, str(error), "model"))


def _side_by_side(
    batch: BatchRunner, courier: Transfer, rows: Iterable[TrackRow], suspects: list[TrackRow] | None
) -> Iterator[ResultRow]:
    """The answers of `rows`, in order of their end.

    With a list for `suspects`, tracks whose worker died before are put there instead.
    """
    visits: dict[int, StagedTrack] = {}

    def bring(row: TrackRow) -> StagedTrack:
        visit = courier.bring(row, is_alone=suspects is None)
        if visit.job:
            visits[id(visit.job)] = visit
        return visit

    sending: deque[Future[ResultRow]] = deque()
    try:
        with (
            ThreadPoolExecutor(1, "demucs-fetch") as fetcher,
            ThreadPoolExecutor(1, "demucs-send") as sender,
            closing(batch.run(_jobs(ahead(fetcher, bring, rows), suspects))) as items,
        ):
            for job, item in items:
                if isinstance(item, TrackResult):
                    visit = visits.pop(id(job))
                    sending.append(sender.submit(finish, courier, visit, item))
                    if len(sending) > 1:
                        yield sending.popleft().result()
            yield from (future.result() for future in sending)
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        for visit in visits.values():
            courier.interrupt(visit)
        raise
    finally:
        for visit in visits.values():  # not to be reached any more
            visit.leave()


def _jobs(brought: Iterable[StagedTrack], suspects: list[TrackRow] | None) -> Iterator[TrackJob]:
    """Their jobs, or their rows to `suspects`."""
    for visit in brought:
        if visit.job:
            yield visit.job
        elif suspects is not None:
            suspects.append(visit.row)


def finish(courier: Transfer, visit: StagedTrack, result: TrackResult) -> ResultRow:
    """What a track comes to when its stems are where they belong, and scored if they can be."""
    scores: Mapping[str, float] = {}
    try:
        scores = courier.scores(visit, result)
    except Exception as error:  # noqa: BLE001 (the stems are there all the same)
        result = replace(result, warnings=(*result.warnings, f"not scored: {error}"))
    try:
        result = courier.deliver(visit, result)
    except Exception as error:
        logger.debug("%s was not delivered", visit.row.path, exc_info=error)
        courier.interrupt(visit)
        told = f"cannot be delivered: {error}"
        result = failed(visit.row, courier.model, told, fault_of(error))
    finally:
        visit.leave()
    return {**answer(result, scores), **courier.named(result)}


def answer(result: TrackResult, scores: Mapping[str, float] | None = None) -> ResultRow:
    """A row of the table of results."""
    return {**result.row(), "fault": result.fault, "scores": dict(scores or {})}
