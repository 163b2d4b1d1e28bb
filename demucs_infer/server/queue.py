"""The queue of waiting and running jobs, with their events and results, independent of HTTP.

Everything here runs on the event loop. `worker.ModelWorker` threads do the work, and report back
through `JobQueue._call_soon`.
"""

import asyncio
import logging
import math
import sqlite3
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import anyio

from demucs_infer.batch.request import ModelSpec, make_recipe
from demucs_infer.batch.result import TrackResult
from demucs_infer.checkpoints.catalog import split_bag
from demucs_infer.engine.stems import plan_stems
from demucs_infer.engine.window_pool import WindowPool
from demucs_infer.errors import ConfigError, ModelLoadingError, ModelNotFound, format_error
from demucs_infer.events import ChunkProcessed, Event, Stage, event_to_json
from demucs_infer.pretrained import list_models, model_info
from demucs_infer.server.admission import Admission, Slot
from demucs_infer.server.cache import CachedStems, ResultCache
from demucs_infer.server.errors import (
    ApiError,
    disk_full,
    from_exception,
    model_unavailable,
    no_such_job,
)
from demucs_infer.server.model_pool import ModelPool
from demucs_infer.server.preview import FilePreview, LivePreview, Preview
from demucs_infer.server.remote_files import NO_TARGETS, JobTargets, RemoteFiles
from demucs_infer.server.schemas import SeparateRequest, parse_request
from demucs_infer.server.settings import ServerSettings
from demucs_infer.server.sharing import SharedIds
from demucs_infer.server.store import JobRecord, JobStore, Status
from demucs_infer.server.uploads import Upload, remove_upload
from demucs_infer.server.webhooks import Webhooks
from demucs_infer.server.worker import (
    JobCancelled,
    ModelWorker,
    WorkerStopped,
    WorkItem,
    check_duration,
    separate,
)

logger = logging.getLogger(__name__)

DEFAULT_MODELS = ("htdemucs", "htdemucs_ft", "htdemucs_6s", "hdemucs_mmi", "mdx_extra")
_KEEP_ALIVE_SECONDS = 15.0
_POLL_SECONDS = 0.05
_MAX_JOBS_IN_MEMORY = 256
"""Above this, finished jobs are dropped from memory, and their events with them."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A track that waits, is being separated, or has finished."""

    record: JobRecord
    item: WorkItem
    is_persistent: bool
    """Whether the job continues after the request that created it, and after a restart."""

    slot: Slot | None = None
    live: LivePreview | None = None
    """The stems while they are made."""

    events: list[dict[str, Any]] = field(default_factory=list)
    fraction: float = 0.0
    stage: str = ""
    started_at: float | None = None
    error: ApiError | None = None
    _updated: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wake everything that waits for an update."""
        self._updated.set()
        self._updated = asyncio.Event()

    async def wait_for_update(self) -> None:
        """Wait for an event or a change of status."""
        await self._updated.wait()

    @property
    def seconds_left(self) -> float | None:
        """The estimated time left, from how long the finished part took."""
        if self.started_at is None or not 0 < self.fraction < 1:
            return None
        return (time.monotonic() - self.started_at) * (1 - self.fraction) / self.fraction


class JobQueue:
    """The queue, its workers and its results."""

    shared_ids: SharedIds | None = None
    """The ids of links to finished jobs, if they are allowed."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.uploads = settings.data_dir / "uploads"
        base = ModelSpec(repo=settings.repo, cache_dir=settings.cache_dir, offline=settings.offline)
        self.models = {name: replace(base, name=name) for name in _list_model_names(settings)}
        self.model_stems: dict[str, tuple[str, ...] | None] = {
            name: _find_catalog_stems(name, base) for name in self.models
        }
        self.results = ResultCache(
            settings.data_dir / "results", settings.max_store_bytes, settings.keep_seconds
        )
        self.admission = Admission(
            max_queue=settings.max_queue,
            max_per_client=settings.max_per_client,
            min_upload_rate=settings.min_upload_rate,
            max_upload_seconds=settings.upload_seconds,
            estimate_wait=self._estimate_wait,
        )
        self._is_loaded = False
        self.is_stopping = False
        self.stop_at = math.inf
        """Time at which running requests are refused, on the clock of `time.monotonic`."""

        self.load_error = ""
        """Why the first model could not be loaded."""

        self.remote = RemoteFiles(settings)
        self.webhooks = Webhooks(
            settings.data_dir / "webhooks",
            self.remote.clients["webhook"],
            settings.read_webhook_secret(),
        )
        self.describe: Callable[[JobRecord], str] = lambda _: "{}"
        """Returns the JSON of a job, for webhooks."""

        self.on_wait: Callable[[float], None] = lambda _: None
        """Called with the seconds that each job has waited."""

        self.on_separated: Callable[[float, float], None] = lambda _, __: None
        """Called with the duration of each track, and the processing time."""

        self.counts: Counter[str] = Counter()
        self.loaded: Counter[str] = Counter()
        """On how many devices each model is loaded."""

        self.audio_seconds = 0.0
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[Job] = deque()
        self._running: dict[ModelWorker, Job] = {}
        self._copying: dict[Job, asyncio.Task[None]] = {}
        """Jobs whose stems are being copied to their output."""

        self._weights: dict[str, tuple[str, ...]] = {}
        self._recent_seconds: deque[float] = deque([30.0], maxlen=20)
        self.on_batch: Callable[[int], None] = lambda _: None
        """Called with the number of windows of each batch, from any thread."""

        self._turns: dict[str, float] = {}
        """When a job of each client was started last, while the client has jobs."""

        self._pools: list[ModelPool] = []
        self._workers: list[ModelWorker] = []
        """On each device as many as tracks are separated at a time."""

        self._idle: list[ModelWorker] = []

    @property
    def dead_workers(self) -> int:
        """The number of workers that have died; they are not replaced before a restart."""
        return sum(worker.is_dead for worker in self._workers)

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded, and no worker is dead."""
        return self._is_loaded and not self.dead_workers

    # ── start and stop ──

    async def start(self) -> None:
        """Start the workers and resume the jobs that an earlier process left unfinished."""
        self._loop = asyncio.get_running_loop()
        for folder in (self.settings.data_dir, self.uploads, self.results.root):
            _make_private(folder)
        self._store = JobStore(self.settings.data_dir / "jobs.sqlite")
        if self.settings.share_links:
            key_file = self.settings.data_dir / "links.key"
            self.shared_ids = SharedIds(key_file, self._store.list_finished_ids)
        for device in self.settings.devices:
            pool = ModelPool(
                device,
                self.settings.model_memory_bytes,
                self._on_model_loaded,
                self._on_model_unloaded,
                WindowPool(lambda size: self.on_batch(size)),
            )
            self._pools.append(pool)
            workers = [
                ModelWorker(pool, self._on_worker_death) for _ in range(self.settings.max_tracks)
            ]
            for worker in workers:
                worker.start()
            self._workers += workers
        for pool in self._pools:
            self._warm_up([worker for worker in self._workers if worker.pool is pool])
        self.webhooks.start()
        try:
            self._recover()
        except sqlite3.Error as error:
            data_dir = str(self.settings.data_dir)
            raise ConfigError(f"data_dir = {data_dir!r} cannot be read ({error})") from error
        self._clean_up_task = asyncio.create_task(self._clean_up_forever())

    async def stop(self) -> None:
        """Stop within one batch of windows; the next process resumes persistent jobs."""
        self.drain()
        self._clean_up_task.cancel()
        with suppress(asyncio.CancelledError):
            await self._clean_up_task
        for job in self._running.values():
            job.item.stop.set()
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)
        for pool in self._pools:
            await asyncio.to_thread(pool.close)
        await asyncio.sleep(0)  # so that the last callbacks of the workers run
        for task in self._copying.values():  # the next process begins them again
            task.cancel()
        await asyncio.gather(*self._copying.values(), return_exceptions=True)
        await self.webhooks.stop()
        for job in [*self._waiting, *self._running.values()]:
            if not job.is_persistent:
                remove_upload(job.item.source)
        self._store.close()

    def drain(self) -> None:
        """Accept no more jobs and end the event streams."""
        if not self.is_stopping:
            self.stop_at = time.monotonic() + self.settings.shutdown_seconds
        self.is_stopping = self.admission.is_closed = True
        for job in self._jobs.values():
            job.notify()

    def _on_model_loaded(self, name: str, stems: tuple[str, ...]) -> None:
        self._call_soon(lambda: self.model_stems.update({name: stems}))
        self._call_soon(lambda: self.counts.update(["loaded"]))
        self._call_soon(lambda: self.loaded.update([name]))

    def _on_model_unloaded(self, name: str) -> None:
        self._call_soon(lambda: self.loaded.subtract([name]))

    async def load_model(self, name: str) -> None:
        """Load a model on every device; raise `ApiError` if that fails."""
        model = self.find_model(name)
        self._check_workers()
        try:
            await asyncio.gather(*(asyncio.to_thread(pool.load, model) for pool in self._pools))
        except Exception as error:
            raise model_unavailable(model, error) from error
        self._is_loaded = True

    async def unload_model(self, name: str) -> None:
        """Unload a model from every device, once no track uses it."""
        model = self.find_model(name)
        self._check_workers()
        for pool in self._pools:
            await asyncio.to_thread(pool.unload, model)
        while any(pool.is_unloading(model) for pool in self._pools):
            await asyncio.sleep(_POLL_SECONDS)

    def _check_workers(self) -> None:
        if self.dead_workers:
            raise ApiError("busy", "a worker died: try again later", 60)

    def _warm_up(self, workers: list[ModelWorker]) -> None:
        """Load the first model on a device, before its workers get jobs."""
        first = next(iter(self.models.values()))
        if not self.settings.warmup:
            self._is_loaded = True
            self._idle += workers
            return

        def work(pool: ModelPool) -> None:
            load_error = ""
            try:
                pool.warm_up(first)
            except Exception as error:  # noqa: BLE001 (the server stays up and reports it)
                load_error = model_unavailable(first, error).public_message
            self._call_soon(lambda: self._on_warmed_up(workers, load_error))

        workers[0].submit(work)

    def _on_warmed_up(self, workers: list[ModelWorker], load_error: str) -> None:
        self.load_error = load_error
        self._is_loaded = self._is_loaded or not load_error
        self._idle += workers
        self._dispatch()

    def _recover(self) -> None:
        recovered = set()
        for record in self._store.list_unfinished():
            path = self.uploads / record.upload
            try:
                request = parse_request(record.request)
                job = self._create_job(
                    record.replace(status="queued"), request, path, is_persistent=True
                )
                if not path.is_file():
                    del self._jobs[record.id]
                    raise ApiError("failed", "the upload was lost")
            except ApiError as error:  # also if its model is no longer available
                details = error.to_json()["error"]
                record = record.replace(status="failed", finished=time.time(), error=details)
                self._announce(record)
                self._store.put(record)
                continue
            recovered.add(path)
            job.item.weights = self._get_weights(job.item.model)
            job.slot = self.admission.take_slot("recovered")
            self._save(job)
            self._enqueue(job)
        for path in self.uploads.iterdir():
            if path not in recovered:
                remove_upload(path)

    # ── submit ──

    def _estimate_wait(self) -> int:
        """Return the seconds until a place may be free."""
        average = sum(self._recent_seconds) / len(self._recent_seconds)
        return min(max(round(average / max(len(self._workers), 1)), 1), 600)

    async def submit(
        self,
        upload: Upload,
        request: SeparateRequest,
        *,
        client: str,
        slot: Slot | None = None,
        owner: str = "",
        targets: JobTargets = NO_TARGETS,
    ) -> Job:
        """Create a job and take ownership of the upload; persistent if `slot` is given."""
        record = JobRecord(
            id=token_hex(16),
            status="queued",
            created=time.time(),
            name=upload.name,
            sha256=upload.sha256,
            size=upload.size,
            upload=upload.path.name,
            request=request.model_dump(exclude_defaults=True),
            owner=owner,
            output=targets.output,
            webhook=targets.webhook,
        )
        try:
            job = self._create_job(record, request, upload.path, is_persistent=slot is not None)
            job.item.client = client
            await asyncio.to_thread(self._lookup_cache, job, request.no_cache)
            if job.is_persistent and not self._store.put(job.record):
                raise disk_full()
        except BaseException:
            self._jobs.pop(record.id, None)
            remove_upload(upload.path)
            raise
        job.slot = slot
        if job.record.is_cached:
            self.counts["cached"] += 1
            self._complete(job)
        else:
            self._enqueue(job)
        return job

    def _create_job(
        self, record: JobRecord, request: SeparateRequest, path: Path, *, is_persistent: bool
    ) -> Job:
        settings = self.settings
        separation = request.to_request(
            max_passes=settings.max_passes, max_duration_seconds=settings.max_duration_seconds
        )
        item = WorkItem(
            source=path,
            name=record.name,
            output=self.results.output_paths(
                record.entry or record.id, separation.output.extension
            ),
            model=self.find_model(request.model),
            request=separation,
            weights=(),
            client=record.owner,
            max_seconds=settings.job_seconds,
            max_duration_seconds=settings.max_duration_seconds,
        )
        job = Job(record=record, item=item, is_persistent=is_persistent)
        self._jobs[record.id] = job
        self._drop_finished_jobs()
        return job

    def find_model(self, name: str | None) -> ModelSpec:
        """Return the model `name` (default: the first); raise `ApiError` if it is not available."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                "unknown_model", f"unknown model {name!r}: expected one of {', '.join(self.models)}"
            )
        return self.models[name]

    def output_stems(self, request: SeparateRequest) -> tuple[str, ...] | None:
        """Return the names of the stems of a request, or None if its model was never loaded."""
        self.find_model(request.model)
        sources = self.model_stems[request.model or next(iter(self.models))]
        if sources is None:
            return None
        try:
            plan = plan_stems(sources, request.stem_options)
        except ValueError as error:
            raise from_exception(error) from error
        return plan.outputs

    def _lookup_cache(self, job: Job, no_cache: bool) -> None:
        """Check the length of the track, and look for its result in the cache.

        To be called in a thread: it reads and hashes files.
        """
        item = job.item
        item.duration = check_duration(
            item.source, item.name, item.request, item.max_duration_seconds
        )
        item.weights = self._get_weights(item.model)
        recipe = make_recipe(item.request, job.record.sha256, item.model, item.weights)
        entry = recipe.key if not no_cache else f"{recipe.key}-{job.record.id}"
        is_cached = self.results.find(recipe, entry) is not None
        job.record = job.record.replace(entry=entry, is_cached=is_cached)
        item.output = self.results.output_paths(entry, item.request.output.extension)

    def _get_weights(self, model: ModelSpec) -> tuple[str, ...]:
        if model.name not in self._weights:
            self._weights[model.name] = model.weights() or ()
        return self._weights[model.name]

    def _enqueue(self, job: Job) -> None:
        self._waiting.append(job)
        self._dispatch()

    # ── run ──

    def _dispatch(self) -> None:
        """Give jobs to idle workers, on the device with the fewest jobs."""
        while self._idle and not self.is_stopping:
            job = self._choose_next()
            if job is None:
                return
            self._waiting.remove(job)
            idle = Counter(worker.pool.device for worker in self._idle)
            worker = max(self._idle, key=lambda worker: idle[worker.pool.device])
            self._idle.remove(worker)
            self._start_job(worker, job)

    def _choose_next(self) -> Job | None:
        """Return the job to run next: one of the client with the fewest running jobs.

        Of several such clients, it is the one whose last turn was the longest ago. A job waits
        while an equal one is running. The last idle worker is only for a client that has no running
        job, or for a track shorter than all that run, so that neither has to wait for long tracks.
        """
        running = list(self._running.values())
        in_use = {job.record.entry for job in running}
        counts = Counter(job.item.client for job in running)
        jobs = [job for job in self._waiting if job.record.entry not in in_use]
        if len(self._idle) == 1 and len(self._workers) > 1:
            shortest = min((job.item.duration or 0.0 for job in running), default=math.inf)
            jobs = [
                job
                for job in jobs
                if not counts[job.item.client] or (job.item.duration or math.inf) < shortest
            ]
        clients = {job.item.client for job in [*running, *self._waiting]}
        self._turns = {client: turn for client, turn in self._turns.items() if client in clients}
        return min(
            jobs,
            key=lambda job: (counts[job.item.client], self._turns.get(job.item.client, 0.0)),
            default=None,
        )

    def _start_job(self, worker: ModelWorker, job: Job) -> None:
        self._running[worker] = job
        job.started_at = self._turns[job.item.client] = time.monotonic()
        self.on_wait(max(time.time() - job.record.created, 0.0))
        job.stage = "fetch" if _needs_download(job.item.model) else "load"
        job.record = job.record.replace(status="running", attempts=job.record.attempts + 1)
        self._save(job)
        job.notify()

        def on_event(event: Event) -> None:
            self._call_soon(lambda: self._on_event(job, event))

        def on_start(preview: LivePreview) -> None:
            self._call_soon(lambda: self._on_started(job, preview))

        def work(pool: ModelPool) -> None:
            outcome: TrackResult | Exception
            try:
                outcome = separate(job.item, pool, on_event, on_start)
            except Exception as error:  # noqa: BLE001 (reported to the client)
                outcome = error
            if isinstance(outcome, ApiError | JobCancelled):
                self.results.remove(job.record.entry)
            self._call_soon(lambda: self._on_finished(worker, job, outcome))

        worker.submit(work)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the event loop, unless that is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _on_started(self, job: Job, preview: LivePreview) -> None:
        """Note that the model is loaded."""
        job.live = preview
        job.stage = "read"
        job.notify()

    def _on_worker_death(self, worker: ModelWorker) -> None:
        self._call_soon(lambda: self._fail_job_of(worker))

    def _fail_job_of(self, worker: ModelWorker) -> None:
        job = self._running.pop(worker, None)
        if job is not None:
            self._set_final(job, "failed", ApiError("failed", "the worker died: try again later"))

    def _on_event(self, job: Job, event: Event) -> None:
        if isinstance(event, ChunkProcessed):
            job.fraction = event.fraction
            if job.live:
                job.live.length = round(event.seconds_total * job.live.sample_rate)
        elif isinstance(event, Stage.Started):
            job.stage = event.stage
        job.events.append(event_to_json(event))
        job.notify()

    def _on_finished(self, worker: ModelWorker, job: Job, outcome: TrackResult | Exception) -> None:
        del self._running[worker]
        self._idle.append(worker)
        if isinstance(outcome, WorkerStopped):
            return  # the next process resumes the job
        seconds = time.monotonic() - (job.started_at or 0)
        job.record = job.record.replace(seconds=seconds)
        if isinstance(outcome, TrackResult):
            self._recent_seconds.append(seconds)
            self.audio_seconds += outcome.duration_seconds
            self.on_separated(outcome.duration_seconds, seconds)
            self._is_loaded = True
            job.record = job.record.replace(warnings=tuple(outcome.warnings))
            self._complete(job)
        elif isinstance(outcome, JobCancelled):
            self._set_final(job, "cancelled")
        else:
            self._set_final(job, "failed", _as_job_error(outcome))
        self._dispatch()

    def _complete(self, job: Job) -> None:
        """Finish a job that has its stems, after they were copied to its output."""
        if not job.record.output:
            self._set_final(job, "done")
            return
        job.stage = "upload"
        job.record = job.record.replace(status="running")
        self._save(job)
        job.notify()
        self._copying[job] = asyncio.create_task(self._copy_to_output(job))

    async def _copy_to_output(self, job: Job) -> None:
        error: ApiError | None = None
        try:
            stems = self.results.open(job.record.entry)
            if stems is None:
                raise ApiError("failed", "the stems were lost before they were copied")
            await self.remote.upload(stems, job.record.output)
        except Exception as raised:  # noqa: BLE001 (reported to the client)
            error = _as_job_error(raised)
        del self._copying[job]
        self._set_final(job, "failed" if error else "done", error)

    def _announce(self, record: JobRecord) -> None:
        """Send a finished job to its webhook, before it is saved as finished."""
        if record.webhook:
            self.webhooks.add(record.webhook, self.describe(record))

    def _set_final(self, job: Job, status: Status, error: ApiError | None = None) -> None:
        job.error, job.live = error, None
        job.fraction = 1.0 if status == "done" else job.fraction
        details = None if error is None else error.to_json()["error"]
        job.record = job.record.replace(status=status, finished=time.time(), error=details)
        remove_upload(job.item.source)
        self.counts[status] += 1
        self._announce(job.record)
        self._save(job)
        if job.slot:
            job.slot.release()
        if not job.is_persistent:
            self._jobs.pop(job.record.id, None)
        job.notify()

    def _save(self, job: Job) -> None:
        if job.is_persistent:  # on a full disk the job continues without its record
            self._store.put(job.record)

    def _drop_finished_jobs(self) -> None:
        """Drop the oldest finished jobs, with their events, from memory."""
        for id, job in list(self._jobs.items()):
            if len(self._jobs) <= _MAX_JOBS_IN_MEMORY:
                return
            if job.record.is_final:
                del self._jobs[id]

    # ── query ──

    def get_record(self, id: str) -> JobRecord:
        """Return the record of a job; raise `ApiError` if there is none."""
        job = self._jobs.get(id)
        record = job.record if job else self._store.get(id)
        if record is None or (job and not job.is_persistent):
            raise no_such_job()
        return record

    def get_shared_record(self, shared_id: str) -> JobRecord:
        """Return the record of a finished job by its shared id; raise `ApiError` without one."""
        id = self.shared_ids.find(shared_id) if self.shared_ids else None
        if id is None:
            raise no_such_job()
        return self.get_record(id)

    def list_records(self, owner: str, limit: int) -> list[JobRecord]:
        """Return the jobs of a client, the newest first."""
        records = self._store.list_by_owner(owner, limit)
        live = (self._jobs.get(record.id) for record in records)
        return [job.record if job else record for job, record in zip(live, records)]

    def get_job(self, id: str) -> Job | None:
        """Return the job itself, unless it has been dropped from memory."""
        return self._jobs.get(id)

    def get_position(self, id: str) -> int | None:
        """Return the number of jobs ahead of a waiting one, or None if it does not wait."""
        for number, job in enumerate(self._waiting):
            if job.record.id == id:
                return number + len(self._running)
        return None

    def get_stems(self, record: JobRecord) -> CachedStems:
        """Return the stems of a job; raise `ApiError` if it has none yet, or none any more."""
        if not record.is_final:
            raise ApiError("not_done", "the job has not finished yet")
        if record.status != "done":
            raise ApiError(
                record.status, f"the job has no stems: it is {record.status}", status=409
            )
        stems = self.results.open(record.entry)
        if stems is None:
            raise ApiError("expired", "the stems of this job were deleted: send the track again")
        return stems

    async def get_verified_stems(self, record: JobRecord) -> CachedStems:
        """Return the stems after comparing their digests; raise `ApiError` if one is damaged."""
        stems = self.get_stems(record)
        if not await asyncio.to_thread(self.results.verify, stems):
            self.results.remove(record.entry)
            raise ApiError("expired", "the stems of this job were damaged: send the track again")
        return stems

    def get_preview(self, record: JobRecord) -> Preview:
        """Return the stems to listen to; raise `ApiError` if there are none yet, or any more."""
        job = self._jobs.get(record.id)
        if job and job.live:
            return job.live
        entry = self.get_stems(record)
        rate = int(entry.manifest["sample_rate"])
        length = round(float(entry.manifest["duration_seconds"]) * rate)
        return FilePreview({stem.stem: stem.path for stem in entry.stems}, rate, length)

    async def stream_events(
        self, job: Job, after: int = 0
    ) -> AsyncIterator[tuple[int, dict[str, Any] | None]]:
        """Yield (number, event) for every event after number `after` until the job has finished.

        Yields None as event from time to time, so that proxies keep an idle connection open.
        """
        number = after
        while True:
            for event in job.events[number:]:
                number += 1
                yield number, event
            if job.record.is_final or self.is_stopping:
                return
            with anyio.move_on_after(_KEEP_ALIVE_SECONDS) as scope:
                await job.wait_for_update()
            if scope.cancelled_caught:
                yield number, None

    def cancel(self, id: str) -> JobRecord | None:
        """Cancel a job within one batch of windows; delete a finished one and return None."""
        record, job = self.get_record(id), self._jobs.get(id)
        if record.is_final or job is None:
            self._delete(record)
            return None
        self.abandon(job)
        return job.record

    def abandon(self, job: Job) -> None:
        """Cancel a job whose result is not needed, within one batch of windows."""
        if job.record.is_final:
            return
        job.item.cancel.set()
        if job in self._waiting:
            self._waiting.remove(job)
            self._set_final(job, "cancelled")
        elif job in self._copying:
            self._copying.pop(job).cancel()
            self._set_final(job, "cancelled")

    @property
    def depth(self) -> tuple[int, int]:
        """The number of waiting and of running jobs."""
        return len(self._waiting), len(self._running)

    # ── clean up ──

    async def clean_up(self) -> None:
        """Delete jobs and results that have expired, or exceed the space for results."""
        oldest = time.time() - self.settings.keep_seconds
        kept = set()
        for record in self._store.list_finished():
            if (record.finished or 0) >= oldest:
                kept.add(record.entry)
            elif record.finished is not None:
                self._delete(record)
        busy = [*self._running.values(), *self._waiting, *self._copying]
        in_use = {job.record.entry for job in busy}
        evicted = await asyncio.to_thread(self.results.evict, in_use, kept)
        self.counts["evicted"] += len(evicted)

    def _delete(self, record: JobRecord) -> None:
        self._store.remove(record.id)
        self._jobs.pop(record.id, None)
        if record.owns_entry:
            self.results.remove(record.entry)

    async def _clean_up_forever(self) -> None:
        while True:
            periods = (self.settings.keep_seconds, self.settings.idle_unload or math.inf)
            await asyncio.sleep(min(max(min(periods) / 4, 1), 60))
            try:
                await self.clean_up()
            except (OSError, sqlite3.Error) as error:  # it is tried again
                logger.error("clean-up failed: %s", format_error(error))
            if self.settings.idle_unload:
                for pool in self._pools:
                    await asyncio.to_thread(pool.unload_idle, self.settings.idle_unload)


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can read; the mode of an existing folder is not changed."""
    if not folder.exists():
        folder.mkdir(0o700, parents=True)
    elif folder.name in ("uploads", "results"):
        with suppress(OSError):
            folder.chmod(0o700)


def _as_job_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OSError):
        logger.error("a job failed: %s", error)
    else:
        logger.error("a job failed", exc_info=error)
    return ApiError("failed", "the separation failed: see the server log")


def _list_model_names(settings: ServerSettings) -> tuple[str, ...]:
    """Return the names of the models to serve; raise `ConfigError` if one does not exist."""
    if settings.repo is not None:
        listed = list_models(settings.repo)
        available = {**listed["bag"], **listed["single"]}
        names = settings.models or tuple(available)
        missing = [part for name in names for part, _ in split_bag(name) if part not in available]
        if missing:
            raise ConfigError(f"repo = {str(settings.repo)!r} has no model {', '.join(missing)}")
        if not names:
            raise ConfigError(f"repo = {str(settings.repo)!r} has no models")
        return names
    names = settings.models or DEFAULT_MODELS
    try:
        for part in (part for name in names for part, _ in split_bag(name)):
            if not part.startswith("hf://") and not Path(part).is_file():
                model_info(part)
    except ModelLoadingError as error:
        raise ConfigError(f"models: {error}") from error
    return names


def _needs_download(model: ModelSpec) -> bool:
    if model.repo is not None:
        return False
    try:
        return not model_info(model.name, cache_dir=model.cache_dir).is_cached
    except ModelNotFound:
        return False


def _find_catalog_stems(name: str, base: ModelSpec) -> tuple[str, ...] | None:
    if base.repo is not None:
        return None
    try:
        return model_info(name).stems
    except ModelNotFound:
        return None
