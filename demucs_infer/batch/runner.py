"""Many tracks: decode ‖ separate ‖ encode, skip what is done, resume what was interrupted.

A track is never an exception: it ends as a `TrackResult`. Nothing is seen under its final name
before all of it is complete; a manifest beside the stems is written last.

Shapes: C channels, t samples of a block.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeVar

import torch
from torch import Tensor

from demucs_infer.api import Separator
from demucs_infer.audio.channels import convert_channels
from demucs_infer.audio.formats import source_depth
from demucs_infer.audio.gain import write_error
from demucs_infer.audio.reader import TrackReader
from demucs_infer.audio.tags import portable_tags
from demucs_infer.batch.custom_model import CustomModelSpec
from demucs_infer.batch.decoded_cache import DecodedCache
from demucs_infer.batch.delivery import StemWriter
from demucs_infer.batch.discovery import is_stream
from demucs_infer.batch.manifest import Manifest, Recipe, matches
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.batch.result import Fault, TrackResult, fault_of
from demucs_infer.batch.spool import Abandoned, Spool
from demucs_infer.batch.workdir import WorkDir
from demucs_infer.engine.level import Level, measure
from demucs_infer.engine.pipeline import Block, TrackEvent
from demucs_infer.engine.pipeline import Track as EngineTrack
from demucs_infer.engine.stems import choose_stems
from demucs_infer.errors import (
    AudioReadError,
    AudioWriteError,
    DemucsError,
    format_error,
    is_disk_full,
)
from demucs_infer.events import Event, TrackFailed, TrackFinished
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.threads import limit_to_one_thread

logger = logging.getLogger(__name__)

Skip = Literal["same", "existing", "nothing"]

_PATIENCE = 0.2  # seconds between two looks whether another process is still at work
_WRITE_BEHIND = 2  # tracks whose files may still be written while others are separated


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackJob:
    """A track, and where its stems go."""

    source: Path
    target: OutputPaths
    track: str
    """What to call it in a result."""

    known: TrackResult | None = None
    """What has become of it already: then nothing is done but to say so when it is its turn."""

    sha256: str | None = None
    """What the file has to be, if somebody knows."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _PreparedTrack:
    """A track that was read once: all is known that its separation needs."""

    job: TrackJob
    recipe: Recipe
    track: "_DecodedTrack"
    delivery: StemWriter
    resumed: int
    """Samples that an earlier run left in the spool."""

    warnings: tuple[str, ...]
    begun: float


def open_separator(
    model: ModelSpec, order: SeparationRequest, *, device: str = "auto", jobs: int = 0
) -> Separator:
    """The model, ready for the tracks of an order; every mistake about stems is found here."""
    if isinstance(model, CustomModelSpec):
        separator = model.open(order, device=device, jobs=jobs)
    else:
        separator = Separator(
            model.name,
            model.repo,
            device=device,
            shifts=order.shifts,
            overlap=order.overlap,
            split=order.split,
            segment=order.segment,
            jobs=jobs,
            seed=order.seed,
            precision=order.precision,
            batch_size=order.batch_size,
            cache_dir=model.cache_dir,
            offline=model.offline,
            trust=model.trust,
        )
    plan = choose_stems(
        separator.stems,
        stems=order.stems,
        derive=order.derive,
        two_stems=order.two_stems,
        other_method=order.other_method,
    )
    separator.update_parameter(stems=plan)
    separator.free_original_weights()
    return separator


class BatchRunner:
    """Separates tracks with one model, one after the other; files are read and written beside it.

    `weights` are the digests of the model's files, as `ModelSpec.weights` gives them. `skip` says
    what counts as done: stems with a manifest that tells of the same recipe ("same"), any files of
    those names ("existing"), or nothing ("nothing"). A track during which the process died
    `max_crashes` times in the same place ends as `quarantined`; None tries for ever. With a
    `run_id`, only crashes in the run of that id count, so that a new id tries quarantined tracks
    again. Tracks that were at work when it died come after all others, each alone: only one of
    them is to blame.

    Windows of up to `max_tracks_per_batch` tracks share batches of the network. A track at which
    another is at work comes last too; with `waits_for_others`, when they have ended, and then
    there may be nothing left to do. Otherwise it ends as `failed`. What was computed when the disk
    was full stays for the next attempt, if it `keeps_when_full`: where there will be one, in that
    place.
    """

    def __init__(
        self,
        separator: Separator,
        model: ModelSpec,
        order: SeparationRequest,
        *,
        weights: tuple[str, ...] = (),
        skip: Skip = "same",
        writes_manifest: bool = True,
        max_crashes: int | None = None,
        run_id: str = "",
        max_tracks_per_batch: int = 1,
        waits_for_others: bool = False,
        keeps_when_full: bool = True,
    ) -> None:
        self._separator = separator
        self._model = model
        self._order = order
        self._weights = weights
        self._skip = skip
        self._made: set[Path] = set()
        self._writes_manifest = writes_manifest
        self._max_deaths = max_crashes
        self._run_id = run_id
        self._tracks_together = max_tracks_per_batch
        self._waits_for_others = waits_for_others
        self._keeps_when_full = keeps_when_full

    def one(self, job: TrackJob) -> TrackResult:
        """What becomes of one track: never an exception, and little work if it is done already."""
        with closing(self.run([job])) as items:
            return next(item for _, item in items if isinstance(item, TrackResult))

    def run(
        self, jobs: Iterable[TrackJob]
    ) -> Generator[tuple[TrackJob, Event | TrackResult], None, None]:
        """Events, and one result for every track; closing the generator ends the work.

        What was separated by then stays in the spool, and the next run continues there.
        """
        suspects: list[TrackJob] = []
        taken: list[TrackJob] = []
        yield from self._together(self._trusted(jobs, suspects), taken)
        for job in suspects:
            yield from self._together([job], taken)
        for job in taken:  # whoever waits holds nothing that another waits for
            yield from self._together([job], None)

    def _trusted(self, jobs: Iterable[TrackJob], suspects: list[TrackJob]) -> Iterator[TrackJob]:
        """Those during which no process has died; the others become `suspects`."""
        for job in jobs:
            may_kill = self._max_deaths is not None and job.known is None
            if may_kill and self._workplace(job).has_stale_attempt:
                suspects.append(job)
            else:
                yield job

    def _together(
        self, jobs: Iterable[TrackJob], taken: list[TrackJob] | None
    ) -> Generator[tuple[TrackJob, Event | TrackResult], None, None]:
        """One is read, one separated and one written at any time, or a few of each.

        Jobs at which another process or thread is at work are put to `taken`; without such a list
        they are waited for, or fail.
        """
        stop = threading.Event()
        waiting: deque[_PreparedTrack] = deque()
        try:
            yield from self._in_threads(jobs, stop, waiting, taken)
        finally:
            for ready in waiting:  # nothing happened to them
                ready.track.remove()
                ready.delivery.spool.abandon()
                ready.delivery.workplace.leave()

    def _in_threads(
        self,
        jobs: Iterable[TrackJob],
        stop: threading.Event,
        waiting: "deque[_PreparedTrack]",
        taken: list[TrackJob] | None,
    ) -> Generator[tuple[TrackJob, Event | TrackResult], None, None]:
        """In `waiting` are tracks that were read and are not separated yet."""
        writing: deque[_PendingResult] = deque()
        running: dict[int, _PreparedTrack] = {}

        def prepare(job: TrackJob) -> _PreparedTrack | _PendingResult | None:
            ready = self._prepare(job, stop, taken)
            if isinstance(ready, _PreparedTrack):
                waiting.append(ready)
            return ready

        def tracks() -> Iterator[EngineTrack | Exception]:
            """What the network has to hear; of others only that it was their turn."""
            for number, ready in enumerate(ahead(reader, prepare, jobs)):
                if not isinstance(ready, _PreparedTrack):
                    writing.extend([ready] if ready else [])
                    yield Abandoned()
                    continue
                waiting.popleft()
                spool, files = ready.delivery.spool, writers.submit(self._write, ready)
                writing.append(_PendingResult(ready.job, files, spool))
                if spool.frames < ready.track.level.length:
                    running[number] = ready
                    yield ready.track
                else:
                    spool.finish()
                    yield Abandoned()

        # Every track whose samples may still come has a thread that waits for them, so that none
        # of those that are complete waits for a thread.
        threads = _WRITE_BEHIND + self._tracks_together + self._separator.jobs
        with (
            ThreadPoolExecutor(1, "demucs-read", limit_to_one_thread) as reader,
            ThreadPoolExecutor(threads, "demucs-write", limit_to_one_thread) as writers,
        ):
            try:
                stream = self._separator.stream_blocks_many(
                    tracks(), max_tracks_per_batch=self._tracks_together
                )
                with closing(stream):
                    for number, item in stream:
                        yield from self._heard(number, item, running)
                        yield from _written(writing, leave=_WRITE_BEHIND - 1)
                yield from _written(writing, leave=0)
            finally:
                stop.set()
                for ending in writing:
                    if ending.spool:
                        ending.spool.abandon()

    # ── before the network ──

    def _prepare(
        self, job: TrackJob, stop: threading.Event, taken: list[TrackJob] | None
    ) -> "_PreparedTrack | _PendingResult | None":
        """All that can be known beforehand, or the end of the track; None: it went to `taken`."""
        begun = perf_counter()
        try:
            if job.known:
                raise _AlreadyDone(job.known)
            return self._opened(job, stop, begun, may_wait=taken is None)
        except _AlreadyDone as settled:
            result = settled.result
        except _Locked as error:
            if taken is not None:
                taken.append(job)
                return None
            result = self._failed(job, error, begun)
        except Exception as error:  # noqa: BLE001 (a track is never an exception)
            result = self._failed(job, error, begun)
        known: Future[TrackResult] = Future()
        known.set_result(result)
        return _PendingResult(job, known)

    def _opened(
        self, job: TrackJob, stop: threading.Event, begun: float, *, may_wait: bool
    ) -> _PreparedTrack:
        stamp = _stamp(job.source)
        recipe = self._new_recipe(job, stop)
        self._refuse_folders(job)
        workplace = self._entered(job, recipe, stop, may_wait=may_wait)
        spool: Spool | None = None
        try:
            decoded = DecodedCache(workplace.folder, self._separator.audio_channels)
            decoded.remove()  # what an attempt left that died, whether another one follows or not
            # From here on the journal knows: a decoder can kill its process as a network can.
            spool = self._begun(job, workplace)
            track = self._track(job)
            with closing(decoded.kept(track.blocks())) as blocks:
                level = measure(_until(stop, blocks))
            if _stamp(job.source) != stamp:
                raise AudioReadError("changed while it was read: try again once it is complete")
            delivery = self._delivery(job, track, workplace, spool)
        except Exception as error:
            if spool:
                spool.abandon()
            if isinstance(error, _AlreadyDone):
                workplace.close()
            elif isinstance(error, Abandoned):
                workplace.leave()
            else:
                error = self._given_up(job, workplace, spool, error)
            raise error
        return _PreparedTrack(
            job=job,
            recipe=recipe,
            track=_DecodedTrack(decoded, level, track.channels, spool.frames),
            delivery=delivery,
            resumed=spool.frames,
            warnings=(*track.warnings, *self._another_rate(delivery)),
            begun=begun,
        )

    def _another_rate(self, delivery: StemWriter) -> Iterator[str]:
        """A warning, if a rate was asked for that the format has not."""
        written = delivery.encoding.kind.rate_for(delivery.rate)
        if isinstance(self._order.rate, int) and written != delivery.rate:
            yield f"{delivery.encoding.format} has no {delivery.rate} Hz: written with {written} Hz"

    def _track(self, job: TrackJob) -> TrackReader:
        order, separator = self._order, self._separator
        return TrackReader(
            job.source,
            sample_rate=separator.samplerate,
            channels=separator.audio_channels,
            start_seconds=order.start,
            duration_seconds=order.duration,
            strict=order.strict,
        )

    def _begun(self, job: TrackJob, workplace: WorkDir) -> Spool:
        """What earlier attempts left, and the next one in the journal, unless it is one too many.

        A track that is left out stays so, until its folder in `.partial` is removed, or a run with
        another `run_id` tries it again.
        """
        separator = self._separator
        spool = Spool(workplace.folder, len(separator.stems), separator.audio_channels)
        crash_count = workplace.crash_count(spool.frames)
        if self._max_deaths is not None and crash_count >= self._max_deaths:
            spool.abandon()
            times = f"{crash_count} times" if crash_count > 1 else "once"
            error = f"its process crashed {times}; to try it again, remove {workplace.folder}"
            raise _AlreadyDone(self._bad(job, "quarantined", error, "other"))
        workplace.begin(spool.frames)
        return spool

    def _new_recipe(self, job: TrackJob, stop: threading.Event) -> Recipe:
        """The recipe of what is not done yet; otherwise the track is settled."""
        paths = job.target.stems(self._separator.stems)
        if self._skip == "existing" and all(path.is_file() for path in paths.values()):
            result = TrackResult(
                track=job.track, status="skipped", model=self._model.name, stems=paths
            )
            raise _AlreadyDone(result)
        if is_stream(job.source):
            raise AudioReadError(
                "cannot be read: it is a pipe or a device; save it as a file first"
            )
        try:
            digest = sha256_file(job.source, partial(_go_on, stop))
        except OSError as error:
            raise AudioReadError(f"cannot be read: {error.strerror or error}") from error
        if job.sha256 not in (None, digest):
            raise AudioReadError(f"is another file than was listed: {digest}, not {job.sha256}")
        recipe = self._order.recipe(digest, self._model, self._weights)
        done = self._done(job, recipe)
        if done:
            self._workplace(job).clear()
            raise _AlreadyDone(done)
        return recipe

    def _refuse_folders(self, job: TrackJob) -> None:
        """Before any work: a file cannot take the name of a folder, and half a commit is none."""
        for path in (*job.target.stems(self._separator.stems).values(), job.target.manifest):
            if path.is_dir():
                raise AudioWriteError(f"cannot write {path}: there is a folder; move it away")

    def _done(self, job: TrackJob, recipe: Recipe) -> TrackResult | None:
        found = matches(job.target.manifest, recipe) if self._skip == "same" else None
        return TrackResult.skipped(job.track, job.target.manifest, found) if found else None

    def _workplace(self, job: TrackJob) -> WorkDir:
        return WorkDir(job.target.folder, job.target.manifest, self._made, self._run_id)

    def _entered(
        self, job: TrackJob, recipe: Recipe, stop: threading.Event, *, may_wait: bool
    ) -> WorkDir:
        workplace = self._workplace(job)
        while not workplace.enter(recipe.key):
            if not (may_wait and self._waits_for_others):
                raise _Locked("another process is at work on this track: let it finish")
            if stop.wait(_PATIENCE):
                raise Abandoned
        done = self._done(job, recipe)  # by whoever was here before
        if done:
            workplace.remove()
            raise _AlreadyDone(done)
        return workplace

    def _delivery(
        self, job: TrackJob, track: TrackReader, workplace: WorkDir, spool: Spool
    ) -> StemWriter:
        order, info, separator = self._order, track.info, self._separator
        rates = {"model": separator.samplerate, "source": info.sample_rate}
        counts = {"model": separator.audio_channels, "source": info.channels}
        channels = _chosen(order.channels, counts)
        try:
            convert_channels(torch.zeros(separator.audio_channels, 1), channels)
        except ValueError as error:
            asked = f"channels={order.channels}: the track has {info.channels}, and the model makes"
            raise ValueError(f"{asked} {separator.audio_channels}: {error}") from error
        bits = source_depth(info.bits, is_float=info.is_float, format=order.format)
        stems = separator.stems
        return StemWriter(
            paths=job.target.stems(stems),
            workplace=workplace,
            spool=spool,
            encoding=order.encoding(bits),
            clip=order.clip,
            spool_rate=separator.samplerate,
            rate=_chosen(order.rate, rates),
            channels=channels,
            frames=track.reader.frames if order.rate == "source" else None,
            tags={stem: portable_tags(info.tags, f" ({stem})") for stem in stems}
            if order.tags
            else {},
            cover=info.cover if order.tags else None,
        )

    # ── the network ──

    def _heard(
        self, number: int, item: TrackEvent, running: dict[int, _PreparedTrack]
    ) -> Iterator[tuple[TrackJob, Event | TrackResult]]:
        """Put what came from the network into the spool; whoever writes the files follows."""
        ready = running.get(number)
        if ready is None:
            return
        spool = ready.delivery.spool
        if isinstance(item, TrackFinished | TrackFailed):
            del running[number]
            spool.finish() if isinstance(item, TrackFinished) else spool.fail(item.error)
        elif not isinstance(item, Block):
            yield ready.job, item
        elif spool.is_over:  # the files could not be written
            ready.track.leave()
        else:
            try:
                spool.append(item.stems)
            except Exception as error:  # noqa: BLE001 (a track is never an exception)
                spool.fail(error)

    # ── after it ──

    def _write(self, ready: _PreparedTrack) -> TrackResult:
        """The files of a track whose spool is being filled, and what to say of it."""
        job, delivery = ready.job, ready.delivery
        try:
            gains = delivery.encode()
            manifest = self._manifest(ready, gains)
            delivery.commit(manifest if self._writes_manifest else None, job.target.manifest)
            return TrackResult.done(job.track, job.target.manifest, manifest, self._writes_manifest)
        except Abandoned:
            delivery.workplace.leave()
            return self._bad(job, "failed", "interrupted", "other")
        except Exception as error:  # noqa: BLE001 (a track is never an exception)
            delivery.spool.abandon()
            told = self._given_up(job, delivery.workplace, delivery.spool, error)
            return self._failed(job, told, ready.begun)

    def _manifest(self, ready: _PreparedTrack, gains: dict[str, float]) -> Manifest:
        delivery, rate = ready.delivery, self._separator.samplerate
        return Manifest(
            input=str(ready.job.source),
            recipe=ready.recipe,
            stems=delivery.described(ready.job.target.manifest, gains),
            sample_rate=delivery.encoding.kind.rate_for(delivery.rate),
            channels=delivery.channels,
            duration_seconds=ready.track.level.length / rate,
            resumed_seconds=ready.resumed / rate,
            gain=min(gains.values()),
            warnings=ready.warnings,
            seconds=perf_counter() - ready.begun,
            device=str(self._separator.device),
        )

    def _failed(self, job: TrackJob, error: Exception, begun: float) -> TrackResult:
        logger.debug("%s failed", job.track, exc_info=error)
        fault = fault_of(error)
        if isinstance(error, OSError):  # what was read is an AudioReadError, whatever went wrong
            error = write_error(str(job.target.folder), error)
        return self._bad(job, "failed", format_error(error), fault, perf_counter() - begun)

    def _given_up(
        self, job: TrackJob, workplace: WorkDir, spool: Spool | None, error: Exception
    ) -> Exception:
        """Clear up after an error; a full disk is no reason to lose hours of work."""
        is_worth_it = self._keeps_when_full and spool is not None and spool.frames > 0
        if not is_worth_it or not is_disk_full(error):
            workplace.remove()
            return error
        workplace.leave()
        told = write_error(str(job.target.folder), error) if isinstance(error, OSError) else error
        kept = AudioWriteError(f"{told}; the next attempt goes on from here")
        kept.__cause__ = error
        return kept

    def _bad(
        self,
        job: TrackJob,
        status: Literal["failed", "quarantined"],
        error: str,
        fault: Fault,
        seconds: float = 0.0,
    ) -> TrackResult:
        return TrackResult(
            track=job.track,
            status=status,
            model=self._model.name,
            error=error,
            fault=fault,
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _PendingResult:
    """A track that the network is done with, or never has to see."""

    job: TrackJob
    result: Future[TrackResult]
    spool: Spool | None = None

    @property
    def is_over(self) -> bool:
        """Whether the network has nothing more to do with it."""
        return self.spool is None or self.spool.is_over


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What a file has another of once it is another, or was written to."""
    try:
        found = path.stat()
    except OSError:  # whoever reads it says why
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Locked(DemucsError):
    """Another process, or another thread, is at work on the track."""


class _AlreadyDone(Exception):
    """A track is over before it began."""

    def __init__(self, result: TrackResult) -> None:
        super().__init__(result.status)
        self.result = result


class _DecodedTrack:
    """The engine's track: decoded before, its level known, what was separated before left out."""

    def __init__(self, decoded: DecodedCache, level: Level, channels: int, first: int) -> None:
        self.channels = channels
        self.level = level
        self.length = level.length
        self.first = first
        self._decoded = decoded
        self._left = threading.Event()

    def leave(self) -> None:
        """Nobody needs the stems any more: whoever takes the blocks gets an error."""
        self._left.set()

    def blocks(self) -> Iterator[Tensor]:
        """The samples from the first on, unless nobody needs them any more: (C t)."""
        with closing(self._decoded.blocks()) as blocks:
            yield from _until(self._left, blocks)

    def remove(self) -> None:
        """It will not be separated."""
        self._decoded.remove()


Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(
    pool: ThreadPoolExecutor, make: Callable[[Given], Made], given: Iterable[Given]
) -> Iterator[Made]:
    """`make` of everything given, the next one being made while one is used."""
    waiting: deque[Future[Made]] = deque()
    for item in given:
        waiting.append(pool.submit(make, item))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def _written(
    writing: deque[_PendingResult], *, leave: int
) -> Iterator[tuple[TrackJob, TrackResult]]:
    """The results that are there, in order of the tracks' beginning.

    Waits for them while the network is done with more than `leave` tracks that have none.
    """
    while writing and writing[0].is_over:
        if sum(ending.is_over for ending in writing) <= leave and not writing[0].result.done():
            return
        result = writing[0].result.result()
        yield writing.popleft().job, result


def _until(stop: threading.Event, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same blocks, unless all work is to end."""
    for block in blocks:
        _go_on(stop)
        yield block


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise Abandoned


def _chosen(wanted: int | str, known: dict[str, int]) -> int:
    return wanted if isinstance(wanted, int) else known[wanted]
