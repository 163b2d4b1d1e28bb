"""Separate the tracks of manifest rows, and return one result row for each.

Every engine runs the same worker, in any number of processes. An error in a track is not raised,
but reported in its result row.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from demucs_infer.batch.attempts import Run
from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.result import TrackResult, fault_of
from demucs_infer.batch.runner import BatchRunner, map_ahead, open_separator
from demucs_infer.distributed.config import WorkerConfig
from demucs_infer.distributed.manifest import ResultRow, TrackRow
from demucs_infer.distributed.transfer import StagedTrack, Transfer, failure
from demucs_infer.system.storage import is_remote

logger = logging.getLogger(__name__)

# On a CPU, one window runs at a time, and more tracks gain nothing.
_MAX_TRACKS_PER_BATCH = {"cuda": 8}


class TrackWorker:
    """Turns manifest rows into result rows with one model, which the first row loads.

    Download, separation, encoding and upload of different tracks run in parallel.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._batch: BatchRunner | None = None
        self._transfer: Transfer | None = None

    def __call__(self, rows: Iterable[TrackRow]) -> Generator[ResultRow, None, None]:
        """Yield one result per row; tracks in which a worker crashed before come last."""
        try:
            batch, transfer = self.open()
        except Exception as error:
            logger.debug("the model could not be opened", exc_info=error)
            for row in rows:
                yield make_row(failure(row, self._config.model, str(error), "model"))
            return
        crashed: list[TrackRow] = []
        yield from _process(batch, transfer, rows, crashed)
        for row in crashed:  # one at a time, so that a crash is not counted for other tracks
            yield from _process(batch, transfer, [row], None)

    def open(self) -> tuple[BatchRunner, Transfer]:
        """Load the model, unless it is loaded already; errors in loading it are raised."""
        if self._batch is None or self._transfer is None:
            config = self._config
            separator = open_separator(config.model, config.request)
            weights = config.model.weights() or ()
            is_remote_output = is_remote(config.out)
            self._transfer = Transfer(config=config, weights=weights)
            default_tracks = _MAX_TRACKS_PER_BATCH.get(separator.device.type, 1)
            self._batch = BatchRunner(
                separator,
                config.model,
                config.request,
                weights=weights,
                # The transfer finds out what is done, and counts crashes, of remote output.
                skip="nothing" if is_remote_output else config.skip,
                verify=config.verify,
                max_crashes=None if is_remote_output else config.max_crashes,
                run=Run() if is_remote_output else config.run,
                keeps_other_inputs=config.skip != "nothing",
                max_tracks_per_batch=config.max_tracks_per_batch or default_tracks,
                waits_for_others=True,
                keeps_when_full=not is_remote_output,  # scratch folders do not outlive an attempt
            )
        return self._batch, self._transfer


def _process(
    batch: BatchRunner,
    transfer: Transfer,
    rows: Iterable[TrackRow],
    crashed: list[TrackRow] | None,
) -> Iterator[ResultRow]:
    """Yield the results of `rows`, in the order in which they are finished.

    With a list for `crashed`, rows in which a worker crashed before are put there instead.
    """
    tracks: dict[int, StagedTrack] = {}

    def download(row: TrackRow) -> StagedTrack:
        track = transfer.download(row, is_alone=crashed is None)
        if track.job:
            tracks[id(track.job)] = track
        return track

    uploads: deque[Future[ResultRow]] = deque()
    try:
        with (
            ThreadPoolExecutor(1, "demucs-download") as downloader,
            ThreadPoolExecutor(1, "demucs-upload") as uploader,
            closing(batch.run(_jobs(map_ahead(downloader, download, rows), crashed))) as events,
        ):
            for job, event in events:
                if isinstance(event, TrackResult):
                    track = tracks.pop(id(job))
                    uploads.append(uploader.submit(_finish, transfer, track, event))
                    if len(uploads) > 1:
                        yield uploads.popleft().result()
            yield from (future.result() for future in uploads)
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        for track in tracks.values():
            transfer.withdraw(track)
        raise
    finally:
        for track in tracks.values():
            track.remove_scratch()


def _jobs(tracks: Iterable[StagedTrack], crashed: list[TrackRow] | None) -> Iterator[TrackJob]:
    """Yield the jobs of tracks; rows without a job are added to `crashed`."""
    for track in tracks:
        if track.job:
            yield track.job
        elif crashed is not None:
            crashed.append(track.row)


def _finish(transfer: Transfer, track: StagedTrack, result: TrackResult) -> ResultRow:
    """Score and upload the stems of a track; return its result row."""
    scores: Mapping[str, float] = {}
    try:
        scores = transfer.score(track, result)
    except Exception as error:  # noqa: BLE001 (the stems are valid without scores)
        result = replace(result, warnings=(*result.warnings, f"not scored: {error}"))
    try:
        result = transfer.upload(track, result)
    except Exception as error:
        logger.debug("%s was not uploaded", track.row.path, exc_info=error)
        transfer.withdraw(track)
        message = f"cannot be uploaded: {error}"
        result = failure(track.row, transfer.config.model, message, fault_of(error))
    finally:
        track.remove_scratch()
    return {**make_row(result, scores), **transfer.locations(result)}


def make_row(result: TrackResult, scores: Mapping[str, float] | None = None) -> ResultRow:
    """Return a row of the results table."""
    return {**result.row(), "fault": result.fault, "scores": dict(scores or {})}
