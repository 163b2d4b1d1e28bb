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
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import anyio

from demucs_infer.batch.custom_model import CustomModelSpec
from demucs_infer.batch.request import ModelSpec, make_recipe
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.workdir import WorkDir
from demucs_infer.checkpoints.catalog import load_catalog, split_bag
from demucs_infer.custom.community import import_library
from demucs_infer.custom.config import Config
from demucs_infer.custom.msst import find_pair
from demucs_infer.engine.stems import plan_stems
from demucs_infer.engine.window_pool import WindowPool
from demucs_infer.errors import ConfigError, ModelLoadingError, ModelNotFound, format_error
from demucs_infer.events import ChunkProcessed, Event, Stage, event_to_json
from demucs_infer.options import Request
from demucs_infer.pretrained import list_models, model_info, pull
from demucs_infer.server.admission import Admission, Slot, UploadPlace
from demucs_infer.server.cache import CachedStems, ResultCache
from demucs_infer.server.disk import DiskBudget, JobSpace, Promise, estimate_space
from demucs_infer.server.errors import (
    ApiError,
    from_exception,
    model_unavailable,
    no_such_job,
)
from demucs_infer.server.model_pool import ModelPool
from demucs_infer.server.preview import FilePreview, LivePreview, Preview
from demucs_infer.server.remote_files import NO_TARGETS, JobTargets, RemoteFiles
from demucs_infer.server.schemas import SeparateRequest, display_name, parse_request
from demucs_infer.server.settings import ServerSettings
from demucs_infer.server.shared_store import SharedStore, Snapshot
from demucs_infer.server.sharing import SharedIds, read_key
from demucs_infer.server.store import JobRecord, JobStore, Status
from demucs_infer.server.tracing import open_tracing
from demucs_infer.server.uploads import Upload, UploadWriter, remove_upload
from demucs_infer.server.urls import RemoteUrl
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
_SYNC_SECONDS = 0.5
"""How often a server looks for jobs of other servers, and publishes the progress of its own."""

_MAX_UPLOAD_AGE = 24 * 3600.0
"""An upload without a job that is older belongs to no server any more."""

_DOWNLOAD_ENTRY = "download-"
"""Begins the name of the result of a job whose track is still downloaded: the server that does it
leases that name. The real one depends on the track."""

_LOWEST_BYTES_PER_SECOND = 4000
"""Of a track whose header does not state its duration."""

_STAGES = {"download": "download", "normalize": "separate"}
"""Stages of the engine's events that begin a stage of the job."""

_MAX_JOBS_IN_MEMORY = 256
"""Above this, finished jobs are dropped from memory, and their events with them."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A track that is downloaded, waits, is being separated, or has finished."""

    record: JobRecord
    item: WorkItem
    is_persistent: bool
    """Whether the job continues after the request that created it, and after a restart."""

    is_ours: bool = True
    """Whether this server works on the job, and not another one that shares its store."""

    slot: Slot | None = None
    space: JobSpace | None = None
    """What it takes on disk, once that was promised."""

    download_space: Promise | None = None
    live: LivePreview | None = None
    """The stems while they are made."""

    events: list[dict[str, Any]] = field(default_factory=list)
    fraction: float = 0.0
    received_bytes: int = 0
    total_bytes: int | None = None
    """Of a track that is downloaded; None: unknown."""

    stage: str = ""
    started_at: float | None = None
    position: int | None = None
    """How many jobs of all servers are ahead; None if only this server counts."""

    published: int = 0
    """How many events other servers can see."""

    error: ApiError | None = None
    end_step: Callable[[str], None] | None = None
    """Ends the span of the current step, with an error or ""."""

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

    def __init__(self, settings: ServerSettings) -> None:  # noqa: PLR0915 (attributes)
        self.settings = settings
        self.uploads = settings.data_dir / "uploads"
        base = ModelSpec(repo=settings.repo, cache_dir=settings.cache_dir, offline=settings.offline)
        self.models = {name: _find_model(name, base) for name in _list_model_names(settings)}
        self._model_stems = {name: _find_stems(model) for name, model in self.models.items()}
        max_store_bytes = settings.max_store_bytes
        if settings.max_disk_bytes:  # the rest is for new tracks
            max_store_bytes = min(max_store_bytes, settings.max_disk_bytes // 2)
        self.results = ResultCache(
            settings.data_dir / "results", max_store_bytes, settings.keep_seconds
        )
        self.disk = DiskBudget(
            self.uploads,
            self.results.root,
            max_bytes=settings.max_disk_bytes,
            min_free_bytes=settings.min_free_bytes,
            max_running=settings.max_tracks * len(settings.devices),
            list_jobs=self._list_space,
        )
        self.admission = Admission(
            max_queue=settings.max_queue,
            max_per_client=settings.max_per_client,
            min_upload_rate=settings.min_upload_rate,
            max_upload_seconds=settings.upload_seconds,
            estimate_wait=self._estimate_wait,
        )
        self._shared: SharedStore | None = None
        self._unsaved: dict[str, Job] = {}
        """Finished jobs that the shared store does not know to be finished."""

        self.tracing = open_tracing(settings.traces)
        self._is_loaded = False
        self.is_draining = False
        """Whether load balancers are told to send no more requests, which are still accepted."""

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
        self._downloads: dict[Job, asyncio.Task[None]] = {}
        """Jobs whose tracks are being downloaded."""

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
        self._store = self._open_store()
        if self.settings.share_links:
            key = (
                self._shared.agree_on_key()
                if self._shared
                else read_key(self.settings.data_dir / "links.key")
            )
            self.shared_ids = SharedIds(key, self._store.list_finished_ids)
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
        self._tasks = [asyncio.create_task(self._clean_up_forever())]
        if self._shared:
            self._tasks.append(asyncio.create_task(self._synchronize_forever(self._shared)))

    def _open_store(self) -> "JobStore | SharedStore":
        if not self.settings.redis_url:
            return JobStore(self.settings.data_dir / "jobs.sqlite")
        self._shared = SharedStore(self.settings.redis_url, self.settings.lease_seconds)
        self.admission.slots = self._shared
        return self._shared

    async def stop(self) -> None:
        """Stop within one batch of windows; the next process resumes persistent jobs."""
        self.drain()
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for job in self._running.values():
            job.item.stop.set()
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)
        for pool in self._pools:
            await asyncio.to_thread(pool.close)
        await asyncio.sleep(0)  # so that the last callbacks of the workers run
        transfers = [*self._downloads.values(), *self._copying.values()]
        for task in transfers:  # the next process begins them again
            task.cancel()
        await asyncio.gather(*transfers, return_exceptions=True)
        await self.webhooks.stop()
        for job in [*self._waiting, *self._running.values()]:
            if not job.is_persistent:
                remove_upload(job.item.source)
        for job in [*self._running.values(), *self._downloads, *self._copying]:
            self._hand_over(job)
        await asyncio.to_thread(self.tracing.close)
        self._store.close()

    def drain(self) -> None:
        """Accept no more jobs and end the event streams."""
        if not self.is_stopping:
            self.stop_at = time.monotonic() + self.settings.shutdown_seconds
        self.is_stopping = self.admission.is_closed = True
        for job in self._jobs.values():
            job.notify()

    def _on_model_loaded(self, name: str, stems: tuple[str, ...]) -> None:
        self._call_soon(lambda: self._model_stems.update({name: stems}))
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
        if self._shared:  # where `_claim` does it, job by job
            return
        recovered = set()
        for record in self._store.list_unfinished():
            job = self._restore(record)
            if job is None:
                continue
            job.slot = self.admission.take_slot("recovered")
            if job.record.status == "downloading":
                self._begin_download(job)
                continue
            recovered.add(job.item.source)
            self._save(job)
            self._enqueue(job)
        for path in self.uploads.iterdir():
            if path not in recovered:
                remove_upload(path)

    def _restore(self, record: JobRecord) -> Job | None:
        """Return the job of a record that another process has left; None if it had to fail."""
        path = self.uploads / record.upload
        is_downloading = record.status == "downloading"
        try:
            request = parse_request(record.request)
            job = self._create_job(
                record if is_downloading else record.replace(status="queued"),
                request,
                path,
                is_persistent=True,
            )
            if is_downloading:  # again, from the beginning
                remove_upload(path)
            elif not path.is_file():
                del self._jobs[record.id]
                raise ApiError("failed", "the upload was lost")
        except ApiError as error:  # also if its model is no longer available
            details = error.to_json()["error"]
            record = record.replace(status="failed", finished=time.time(), error=details)
            self._announce(record)
            self._store.put(record)
            return None
        job.item.weights = self._get_weights(job.item.model)
        if not is_downloading:
            job.space = self._estimate_space(job)
        return job

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
            request=request.model_dump(exclude_unset=True),
            owner=owner,
            output=targets.output,
            webhook=targets.webhook,
            traceparent=self.tracing.get_parent(),
        )
        try:
            job = self._create_job(record, request, upload.path, is_persistent=slot is not None)
            job.item.client = client
            await self._lookup_cache(job, request.no_cache)
            await self._reserve_space(job)
            if slot is not None:
                self._save_new(job, slot)
        except BaseException:
            self._jobs.pop(record.id, None)
            remove_upload(upload.path)
            raise
        self._begin(job)
        return job

    def _list_space(self) -> list[tuple[str, JobSpace]]:
        """Return the result that each unfinished job makes, with the space that it takes."""
        return [
            (job.record.entry, job.space)
            for job in self._jobs.values()
            if job.space and not job.record.is_final
        ]

    def _estimate_space(self, job: Job) -> JobSpace:
        item = job.item
        stems: tuple[str, ...] | None = None
        with suppress(ApiError):  # stems that the model does not have: the job will fail
            stems = self.output_stems(parse_request(job.record.request))
        longest = min(job.record.size / _LOWEST_BYTES_PER_SECOND, item.max_duration_seconds)
        seconds = longest if item.duration is None else item.duration
        return estimate_space(item.request.output, stems, seconds)

    async def _reserve_space(self, job: Job) -> None:
        """Reserve space for the stems of a job; raise `ApiError` if there is too little."""
        if not job.record.is_cached:
            space = self._estimate_space(job)
            await self.disk.reserve_for_job(space)
            job.space = space

    def _begin(self, job: Job) -> None:
        """Queue a job, or finish it if its result is cached."""
        if job.record.is_cached:
            self.counts["cached"] += 1
            self._complete(job)
        else:
            self._enqueue(job)

    def _save_new(self, job: Job, slot: Slot) -> None:
        """Save a new job, which owns its place in the queue; raise `ApiError` if that fails."""
        if self._shared:
            job.record = job.record.replace(slot=slot.name)
        if not self._store.put(self._make_shareable(job)):
            raise self._store.put_error()
        if self._shared:
            self.admission.forget(slot)
        job.slot = slot

    def _make_shareable(self, job: Job) -> JobRecord:
        """Return the record of a new job to save; with other servers, any of them may claim it."""
        if not self._shared:
            return job.record
        is_cached = job.record.is_cached and not job.record.output  # which a server has to copy to
        job.is_ours = is_cached  # until a server claims it
        job.record = job.record.replace(is_cached=is_cached)
        if not is_cached:
            return job.record
        return job.record.replace(status="done", finished=time.time())  # none must begin with it

    # ── download ──

    async def submit_url(
        self,
        url: RemoteUrl,
        request: SeparateRequest,
        *,
        slot: Slot,
        owner: str = "",
        targets: JobTargets = NO_TARGETS,
    ) -> Job:
        """Create a persistent job whose track is downloaded in the background."""
        space = await self.disk.reserve(self.settings.max_bytes)
        id = token_hex(16)
        record = JobRecord(
            id=id,
            status="downloading",
            created=time.time(),
            name=display_name(url.file_name),
            sha256="",
            size=0,
            upload=token_hex(16),  # replaced when the download begins
            request=request.model_dump(exclude_unset=True),
            entry=f"{_DOWNLOAD_ENTRY}{id}",
            owner=owner,
            url=str(url),
            output=targets.output,
            webhook=targets.webhook,
            slot=slot.name if self._shared else "",
            traceparent=self.tracing.get_parent(),
        )
        try:
            path = self.uploads / record.upload
            job = self._create_job(record, request, path, is_persistent=True)
            job.item.client, job.download_space = slot.client, space
            if self._shared:  # before any other server can claim it
                self._shared.lease(record.entry, id)
            if not self._store.put(record):
                raise self._store.put_error()
        except BaseException:
            self._jobs.pop(id, None)
            if self._shared:
                self._shared.release(record.entry, id)
            raise
        if self._shared:
            self.admission.forget(slot)
        job.slot = slot
        self._begin_download(job)
        return job

    def _begin_download(self, job: Job) -> None:
        self._begin_step(job, "download")
        self._on_event(job, Stage.Started("download"))
        self._downloads[job] = asyncio.create_task(self._download(job))

    async def _download(self, job: Job) -> None:
        """Download a track and queue its job; cancelled, it leaves no file."""
        upload: Upload | None = None
        try:
            upload = await self._fetch_track(job)
            job.record = job.record.replace(sha256=upload.sha256, size=upload.size)
            self._on_event(job, Stage.Completed("download"))
            if self._shared:
                with suppress(ApiError):
                    self._publish(self._shared, job)
            await self._lookup_cache(job, parse_request(job.record.request).no_cache)
            await self._reserve_space(job)
        except asyncio.CancelledError:
            if upload:
                remove_upload(upload.path)
            raise
        except Exception as raised:  # noqa: BLE001 (reported to the client)
            del self._downloads[job]
            self._set_final(job, "failed", from_exception(raised))
            return
        del self._downloads[job]
        self._end_step(job)
        job.record = job.record.replace(status="queued", queued=time.time())
        job.stage = ""
        if self._shared and not self._share_downloaded(self._shared, job):
            remove_upload(upload.path)
            return
        if not self._shared:  # on a full disk, the next process downloads the track again
            self._store.put(job.record)
        self._begin(job)

    async def _fetch_track(self, job: Job) -> Upload:
        """Download the track of a job; raise `ApiError` if that fails."""
        settings = self.settings
        place = UploadPlace(
            job.item.client, settings.min_upload_rate, settings.upload_seconds, "download"
        )
        promise = job.download_space or self.disk.promise(settings.max_bytes)
        job.download_space = None
        writer = UploadWriter(self.uploads, settings.max_bytes, promise)
        job.item.source = writer.path
        job.record = job.record.replace(upload=writer.path.name)

        def on_progress(received: int, total: int | None) -> None:
            job.received_bytes, job.total_bytes = received, total

        try:
            self._save(job)
            return await self.remote.download(
                job.record.url, place, writer, on_progress=on_progress
            )
        except BaseException:
            writer.discard()
            raise

    def _share_downloaded(self, shared: SharedStore, job: Job) -> bool:
        """Let any server claim a job that was downloaded; return False if another one has it."""
        lease = f"{_DOWNLOAD_ENTRY}{job.record.id}"
        is_saved = lease in shared.held and shared.put(self._make_shareable(job), lease)
        shared.release(lease, job.record.id)
        if not is_saved:  # it is downloaded again, here or there
            job.is_ours = False
            job.record = job.record.replace(status="downloading", entry=lease, is_cached=False)
        return is_saved

    def _create_job(
        self, record: JobRecord, request: SeparateRequest, path: Path, *, is_persistent: bool
    ) -> Job:
        settings = self.settings
        model = self.find_model(request.model)
        separation = request.to_request(
            model,
            max_passes=settings.max_passes,
            max_duration_seconds=settings.max_duration_seconds,
        )
        item = WorkItem(
            source=path,
            name=record.name,
            output=self.results.output_paths(
                record.entry or record.id, separation.output.extension
            ),
            model=model,
            request=separation,
            weights=(),
            client=record.owner,
            max_seconds=settings.job_seconds,
            max_duration_seconds=settings.max_duration_seconds,
            min_free_bytes=settings.min_free_bytes // 2,
            duration=record.duration,
            waits_for_others=self._shared is not None,
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
        return self._name_outputs(self.find_model(request.model), request.settings)

    def default_stems(self, name: str) -> tuple[str, ...] | None:
        """Return the stems of a request that sets nothing; None if the model was never loaded."""
        return self._name_outputs(self.models[name], {})

    def _name_outputs(
        self, model: ModelSpec, settings: Mapping[str, object]
    ) -> tuple[str, ...] | None:
        sources = self._model_stems[model.name]
        if sources is None:
            return None
        options = Request().replace(model.fill_settings(settings)).stems
        try:
            return plan_stems(sources, options).outputs
        except ValueError as error:
            raise from_exception(error) from error

    async def _lookup_cache(self, job: Job, no_cache: bool) -> None:
        """Check the length of the track, and look for its result in the cache."""
        entry, is_cached = await asyncio.to_thread(
            self._find_result, job.item, job.record, no_cache
        )
        job.record = job.record.replace(
            entry=entry, is_cached=is_cached, duration=job.item.duration
        )
        job.item.output = self.results.output_paths(entry, job.item.request.output.extension)

    def _find_result(self, item: WorkItem, record: JobRecord, no_cache: bool) -> tuple[str, bool]:
        """Return the name of the result, and whether it is cached.

        To be called in a thread: it reads and hashes files.
        """
        item.duration = check_duration(
            item.source, item.name, item.request, item.max_duration_seconds
        )
        item.weights = self._get_weights(item.model)
        recipe = make_recipe(item.request, record.sha256, item.model, item.weights)
        entry = recipe.key if not no_cache else f"{recipe.key}-{record.id}"
        return entry, self.results.find(recipe, entry) is not None

    def _get_weights(self, model: ModelSpec) -> tuple[str, ...]:
        if model.name not in self._weights:
            self._weights[model.name] = model.weights() or ()
        return self._weights[model.name]

    def _enqueue(self, job: Job) -> None:
        if job.is_ours:
            self._waiting.append(job)
        self._dispatch()

    # ── run ──

    def _dispatch(self) -> None:
        """Give jobs to idle workers, on the device with the fewest jobs."""
        while self._idle and not self.is_stopping:
            job = self._take_next()
            if job is None:
                return
            idle = Counter(worker.pool.device for worker in self._idle)
            worker = max(self._idle, key=lambda worker: idle[worker.pool.device])
            self._idle.remove(worker)
            self._start_job(worker, job)

    def _take_next(self) -> Job | None:
        """Remove and return the next job to run: of all servers, or a request of this one."""
        leased: set[str] = set()
        while True:
            job = self._choose_next(leased)
            if self._shared and not self.is_draining:
                with suppress(ApiError):  # without Redis, requests run without a lease
                    claimed = self._claim(self._shared, job.record.created if job else math.inf)
                    if claimed:
                        return claimed
                    if job and not self._shared.lease(job.record.entry, job.record.id):
                        leased.add(job.record.entry)
                        continue
            if job:
                self._waiting.remove(job)
            return job

    def _choose_next(self, excluded: Collection[str]) -> Job | None:
        """Return the job to run next: one of the client with the fewest running jobs.

        Of several such clients, it is the one whose last turn was the longest ago. A job waits
        while an equal one is running, or its result is `excluded`. The last idle worker is only for
        a client that has no running job, or for a track shorter than all that run, so that neither
        has to wait for long tracks.
        """
        running = list(self._running.values())
        in_use = {*excluded, *(job.record.entry for job in running)}
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
        queued = job.record.queued or job.record.created
        self.on_wait(max(time.time() - queued, 0.0))
        self.tracing.begin("queue", job.record.traceparent, {}, queued)("")
        self._begin_step(job, "load")
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
        self._begin_step(job, "separate")
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
            if event.fraction >= 1 > job.fraction:
                self._begin_step(job, "write")
            job.fraction = event.fraction
            job.stage = "save" if event.fraction >= 1 else "separate"
            if job.live:
                job.live.length = round(event.seconds_total * job.live.sample_rate)
        elif isinstance(event, Stage.Started):
            job.stage = _STAGES.get(event.stage, job.stage)
        job.events.append(event_to_json(event))
        job.notify()

    def _begin_step(self, job: Job, name: str) -> None:
        """Begin the span of a step of a job, and end the one before."""
        self._end_step(job)
        attributes = {"demucs.job": job.record.id, "demucs.model": job.item.model.name}
        job.end_step = self.tracing.begin(name, job.record.traceparent, attributes)

    def _end_step(self, job: Job, error: str = "") -> None:
        if job.end_step:
            job.end_step(error)
            job.end_step = None

    def _on_finished(self, worker: ModelWorker, job: Job, outcome: TrackResult | Exception) -> None:
        del self._running[worker]
        self._idle.append(worker)
        if isinstance(outcome, WorkerStopped):  # the next process, or another, resumes the job
            self._hand_over(job)
            self._dispatch()
            return
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
        if job.item.cancel.is_set():  # too late for the worker, not for the copy
            self._set_final(job, "cancelled")
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
        self._end_step(job, "" if error is None else error.code)
        job.error, job.live, job.stage = error, None, ""
        job.fraction = 1.0 if status == "done" else job.fraction
        details = None if error is None else error.to_json()["error"]
        job.record = job.record.replace(status=status, finished=time.time(), error=details)
        if not self._shared:  # first, so that a full disk has space for the record
            remove_upload(job.item.source)
        self.counts[status] += 1
        self._announce(job.record)
        self._save_final(job)
        if not job.is_persistent:
            self._jobs.pop(job.record.id, None)
        job.notify()

    def _save_final(self, job: Job) -> None:
        """Save a finished job; what it needed is kept until that has succeeded."""
        if self._save(job):
            if self._shared:
                remove_upload(job.item.source)
            if job.slot:
                job.slot.release()

    def _save(self, job: Job) -> bool:
        """Save the record; return False if the store does not have it yet, or never will."""
        if not self._shared:
            if job.is_persistent:  # on a full disk the job continues without its record
                self._store.put(job.record)
            return True
        if not job.is_persistent or job.record.is_cached:
            if job.record.is_final:
                self._shared.release(job.record.entry, job.record.id)
            return True
        is_saved = self._shared.holds(job.record)
        if is_saved:
            with suppress(ApiError):
                self._publish(self._shared, job)
            is_saved = self._store.put(job.record)
        if job.record.is_final and not is_saved and self._shared.holds(job.record):
            self._unsaved[job.record.id] = job  # and its lease is renewed
        elif job.record.is_final:
            self._unsaved.pop(job.record.id, None)
            self._shared.release(job.record.entry, job.record.id)
            job.is_ours = False
        return is_saved

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
        if self._shared and not (job and job.is_ours):
            return self._read_shared(self._shared, id)
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
        if self._shared:
            self._follow(self._shared, [record.id for record in records if not record.is_final])
            return records
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
        queued = self._jobs.get(id)
        return queued.position if queued and queued.record.status == "queued" else None

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
        if self._shared and not record.is_final and not (job and job.is_ours):
            return self._cancel_elsewhere(self._shared, record)
        if record.is_final or job is None:
            self._delete(record)
            return None
        self.abandon(job)
        return job.record

    def _cancel_elsewhere(self, shared: SharedStore, record: JobRecord) -> JobRecord:
        """Cancel a job that another server works on, or none."""
        shared.request_cancel(record.id)
        if shared.lease(record.entry, record.id):
            record = self._read_shared(shared, record.id)
            taken = None if record.is_final else self._take_over(record, [])
            if taken:
                self._set_final(taken, "cancelled")
                return taken.record
            shared.release(record.entry, record.id)
        return record

    def abandon(self, job: Job) -> None:
        """Cancel a job whose result is not needed, within one batch of windows."""
        if job.record.is_final:
            return
        job.item.cancel.set()
        if job in self._waiting:
            self._waiting.remove(job)
            self._set_final(job, "cancelled")
        elif job in self._downloads:
            self._downloads.pop(job).cancel()
            self._set_final(job, "cancelled")
        elif job in self._copying:
            self._copying.pop(job).cancel()
            self._set_final(job, "cancelled")

    @property
    def num_downloads(self) -> int:
        """The number of jobs whose tracks this server downloads."""
        return len(self._downloads)

    @property
    def depth(self) -> tuple[int, int]:
        """The number of waiting jobs, on all servers that share a store, and of running ones."""
        waiting = len(self._waiting)
        if self._shared:
            with suppress(ApiError):
                waiting += self._shared.count_waiting()
        return waiting, len(self._running)

    # ── other servers ──

    def _claim(self, shared: SharedStore, before: float) -> Job | None:
        """Return the oldest job of all servers that none of them works on, if it is so old."""
        busy = {job.item.client for job in self._running.values()}
        is_last = len(self._idle) == 1 and len(self._workers) > 1  # as in `_choose_next`
        while claim := shared.claim(before, busy if is_last else ()):
            job = self._take_over(claim.record, claim.events)
            if job is None:
                shared.release(claim.record.entry, claim.record.id)
            elif claim.is_cancelled:
                self._set_final(job, "cancelled")
            elif job.record.status == "downloading":
                self._begin_download(job)
            else:
                return job
        return None

    def _take_over(self, record: JobRecord, events: list[dict[str, Any]]) -> Job | None:
        """Return the job of a record that this server has leased; None if it had to fail."""
        copy = self._jobs.get(record.id)
        job = self._restore(record)
        if copy is None:
            if job:
                job.events, job.published = events, len(events)
            return job
        self._jobs[record.id] = copy  # which streams of events wait for
        if job is None:
            return None
        copy.item, copy.record, copy.live, copy.position = job.item, job.record, None, None
        copy.space = job.space
        copy.events += events[len(copy.events) :]
        copy.published, copy.is_ours = len(copy.events), True
        return copy

    def _hand_over(self, job: Job) -> None:
        """Let another server continue a job, if there are others."""
        self._end_step(job, "interrupted")
        if job.is_persistent and self.is_stopping:
            heir = "another server or the next process" if self._shared else "the next process"
            logger.warning("job %s is suspended: %s continues it", job.record.id, heir)
        if not self._shared:
            return
        if job.is_persistent:
            if self._shared.holds(job.record):
                with suppress(ApiError):
                    self._publish(self._shared, job)
                is_downloading = job.record.status == "downloading"
                self._store.put(
                    job.record if is_downloading else job.record.replace(status="queued")
                )
            del job.events[job.published :]
            job.is_ours = False
        self._shared.release(job.record.entry, job.record.id)

    def _publish(self, shared: SharedStore, job: Job) -> None:
        """Show the progress of a job to the other servers."""
        events = job.events[job.published :]
        shared.publish(job.record, _get_state(job), events)
        job.published += len(events)

    def _read_shared(self, shared: SharedStore, id: str) -> JobRecord:
        """Return the record of a job of another server; raise `ApiError` if there is none."""
        job = self._jobs.get(id)
        (snapshot,) = shared.read([id], [len(job.events) if job else 0])
        self._update(id, snapshot)
        if snapshot is None:
            raise no_such_job()
        return snapshot.record

    def _follow(self, shared: SharedStore, ids: list[str]) -> None:
        """Read the progress of jobs of other servers."""
        jobs = [self._jobs.get(id) for id in ids]
        ids = [id for id, job in zip(ids, jobs) if not (job and job.is_ours)]
        after = [len(job.events) if job else 0 for job in jobs if not (job and job.is_ours)]
        for id, snapshot in zip(ids, shared.read(ids, after)):
            self._update(id, snapshot)

    def _update(self, id: str, snapshot: Snapshot | None) -> None:
        """Keep a copy of a job of another server up to date."""
        job = self._jobs.get(id)
        if job and job.is_ours:  # claimed meanwhile
            return
        if snapshot is None:
            if job:
                del self._jobs[id]
                job.record = job.record.replace(status="cancelled", finished=time.time())
                job.notify()
            return
        record = snapshot.record
        if job is None:
            try:
                request = parse_request(record.request)
                path = self.uploads / record.upload
                job = self._create_job(record, request, path, is_persistent=True)
            except ApiError:  # this server does not have the model
                return
            job.is_ours = False
        job.record, job.position = record, snapshot.position
        job.events += snapshot.events
        _set_state(job, snapshot.state)
        job.notify()

    async def _synchronize_forever(self, shared: SharedStore) -> None:
        """Renew the leases, publish the progress, and look for jobs to run."""
        while True:
            await asyncio.sleep(min(_SYNC_SECONDS, self.settings.lease_seconds / 4))
            with suppress(ApiError):  # which is in the log
                await self._synchronize(shared)

    async def _synchronize(self, shared: SharedStore) -> None:
        # In a thread, as a Redis that does not answer must not block the requests.
        lost, cancelled = await asyncio.to_thread(shared.renew, list(self.admission.held))
        jobs = [*self._running.values(), *self._downloads]
        for job in [job for job in jobs if job.is_persistent]:
            if job.record.id in lost:
                logger.error("job %s was taken over by another server", job.record.id)
                job.item.stop.set()
                if job in self._downloads:
                    self._downloads.pop(job).cancel()
                    self._hand_over(job)
                continue
            if job.record.id in cancelled:
                job.item.cancel.set()
                if job in self._downloads:
                    self.abandon(job)
                    continue
            self._publish(shared, job)
        for job in list(self._unsaved.values()):
            self._save_final(job)
        self._follow(
            shared,
            [id for id, job in self._jobs.items() if not (job.is_ours or job.record.is_final)],
        )
        self._dispatch()

    # ── clean up ──

    async def clean_up(self) -> None:
        """Delete jobs and results that have expired, or exceed the space for results."""
        if self._shared and not self._shared.begin_clean_up(self._clean_up_seconds):
            return
        oldest = time.time() - self.settings.keep_seconds
        kept = set()
        for record in self._store.list_finished():
            if (record.finished or 0) >= oldest:
                kept.add(record.entry)
            elif record.finished is not None:
                self._delete(record)
        busy = [*self._running.values(), *self._waiting, *self._copying]
        in_use = {job.record.entry for job in busy}
        if self._shared:
            unfinished = self._shared.list_unfinished()
            in_use |= {record.entry for record in unfinished} | self._shared.list_leased_entries()
            uploads = {record.upload for record in unfinished}
            await asyncio.to_thread(_delete_old_uploads, self.uploads, uploads)
        evicted = await asyncio.to_thread(self.results.evict, in_use, kept)
        self.counts["evicted"] += len(evicted)

    def _delete(self, record: JobRecord) -> None:
        self._store.remove(record.id)
        self._jobs.pop(record.id, None)
        if record.owns_entry:
            self.results.remove(record.entry)

    @property
    def _clean_up_seconds(self) -> float:
        periods = (self.settings.keep_seconds, self.settings.idle_unload or math.inf)
        return min(max(min(periods) / 4, 1), 60)

    async def _clean_up_forever(self) -> None:
        while True:
            await asyncio.sleep(self._clean_up_seconds)
            try:
                await self.clean_up()
            except ApiError:  # without Redis, later
                pass
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


def _delete_old_uploads(folder: Path, in_use: Collection[str]) -> None:
    """Delete the uploads that no job needs, and that are too old to be of a running request."""
    for path in folder.iterdir():
        with suppress(OSError):
            if path.name not in in_use and path.stat().st_mtime < time.time() - _MAX_UPLOAD_AGE:
                path.unlink()


def _get_state(job: Job) -> dict[str, Any]:
    """Return what other servers show of a running job."""
    elapsed = None if job.started_at is None else time.monotonic() - job.started_at
    state: dict[str, Any] = {"fraction": job.fraction, "stage": job.stage, "elapsed": elapsed}
    if job.record.status == "downloading":
        state["download"] = [job.received_bytes, job.total_bytes]
    if job.live is None:
        return state
    names = ("stems", "channels", "sample_rate", "length")
    return state | {"live": {name: getattr(job.live, name) for name in names}}


def _set_state(job: Job, state: dict[str, Any]) -> None:
    """Set what the server of a job has published."""
    job.fraction = 1.0 if job.record.status == "done" else state.get("fraction", 0.0)
    job.stage = state.get("stage", "")
    job.received_bytes, job.total_bytes = state.get("download", (0, None))
    elapsed = state.get("elapsed")
    job.started_at = None if elapsed is None else time.monotonic() - elapsed
    live = None if job.record.is_final else state.get("live")
    if not live:
        job.live = None
    elif job.live:  # the same object, as streams of stems watch its length
        job.live.length = live["length"]
    else:
        folder = WorkDir(job.item.output.folder, job.item.output.manifest).data_folder
        job.live = LivePreview(folder, **live | {"stems": tuple(live["stems"])})


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


def _find_model(name: str, base: ModelSpec) -> ModelSpec:
    """Return the model `name`; download a network of the community, whose file has its settings.

    Raises `ConfigError` if that fails.
    """
    try:
        pair = find_pair(name, base.repo)
        if pair is None and base.repo is None and name in load_catalog().networks:
            config, checkpoint = _pull_pair(name, base)
        elif pair is None:
            return replace(base, name=name)
        else:
            config, checkpoint = pair
        return CustomModelSpec(
            name=name, repo=base.repo, config=Config.from_file(config), checkpoint=checkpoint
        )
    except ModelLoadingError as error:
        raise ConfigError(f"models: {error}") from error


def _pull_pair(name: str, base: ModelSpec) -> list[Path]:
    """Return the files of a network of the community; log a download, which may take minutes."""
    is_cached = model_info(name, cache_dir=base.cache_dir).is_cached
    if not is_cached and not base.offline:
        import_library()  # if it is missing, nothing is downloaded
        logger.info("downloading %s", name)
    paths = pull(name, cache_dir=base.cache_dir, offline=base.offline)
    if not is_cached:
        digest = model_info(name, cache_dir=base.cache_dir).files[-1].sha256
        logger.info("downloaded %s; the sha256 of its weights, %s, is enforced", name, digest)
    return paths


def _find_stems(model: ModelSpec) -> tuple[str, ...] | None:
    """Return the stems that a network computes, or None if that shows when it is loaded."""
    if isinstance(model, CustomModelSpec):
        return tuple(model.config.model.output_stem_names)
    if model.repo is not None:
        return None
    try:
        return model_info(model.name).stems
    except ModelNotFound:
        return None
