"""Who waits, who is at work, and what became of it; no HTTP, and all of it on the event loop.

Work is done by `work.ModelWorker` threads; what they have to say comes here through `_post`.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import anyio

from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.result import TrackResult
from demucs_infer.engine.stems import choose_stems
from demucs_infer.errors import ConfigError, ModelNotFound
from demucs_infer.events import ChunkProcessed, Event, Stage, event_to_json
from demucs_infer.pretrained import list_models, model_info
from demucs_infer.server.cache import CachedStems, ResultCache
from demucs_infer.server.errors import ApiError, no_room
from demucs_infer.server.model_pool import ModelPool, models_of
from demucs_infer.server.schemas import SeparateRequest, read_wish
from demucs_infer.server.settings import ServerSettings
from demucs_infer.server.store import JobRecord, JobStore
from demucs_infer.server.uploads import Upload
from demucs_infer.server.worker import (
    Cancelled,
    ModelWorker,
    Stopped,
    WorkItem,
    check_length,
    separate,
)

logger = logging.getLogger(__name__)

USUAL = ("htdemucs", "htdemucs_ft", "htdemucs_6s", "hdemucs_mmi", "mdx_extra")
_PATIENCE = 15.0
_REMEMBERED = 256
"""Jobs that are over whose events are still told; of older ones only the end is known."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A track on its way."""

    row: JobRecord
    task: WorkItem
    lasts: bool
    """Whether it outlives the request that made it, and the process."""

    ticket: "Slot | None" = None
    events: list[dict[str, Any]] = field(default_factory=list)
    fraction: float = 0.0
    stage: str = ""
    began: float | None = None
    refused: ApiError | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self) -> None:
        """Wake whoever waits for news."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def news(self) -> None:
        """Wait until something happens."""
        await self._changed.wait()

    async def over(self) -> None:
        """Wait for the end."""
        while not self.row.is_over:
            await self.news()

    @property
    def seconds_left(self) -> float | None:
        """An estimate, from how long the part that is done took."""
        if self.began is None or not 0 < self.fraction < 1:
            return None
        return (time.monotonic() - self.began) * (1 - self.fraction) / self.fraction


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the bounded queue."""

    client: str
    give_back: Callable[["Slot"], None]
    is_held: bool = True

    def release(self) -> None:
        """Leave it to somebody else."""
        if self.is_held:
            self.is_held = False
            self.give_back(self)


class JobQueue:
    """The queue, its workers and its results."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.uploads = settings.data_dir / "uploads"
        base = ModelSpec(repo=settings.repo, cache_dir=settings.cache_dir, offline=settings.offline)
        self.models = models_of(base, _names(settings))
        self.stems: dict[str, tuple[str, ...] | None] = {
            name: _known_stems(name, base) for name in self.models
        }
        self.results = ResultCache(
            settings.data_dir / "results", settings.max_store_bytes, settings.keep_seconds
        )
        self.is_ready = False
        self.is_stopping = False
        self.problem = ""
        """Why the first model could not be loaded."""

        self.counts: Counter[str] = Counter()
        self.seconds_of_audio = 0.0
        self._live: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[Job] = deque()
        self._running: dict[ModelWorker, Job] = {}
        self._tickets: Counter[str] = Counter()
        self._weights: dict[str, tuple[str, ...]] = {}
        self._recent: deque[float] = deque([30.0], maxlen=20)
        self._workers: list[ModelWorker] = []
        self._idle: list[ModelWorker] = []

    # ── life ──

    async def start(self) -> None:
        """Take up what an earlier process left, and begin."""
        self._loop = asyncio.get_running_loop()
        for folder in (self.uploads, self.results.root):
            folder.mkdir(parents=True, exist_ok=True)
        self._store = JobStore(self.settings.data_dir / "jobs.sqlite")
        for device in self.settings.devices:
            pool = ModelPool(device, self.settings.model_memory_bytes, self._loaded)
            worker = ModelWorker(pool)
            worker.start()
            self._workers.append(worker)
            self._warm_up(worker)
        self._recover()
        self._tidying = asyncio.create_task(self._tidy_forever())

    async def stop(self) -> None:
        """End within a batch; jobs that last are there when the next process starts."""
        self.drain()
        self._tidying.cancel()
        with suppress(asyncio.CancelledError):
            await self._tidying
        for job in self._running.values():
            job.task.stop.set()
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)
        await asyncio.sleep(0)  # for what they said last
        for job in [*self._waiting, *self._running.values()]:
            if not job.lasts:
                job.task.source.unlink(missing_ok=True)
        self._store.close()

    def drain(self) -> None:
        """Take nothing more, and let those who watch go."""
        self.is_stopping = True
        for job in self._live.values():
            job.change()

    def _loaded(self, name: str, stems: tuple[str, ...]) -> None:
        self._post(lambda: self.stems.update({name: stems}))
        self._post(lambda: self.counts.update(["loaded"]))

    def _warm_up(self, worker: ModelWorker) -> None:
        first = next(iter(self.models.values()))
        if not self.settings.warmup:
            self.is_ready = True
            self._idle.append(worker)
            return

        def work(pool: ModelPool) -> None:
            try:
                pool.warm_up(first)
                self._post(lambda: self._warm(worker))
            except Exception as error:  # noqa: BLE001 (the server lives, and says what is wrong)
                logger.error("%s could not be loaded: %s", first.name, error)
                problem = f"the model {first.name!r} could not be loaded"
                self._post(lambda: self._warm(worker, problem))

        worker.give(work)

    def _warm(self, worker: ModelWorker, problem: str = "") -> None:
        self.problem = problem
        self.is_ready = self.is_ready or not problem
        self._idle.append(worker)
        self._dispatch()

    def _recover(self) -> None:
        wanted = set()
        for row in self._store.unfinished():
            path = self.uploads / row.upload
            try:
                job = self._job(row.but(status="queued"), read_wish(row.wish), path, lasts=True)
            except ApiError as refused:  # its model is no longer served
                self._store.put(_failed(row, refused))
                continue
            if not path.is_file():
                self._store.put(_failed(row, ApiError(500, "failed", "the upload was lost")))
                continue
            wanted.add(path)
            job.task.weights = self._weights_of(job.task.model)
            job.ticket = self._ticket("recovered")
            self._remember(job)
            self._enqueue(job)
        for path in self.uploads.iterdir():
            if path not in wanted:
                path.unlink()

    # ── coming in ──

    def admit(self, client: str) -> Slot:
        """A place in the queue, before anything is read; `ApiError` if there is none."""
        if self.is_stopping:
            raise ApiError(503, "stopping", "the server is about to stop", 30)
        if self._tickets.total() >= self.settings.max_queue:
            raise ApiError(503, "busy", "too many requests wait already", self._wait())
        most = self.settings.max_per_client
        if most and self._tickets[client] >= most:
            raise ApiError(429, "too_many", f"you have {most} requests here already", self._wait())
        return self._ticket(client)

    def _ticket(self, client: str) -> Slot:
        self._tickets[client] += 1
        return Slot(client, self._returned)

    def _returned(self, ticket: Slot) -> None:
        self._tickets[ticket.client] -= 1
        self._tickets += Counter()  # forgets who has none

    def _wait(self) -> int:
        """Seconds until a place may be free."""
        each = sum(self._recent) / len(self._recent)
        return min(max(round(each / len(self.settings.devices)), 1), 600)

    async def submit(
        self, upload: Upload, wish: SeparateRequest, *, ticket: Slot | None = None
    ) -> Job:
        """A job for an upload, which is its from here on; with a ticket, one that lasts."""
        row = JobRecord(
            id=token_hex(16),
            status="queued",
            created=time.time(),
            name=upload.name,
            sha256=upload.sha256,
            size=upload.size,
            upload=upload.path.name,
            wish=wish.model_dump(exclude_defaults=True),
        )
        try:
            job = self._job(row, wish, upload.path, lasts=ticket is not None)
            await asyncio.to_thread(self._look, job, wish.no_cache)
            if job.lasts and not self._store.put(job.row):
                raise no_room()
        except BaseException:
            self._live.pop(row.id, None)
            upload.path.unlink(missing_ok=True)
            raise
        job.ticket = ticket
        if job.row.is_cached:
            self.counts["cached"] += 1
            self._end(job, "done")
        else:
            self._enqueue(job)
        return job

    def _job(self, row: JobRecord, wish: SeparateRequest, path: Path, *, lasts: bool) -> Job:
        settings = self.settings
        order = wish.order(
            max_passes=settings.max_passes, max_duration_seconds=settings.max_duration_seconds
        )
        task = WorkItem(
            source=path,
            name=row.name,
            target=self.results.target(row.entry or row.id, order.extension),
            model=self.model(wish.model),
            order=order,
            weights=(),
            seconds=settings.job_seconds,
            max_duration_seconds=settings.max_duration_seconds,
        )
        job = Job(row=row, task=task, lasts=lasts)
        self._live[row.id] = job
        self._forget()
        return job

    def model(self, name: str | None) -> ModelSpec:
        """The model of that name, the first without one; `ApiError` if it is not served."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            message = f"no model {name!r}; there are {', '.join(self.models)}"
            raise ApiError(422, "unknown_model", message)
        return self.models[name]

    def outputs(self, wish: SeparateRequest) -> tuple[str, ...] | None:
        """The stems that a wish comes to, if those of its model are known yet."""
        self.model(wish.model)
        sources = self.stems[wish.model or next(iter(self.models))]
        if sources is None:
            return None
        try:
            plan = choose_stems(
                sources,
                stems=wish.stems,
                derive=wish.derive,
                two_stems=wish.two_stems,
                other_method=wish.other_method,
            )
        except ValueError as error:
            raise ApiError(422, "invalid_parameters", str(error)) from error
        return plan.outputs

    def _look(self, job: Job, no_cache: bool) -> None:
        """All that can be known before the network is asked; on a thread of its own."""
        task = job.task
        check_length(task.source, task.name, task.order, task.max_duration_seconds)
        task.weights = self._weights_of(task.model)
        recipe = task.order.recipe(job.row.sha256, task.model, task.weights)
        entry = recipe.key if not no_cache else f"{recipe.key}-{job.row.id}"
        is_cached = self.results.find(recipe, entry) is not None
        job.row = job.row.but(entry=entry, is_cached=is_cached)
        task.target = self.results.target(entry, task.order.extension)

    def _weights_of(self, model: ModelSpec) -> tuple[str, ...]:
        if model.name not in self._weights:
            self._weights[model.name] = model.weights() or ()
        return self._weights[model.name]

    def _enqueue(self, job: Job) -> None:
        self._waiting.append(job)
        self._dispatch()

    # ── at work ──

    def _dispatch(self) -> None:
        """Give every idle worker the first job whose stems nobody else is making."""
        while self._idle and not self.is_stopping:
            busy = {job.row.entry for job in self._running.values()}
            job = next((one for one in self._waiting if one.row.entry not in busy), None)
            if job is None:
                return
            self._waiting.remove(job)
            self._begin(self._idle.pop(), job)

    def _begin(self, worker: ModelWorker, job: Job) -> None:
        self._running[worker] = job
        job.began = time.monotonic()
        job.row = job.row.but(status="running", attempts=job.row.attempts + 1)
        self._remember(job)
        job.change()

        def work(pool: ModelPool) -> None:
            outcome: TrackResult | Exception
            try:
                outcome = separate(
                    job.task, pool, lambda event: self._post(lambda: self._heard(job, event))
                )
            except Exception as error:  # noqa: BLE001 (told to whoever waits)
                outcome = error
            if isinstance(outcome, ApiError | Cancelled):
                self.results.remove(job.row.entry)
            self._post(lambda: self._done(worker, job, outcome))

        worker.give(work)

    def _post(self, what: Callable[[], None]) -> None:
        """Have `what` done on the event loop, if there is one still."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)

    def _heard(self, job: Job, event: Event) -> None:
        if isinstance(event, ChunkProcessed):
            job.fraction = event.fraction
        elif isinstance(event, Stage.Started):
            job.stage = event.stage
        job.events.append(event_to_json(event))
        job.change()

    def _done(self, worker: ModelWorker, job: Job, outcome: TrackResult | Exception) -> None:
        del self._running[worker]
        self._idle.append(worker)
        if isinstance(outcome, Stopped):
            return  # it stays as it is for the next process
        seconds = time.monotonic() - (job.began or 0)
        job.row = job.row.but(seconds=seconds)
        if isinstance(outcome, TrackResult):
            self._recent.append(seconds)
            self.seconds_of_audio += outcome.duration_seconds
            self.is_ready = True
            job.row = job.row.but(warnings=tuple(outcome.warnings))
            self._end(job, "done")
        elif isinstance(outcome, Cancelled):
            self._end(job, "cancelled")
        else:
            self._end(job, "failed", _as_refused(outcome))
        self._dispatch()

    def _end(self, job: Job, status: Any, refused: ApiError | None = None) -> None:
        job.refused = refused
        job.fraction = 1.0 if status == "done" else job.fraction
        error = None if refused is None else refused.as_json()["error"]
        job.row = job.row.but(status=status, finished=time.time(), error=error)
        job.task.source.unlink(missing_ok=True)
        self.counts[status] += 1
        self._remember(job)
        if job.ticket:
            job.ticket.release()
        if not job.lasts:
            self._live.pop(job.row.id, None)
        job.change()

    def _remember(self, job: Job) -> None:
        if job.lasts:  # on a full disk it goes on all the same
            self._store.put(job.row)

    def _forget(self) -> None:
        """Let the events of jobs go that are long over."""
        for id, job in list(self._live.items()):
            if len(self._live) <= _REMEMBERED:
                return
            if job.row.is_over:
                del self._live[id]

    # ── asking ──

    def row(self, id: str) -> JobRecord:
        """What is known of a job; `ApiError` if there is none."""
        job = self._live.get(id)
        found = job.row if job else self._store.get(id)
        if found is None or (job and not job.lasts):
            raise ApiError(404, "no_such_job", "there is no job of that id; it may have expired")
        return found

    def live(self, id: str) -> Job | None:
        """The job itself, unless it was over long ago."""
        return self._live.get(id)

    def position(self, id: str) -> int | None:
        """How many jobs are before this one."""
        for number, job in enumerate(self._waiting):
            if job.row.id == id:
                return number + len(self._running)
        return None

    def entry(self, row: JobRecord) -> CachedStems:
        """The stems of a job that is done; `ApiError` if they are not, or not any more."""
        if row.status in ("queued", "running"):
            raise ApiError(409, "not_done", "the job is not done yet", 1)
        if row.status != "done":
            raise ApiError(409, row.status, f"the job has no stems: it is {row.status}")
        found = self.results.open(row.entry)
        if found is None:
            raise ApiError(410, "expired", "the stems of this job are gone; send the track again")
        return found

    async def watch(
        self, job: Job, after: int = 0
    ) -> AsyncIterator[tuple[int, dict[str, Any] | None]]:
        """Every event with its number, from the one behind `after` until the job is over.

        None now and then while nothing happens, so that nobody takes the line for dead.
        """
        number = after
        while True:
            for event in job.events[number:]:
                number += 1
                yield number, event
            if job.row.is_over or self.is_stopping:
                return
            with anyio.move_on_after(_PATIENCE) as scope:
                await job.news()
            if scope.cancelled_caught:
                yield number, None

    def cancel(self, id: str) -> JobRecord | None:
        """End a job within a batch; one that is over is forgotten, and None."""
        row, job = self.row(id), self._live.get(id)
        if row.is_over or job is None:
            self._live.pop(id, None)
            self._store.remove(id)
            if row.entry.endswith(row.id):  # made for this job alone
                self.results.remove(row.entry)
            return None
        self.abandon(job)
        return job.row

    def abandon(self, job: Job) -> None:
        """End a job that nobody waits for, within a batch."""
        if job.row.is_over:
            return
        job.task.cancel.set()
        if job in self._waiting:
            self._waiting.remove(job)
            self._end(job, "cancelled")

    # ── tidying ──

    @property
    def depth(self) -> tuple[int, int]:
        """(How many wait, how many are at work)."""
        return len(self._waiting), len(self._running)

    async def tidy(self) -> None:
        """Forget jobs and results whose time is over, or for which there is no room."""
        limit = time.time() - self.settings.keep_seconds
        rows = self._store.finished()
        for row in rows:
            if row.finished is not None and row.finished < limit:
                self._store.remove(row.id)
                self._live.pop(row.id, None)
                if row.entry.endswith(row.id):
                    self.results.remove(row.entry)
        promised = {row.entry for row in rows if (row.finished or 0) >= limit}
        busy = {job.row.entry for job in [*self._running.values(), *self._waiting]}
        await asyncio.to_thread(self.results.tidy, busy, promised)

    async def _tidy_forever(self) -> None:
        while True:
            await asyncio.sleep(min(max(self.settings.keep_seconds / 4, 1), 60))
            await self.tidy()


def _as_refused(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    logger.error("a job failed", exc_info=error)
    return ApiError(500, "failed", "the separation failed; the log of the server says why")


def _failed(row: JobRecord, refused: ApiError) -> JobRecord:
    error = refused.as_json()["error"]
    return row.but(status="failed", finished=time.time(), error=error)


def _names(settings: ServerSettings) -> tuple[str, ...]:
    """The models that may be asked for; a `ConfigError` if there are none."""
    if settings.repo is not None:
        found = list_models(settings.repo)
        known = {**found["bag"], **found["single"]}
        names = settings.models or tuple(known)
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise ConfigError(f"repo has no model {', '.join(missing) or 'at all'}")
        return names
    names = settings.models or USUAL
    try:
        for name in names:
            if not name.startswith("hf://") and not Path(name).is_file():
                model_info(name)
    except ModelNotFound as error:
        raise ConfigError(f"models: {error}") from error
    return names


def _known_stems(name: str, base: ModelSpec) -> tuple[str, ...] | None:
    if base.repo is not None:
        return None
    try:
        return model_info(name).stems
    except ModelNotFound:
        return None
