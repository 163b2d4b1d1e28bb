"""The handlers of every route: HTTP on one side, values and jobs on the other."""

import asyncio
import io
import json
import time
import wave
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from anyio import CapacityLimiter, move_on_after, to_thread
from fastapi import Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError

from demucs_infer import __version__
from demucs_infer.audio.formats import FORMATS
from demucs_infer.demo import song
from demucs_infer.server.admission import MemoryBudget, Slot, UploadPlace
from demucs_infer.server.cache import CachedStem, CachedStems
from demucs_infer.server.errors import ApiError, describe_invalid_fields, no_such_job, stopping
from demucs_infer.server.live_stems import LiveStem
from demucs_infer.server.metrics import Metrics
from demucs_infer.server.middleware import get_client
from demucs_infer.server.preview import Preview, encode_wav, measure_part
from demucs_infer.server.queue import Job, JobQueue
from demucs_infer.server.remote_files import JobTargets, pop_remote_fields
from demucs_infer.server.responses import (
    REVALIDATE,
    StemResponse,
    StreamedFile,
    content_disposition,
    is_not_modified,
    iter_base64,
    iter_file,
    iter_inference,
    iter_predictions,
    iter_zip,
    not_modified,
    zip_response,
)
from demucs_infer.server.schemas import (
    MIME_TYPES,
    REMOTE_FIELDS,
    Capabilities,
    DownloadView,
    ErrorDetail,
    FormatView,
    Health,
    InferModelView,
    InferRequest,
    InferServerView,
    InferTensorView,
    JobList,
    JobView,
    ModelView,
    PredictRequest,
    PreviewView,
    RequestSchema,
    SeparateRequest,
    StemView,
    Waveform,
    add_field,
    parse_request,
)
from demucs_infer.server.sharing import SHARED_PREFIX
from demucs_infer.server.store import JobRecord
from demucs_infer.server.uploads import (
    Upload,
    UploadWriter,
    decode_base64,
    receive_body,
    receive_upload,
    remove_upload,
)
from demucs_infer.server.urls import RemoteUrl

_Value = TypeVar("_Value")
_Body = TypeVar("_Body", bound=BaseModel)

STATIC = Path(__file__).parent / "page"


class Routes:
    """The handlers of all routes."""

    def __init__(self, jobs: JobQueue, metrics: Metrics) -> None:
        self._jobs = jobs
        self._settings = jobs.settings
        self._metrics = metrics
        self._decoders = CapacityLimiter(2)
        self._memory = MemoryBudget(jobs.settings.json_memory_bytes)
        jobs.describe = lambda record: self._view(record).model_dump_json()

    # ── operation ──

    async def get_health(self) -> JSONResponse:
        """Return 200 once the first model is loaded, for load balancers and Vertex AI."""
        if self._jobs.is_stopping:
            return _health(503, "stopping")
        if self._jobs.is_draining:
            return _health(503, "draining")
        if self._jobs.dead_workers:
            return _health(503, "dead", "a worker died: restart the server")
        if not self._jobs.is_ready:
            return _health(503, "loading", self._jobs.load_error)
        return _health(200, "healthy")

    async def get_liveness(self) -> JSONResponse:
        """Return 200 while the process responds, and does not have to be restarted."""
        if self._jobs.dead_workers:
            return _health(503, "dead", "a worker died: restart the server")
        return _health(200, "alive")

    async def get_metrics(self) -> Response:
        """Return the metrics in the text format of Prometheus."""
        await self._jobs.disk.refresh()
        text = self._metrics.render()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self) -> Capabilities:
        """List the available models and formats, and the limits."""
        jobs, settings = self._jobs, self._settings
        return Capabilities(
            models=[self._view_model(name) for name in jobs.models],
            formats=[
                FormatView(name=name, is_lossy=format.is_lossy, type=MIME_TYPES[name])
                for name, format in FORMATS.items() if name in MIME_TYPES
            ],
            max_bytes=settings.max_bytes,
            max_duration_seconds=settings.max_duration_seconds,
            keep_seconds=settings.keep_seconds,
            version=__version__,
        )  # fmt: skip

    async def get_model(self, name: str) -> ModelView:
        """Return a model and its state."""
        self._check_model(name)
        return self._view_model(name)

    async def load_model(self, name: str) -> ModelView:
        """Load a model on every device, so that its first request does not wait."""
        self._check_model(name)
        await self._jobs.load_model(name)
        await asyncio.sleep(0)  # so that the callback about its state has run
        return self._view_model(name)

    async def unload_model(self, name: str) -> ModelView:
        """Unload a model and free its memory; the next request loads it again."""
        self._check_model(name)
        await self._jobs.unload_model(name)
        await asyncio.sleep(0)
        return self._view_model(name)

    def _check_model(self, name: str) -> None:
        if name not in self._jobs.models:
            names = ", ".join(self._jobs.models)
            raise ApiError("no_such_model", f"unknown model {name!r}: expected one of {names}")

    def _view_model(self, name: str) -> ModelView:
        stems = self._jobs.default_stems(name)
        return ModelView(
            name=name,
            stems=None if stems is None else list(stems),
            is_default=name == next(iter(self._jobs.models)),
            state="loaded" if self._jobs.loaded[name] > 0 else "unloaded",
        )

    # ── predictions ──

    async def predict(
        self,
        request: Request,
        flat: bool = Query(False, description="For one instance: return its stems alone."),
    ) -> Response:
        """Return the stems of each instance in base64, or its error, in the order received."""
        with self._jobs.admission.begin_upload(get_client(request.scope).name) as place:
            async with self._hold_memory(request):
                body = await self._read_prediction(request, place)
                slot = self._jobs.admission.reserve(place)
                with _release_on_error(slot):
                    if flat and len(body.instances) > 1:
                        raise ApiError("several_instances", "flat=1 requires exactly one instance")
                    parameters = parse_request({"format": "mp3", **body.parameters})
                    texts = [instance.b64 for instance in body.instances]
                    del body  # megabytes of base64, which are not needed while the jobs run
                    results = [
                        await self._submit_instance(text, parameters, slot.client) for text in texts
                    ]
                    del texts
        with _release_at_end(slot):
            jobs = [result for result in results if isinstance(result, Job)]
            await self._wait_for(request, jobs)
        outcomes = [self._get_outcome(result) for result in results]
        if all(isinstance(outcome, ApiError) for outcome in outcomes):
            raise outcomes[0]  # type: ignore[misc]  # all of them are errors
        values = [one.to_json() if isinstance(one, ApiError) else one for one in outcomes]
        content = (
            iter_base64(values[0])
            if flat and isinstance(values[0], CachedStems)
            else iter_predictions(values)
        )
        return StreamedFile(
            content,
            "application/json",
            headers=_name_inputs(results),
            after=lambda: self._delete_uncached(jobs),
        )

    # ── the open inference protocol of KServe and Triton, version 2 ──

    async def get_server_metadata(self) -> InferServerView:
        """Return the name and the version of the server."""
        return InferServerView(name="demucs-infer", version=__version__)

    async def get_model_metadata(self, name: str) -> InferModelView:
        """Return what a model takes and returns; its outputs are unknown until it was loaded."""
        self._check_model(name)
        stems = self._jobs.default_stems(name) or ()
        return InferModelView(
            name=name,
            inputs=[InferTensorView(name="audio")],
            outputs=[InferTensorView(name=stem) for stem in stems],
        )

    async def get_model_readiness(self, name: str) -> JSONResponse:
        """Return 200 if a model is loaded, and 503 if its first request would have to wait."""
        self._check_model(name)
        is_ready = self._jobs.is_ready and self._jobs.loaded[name] > 0
        return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    async def infer(self, name: str, request: Request) -> Response:
        """Return the stems of one track; audio and stems are base64 in tensors of bytes."""
        self._check_model(name)
        with self._jobs.admission.begin_upload(get_client(request.scope).name) as place:
            async with self._hold_memory(request):
                body = await self._read_json(request, place, InferRequest)
                slot = self._jobs.admission.reserve(place)
                with _release_on_error(slot):
                    parameters = parse_request(
                        {"format": "wav", **body.separation_parameters, "model": name}
                    )
                    id, text = body.id, body.inputs[0].data[0]
                    del body
                    result = await self._submit_instance(text, parameters, slot.client)
                    del text
        with _release_at_end(slot):
            jobs = [result] if isinstance(result, Job) else []
            await self._wait_for(request, jobs)
        outcome = self._get_outcome(result)
        if isinstance(outcome, ApiError):
            raise outcome
        return StreamedFile(
            iter_inference(outcome, name, id),
            "application/json",
            after=lambda: self._delete_uncached(jobs),
        )

    def _hold_memory(self, request: Request) -> AbstractAsyncContextManager[None]:
        """Return a context that waits for, and holds, the memory of a prediction's body."""
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() and len(length) < 16 else inf
        size = min(size, self._settings.max_json_bytes)
        # The bytes, their text, and the strings of the parsed JSON.
        return self._memory.hold(3 * int(size), self._settings.upload_seconds)

    async def _read_json(self, request: Request, place: UploadPlace, kind: type[_Body]) -> _Body:
        max_bytes = self._settings.max_json_bytes
        data = await receive_body(request, max_bytes=max_bytes, place=place)
        try:
            value = await asyncio.to_thread(json.loads, data)
        except (ValueError, RecursionError) as error:
            raise ApiError("not_json", "the body is not valid JSON") from error
        del data
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise ApiError("invalid_request", describe_invalid_fields(error)) from error

    async def _read_prediction(self, request: Request, place: UploadPlace) -> PredictRequest:
        settings = self._settings
        body = await self._read_json(request, place, PredictRequest)
        if len(body.instances) > settings.max_instances:
            raise ApiError(
                "too_many_instances",
                f"{len(body.instances)} instances in one request (limit {settings.max_instances})",
            )
        return body

    async def _submit_instance(
        self, text: str, parameters: SeparateRequest, client: str
    ) -> "Job | ApiError":
        folder, max_bytes = self._jobs.uploads, self._settings.max_bytes
        try:
            promise = await self._jobs.disk.reserve(min(3 * len(text) // 4, max_bytes))
            upload = await asyncio.to_thread(
                decode_base64, text, folder, promise, max_bytes=max_bytes
            )
            return await self._jobs.submit(upload, parameters, client=client)
        except ApiError as error:
            if error.code in ("unknown_model", "invalid_parameters", "too_much_work"):
                raise  # concerns the whole request and not this track
            return error

    def _get_outcome(self, result: "Job | ApiError") -> "CachedStems | ApiError":
        if isinstance(result, ApiError):
            return result
        try:
            return result.error or self._jobs.get_stems(result.record)
        except ApiError as error:
            return error

    # ── files ──

    async def separate(self, request: Request) -> Response:
        """Return the stems as a zip, or a single stem if `Accept` is an audio type.

        Send the audio as the body with parameters in the query, or as a form.
        """
        accept = request.headers.get("accept", "")
        with self._jobs.admission.begin_upload(get_client(request.scope).name) as place:
            upload, parameters, slot, _ = await self._read_upload(request, accept, place, "url")
            assert isinstance(upload, Upload)
        with _release_at_end(slot):
            job = await self._jobs.submit(upload, parameters, client=slot.client)
            await self._wait_for(request, [job])
        if job.error:
            raise job.error
        entry = self._jobs.get_stems(job.record)
        headers = {
            "X-Demucs-Cached": "yes" if job.record.is_cached else "no",
            **_name_inputs([job]),
        }
        if not _accepts_audio(accept):
            headers["Content-Disposition"] = _name_zip(job.record)
            content, media_type = iter_zip(entry), "application/zip"
        elif len(entry.stems) != 1:  # not known before the model was loaded
            self._delete_uncached([job])
            raise _several_stems([stem.stem for stem in entry.stems])
        else:
            stem = entry.stems[0]
            headers["Content-Disposition"] = _name_stem(job.record, stem)
            headers["Content-Length"] = str(stem.size)
            content, media_type = iter_file(stem.path), MIME_TYPES[job.item.request.output.format]
        return StreamedFile(
            content, media_type, headers=headers, after=lambda: self._delete_uncached([job])
        )

    async def _read_upload(
        self,
        request: Request,
        accept: str,
        place: UploadPlace,
        *remote_fields: str,
        downloads: bool = True,
    ) -> tuple[Upload | RemoteUrl, SeparateRequest, Slot, JobTargets]:
        """Return audio, parameters, a place in the queue, and URLs; delete the audio on errors.

        Without `downloads`, audio at a URL is only checked, as far as that is possible at once.
        """
        query: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            add_field(query, name, value)
        remote, disk, has_audio = self._jobs.remote, self._jobs.disk, True

        def parse(fields: Mapping[str, Any]) -> tuple[SeparateRequest, str, JobTargets]:
            values = {**query, **fields}
            urls = pop_remote_fields(values, *remote_fields)
            parameters = parse_request(_add_format(values, accept))
            stems = self._jobs.output_stems(parameters) if _accepts_audio(accept) else None
            if stems and len(stems) != 1:
                raise _several_stems(stems)
            return parameters, urls.get("url", ""), remote.read_targets(urls)

        async def fetch(
            fields: Mapping[str, Any], writer: UploadWriter
        ) -> Upload | RemoteUrl | None:
            nonlocal has_audio
            has_audio = False
            _, url, _ = parse(fields)  # reports invalid fields before the download
            if url and downloads:
                writer.promise = await disk.reserve(self._settings.max_bytes)
                return await remote.download(url, place, writer, request=request)
            return await remote.check_input(url) if url else None

        values: dict[str, Any] = dict(query)
        pop_remote_fields(values, *remote_fields)
        parse_request(values)  # reports an invalid query before the upload
        upload, fields = await receive_upload(
            request,
            self._jobs.uploads,
            max_bytes=self._settings.max_bytes,
            place=place,
            fetch=fetch,
            reserve=disk.reserve,
        )
        try:
            parameters, url, targets = parse(fields)
            if url and has_audio:
                raise ApiError("several_files", "the request has a file and a url: send one")
            return upload, parameters, self._jobs.admission.reserve(place), targets
        except BaseException:
            if isinstance(upload, Upload):
                remove_upload(upload.path)
            raise

    async def _wait_for(self, request: Request, jobs: list[Job]) -> None:
        """Wait until the jobs have finished; cancel them if the client disconnects."""
        watcher = asyncio.create_task(self._abandon_on_disconnect(request, jobs))
        try:
            for job in jobs:
                while not job.record.is_final:
                    is_waiting = self._jobs.get_position(job.record.id) is not None
                    seconds = self._jobs.stop_at - time.monotonic()
                    if self._jobs.is_stopping and (is_waiting or seconds <= 0):
                        raise stopping()
                    with move_on_after(seconds):
                        await job.wait_for_update()
        finally:
            watcher.cancel()
            for job in jobs:
                self._jobs.abandon(job)

    async def _abandon_on_disconnect(self, request: Request, jobs: list[Job]) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for job in jobs:
            self._jobs.abandon(job)

    def _delete_uncached(self, jobs: list[Job]) -> None:
        """Delete the results of `no_cache` jobs."""
        for job in jobs:
            if job.record.owns_entry:
                self._jobs.results.remove(job.record.entry)

    # ── jobs ──

    async def create_job(self, request: Request) -> JSONResponse:
        """Create a job; `Location` is its address. A track at a `url` is downloaded afterwards."""
        with self._jobs.admission.begin_upload(get_client(request.scope).name) as place:
            source, parameters, slot, targets = await self._read_upload(
                request, "", place, *REMOTE_FIELDS, downloads=False
            )
        with _release_on_error(slot):
            owner = get_client(request.scope).owner
            if isinstance(source, Upload):
                job = await self._jobs.submit(
                    source,
                    parameters,
                    client=slot.client,
                    slot=slot,
                    owner=owner,
                    targets=targets,
                )
            else:
                job = await self._jobs.submit_url(
                    source, parameters, slot=slot, owner=owner, targets=targets
                )
        location = f"{request.scope.get('root_path', '')}/v1/jobs/{job.record.id}"
        return JSONResponse(self._view(job.record).model_dump(), 202, {"Location": location})

    async def list_jobs(self, request: Request, limit: int = Query(50, ge=1, le=200)) -> JobList:
        """List the jobs of this client: of its API key, or of the secret in `X-Client-Id`."""
        owner = get_client(request.scope).owner
        if not owner:
            raise ApiError(
                "no_client",
                "no client to list the jobs of: send the header X-Client-Id, a secret of 16 to 64 "
                "letters, digits, - or _, here and with new jobs",
            )
        return JobList(
            jobs=[self._view(record) for record in self._jobs.list_records(owner, limit)]
        )

    def _get_record(self, id: str, request: Request) -> JobRecord:
        """Return the record of a job that is to be read, by its id or by its shared id."""
        if id.startswith(SHARED_PREFIX):
            return self._jobs.get_shared_record(id)
        return self._get_own_record(id, request)

    def _get_own_record(self, id: str, request: Request) -> JobRecord:
        """Return the record of a job; raise `ApiError` if it belongs to another API key."""
        record, client = self._jobs.get_record(id), get_client(request.scope)
        if client.has_key and record.owner not in ("", client.owner):
            raise no_such_job()
        return record

    async def get_job(self, id: str, request: Request) -> JobView:
        """Return the state of a job."""
        return self._view(self._get_record(id, request), id)

    async def stream_job_events(self, id: str, request: Request) -> StreamingResponse:
        """Stream the events of a job (server-sent events); the last, `end`, is the job itself."""
        record = self._get_record(id, request)
        last = request.headers.get("last-event-id", "")
        after = int(last) if last.isdecimal() and len(last) < 9 else 0
        return StreamingResponse(
            self._iter_events(record.id, after, id),
            media_type="text/event-stream",
            headers={"X-Accel-Buffering": "no"},
        )

    async def _iter_events(self, id: str, after: int, shown_id: str) -> AsyncIterator[str]:
        job = self._jobs.get_job(id)
        if job:
            async for number, event in self._jobs.stream_events(job, after):
                if event is None:
                    yield ": keep-alive\n\n"
                    continue
                name = event["event"]
                yield f"id: {number}\nevent: {name}\ndata: {json.dumps(event)}\n\n"
        with suppress(ApiError):  # the job was deleted meanwhile
            record = self._jobs.get_record(id)
            if record.is_final:
                yield f"event: end\ndata: {self._view(record, shown_id).model_dump_json()}\n\n"

    async def get_job_stem(
        self,
        id: str,
        name: str,
        request: Request,
        live: bool = Query(
            False, description="While the job runs: the stem as it is made, in `format`."
        ),
        format: Literal["wav", "flac", "mp3"] = Query(
            "wav", description="Of `live`, while the job runs; wav and flac have 16 bits."
        ),
    ) -> Response:
        """Return a stem of a job, or parts of it (`Range`).

        With `live`, the stem of a running job begins at once and grows until the job ends, in a
        format of its own: a format that writes its length or an index at the end cannot be sent so.
        Samples above full scale are limited: the gain against clipping is known at the end only.
        Of a finished job, it is the file.
        """
        record = self._get_record(id, request)
        if live and not record.is_final:
            return await self._stream_live_stem(id, name, format)
        entry = await self._jobs.get_verified_stems(record)
        for stem in entry.stems:
            if name in (stem.stem, stem.path.name):
                etag = f'"{stem.sha256}"'
                if is_not_modified(request, etag):
                    return not_modified(etag)
                return StemResponse(
                    stem.path,
                    media_type=MIME_TYPES[_get_format(record)],
                    headers={
                        "Content-Disposition": _name_stem(record, stem),
                        "ETag": etag,
                        "Cache-Control": REVALIDATE,
                    },
                )
        raise _no_such_stem(name, [stem.stem for stem in entry.stems])

    async def _stream_live_stem(self, id: str, name: str, format: str) -> Response:
        job = self._jobs.get_job(id)
        if job is None or job.live is None:
            raise ApiError("not_done", "the job has not begun yet: try again")
        if name not in job.live.stems:
            raise _no_such_stem(name, job.live.stems)
        try:
            stem = LiveStem(job, job.live, name, format, self._decoders)
        except FileNotFoundError as error:
            raise ApiError("not_done", "the stem cannot be read now: try again") from error
        try:
            await stem.begin()
        except BaseException:
            stem.close()
            raise
        headers = {"Cache-Control": "no-store"}
        if stem.num_bytes is not None:
            headers["Content-Length"] = str(stem.num_bytes)
        return StreamedFile(
            stem.iter_bytes(), MIME_TYPES[format], headers=headers, after=stem.close
        )

    async def get_stem_part(
        self,
        id: str,
        name: str,
        request: Request,
        start: float = Query(0, ge=0, le=1e6, description="Seconds."),
        duration: float = Query(5, gt=0, le=60, description="Seconds."),
    ) -> Response:
        """Return a part of a stem as wav, also while the job runs; empty if it is not there yet.

        What a running job has so far may be louder than the final files: the gain against clipping
        is known at the end only.
        """
        preview = self._get_preview(id, name, request)
        rate = preview.sample_rate
        first, last = round(start * rate), round((start + duration) * rate)
        samples = await self._read_preview(preview.read, name, first, last)
        return Response(await asyncio.to_thread(encode_wav, samples, rate), media_type="audio/wav")

    async def get_stem_waveform(
        self,
        id: str,
        name: str,
        request: Request,
        start: float = Query(0, ge=0, le=1e6, description="Seconds."),
        duration: float | None = Query(
            None, gt=0, le=600, description="Seconds (default: the whole track)."
        ),
    ) -> Waveform:
        """Return the waveform of a stem or of a part of it, also while the job runs."""
        preview = self._get_preview(id, name, request)
        available = preview.count_frames()
        if duration is None:
            peaks = await self._read_preview(preview.measure, name)
        else:
            rate = preview.sample_rate
            first, last = round(start * rate), max(round((start + duration) * rate), 1)
            peaks = await self._read_preview(measure_part, preview, name, first, last)
        return Waveform(
            peaks=[round(float(peak), 4) for peak in peaks],
            available_seconds=available / preview.sample_rate,
            duration_seconds=max(preview.length, available) / preview.sample_rate,
        )

    def _get_preview(self, id: str, name: str, request: Request) -> Preview:
        preview = self._jobs.get_preview(self._get_record(id, request))
        if name not in preview.stems:
            raise _no_such_stem(name, preview.stems)
        return preview

    async def _read_preview(self, read: Callable[..., _Value], *arguments: object) -> _Value:
        """Read samples in a thread; few at a time, as decoding takes a core."""
        try:
            return await to_thread.run_sync(read, *arguments, limiter=self._decoders)
        except FileNotFoundError as error:  # the job has just finished, or its stems were deleted
            raise ApiError("not_done", "the job has just finished: try again") from error

    async def get_job_zip(self, id: str, request: Request) -> Response:
        """Return all stems of a job as a zip, or a part of it (`Range`)."""
        record = self._get_record(id, request)
        entry = await self._jobs.get_verified_stems(record)
        return zip_response(request, entry, {"Content-Disposition": _name_zip(record)})

    async def cancel_job(self, id: str, request: Request) -> Response:
        """Cancel an unfinished job (202), or delete a finished one (204)."""
        record = self._jobs.cancel(self._get_own_record(id, request).id)
        if record is None:
            return Response(status_code=204)
        return JSONResponse(self._view(record).model_dump(), 202)

    def _view(self, record: JobRecord, shown_id: str = "") -> JobView:
        """Return a job as JSON; one that is shared has its shared id alone."""
        id = shown_id or record.id
        base = f"{self._settings.base_path}/v1/jobs"
        job = self._jobs.get_job(record.id)
        stems: list[StemView] = []
        if record.status == "done":
            with suppress(ApiError):  # the stems have expired
                stems = [
                    StemView(name=stem.stem, file=stem.path.name, bytes=stem.size,
                             url=f"{base}/{id}/stems/{quote(stem.stem)}")
                    for stem in self._jobs.get_stems(record).stems
                ]  # fmt: skip
        keep = self._settings.keep_seconds
        shared = self._jobs.shared_ids if record.status == "done" else None
        return JobView(
            id=id,
            status=record.status,
            name=record.name,
            input_sha256=record.sha256,
            model=record.request.get("model") or next(iter(self._jobs.models)),
            format=_get_format(record),
            created=record.created,
            expires=None if record.finished is None else record.finished + keep,
            progress=job.fraction if job else float(record.status == "done"),
            stage=job.stage if job else "",
            download=_view_download(job) if job and record.status == "downloading" else None,
            seconds_left=job.seconds_left if job and not record.is_final else None,
            position=self._jobs.get_position(record.id),
            seconds=record.seconds,
            is_cached=record.is_cached,
            shared_id=shared.make(record.id) if shared else None,
            stems=stems,
            output=record.output or None,
            preview=self._view_preview(record),
            warnings=list(record.warnings),
            error=None if record.error is None else ErrorDetail(**record.error),
        )

    def _view_preview(self, record: JobRecord) -> PreviewView | None:
        try:
            preview = self._jobs.get_preview(record)
        except ApiError:
            return None
        rate, length = preview.sample_rate, preview.length
        return PreviewView(
            stems=list(preview.stems),
            sample_rate=rate,
            available_seconds=preview.count_frames() / rate,
            duration_seconds=length / rate if length else None,
        )

    # ── pages ──

    async def get_page(self, request: Request) -> Response:
        """Return the page."""
        return _page_response(request, "index.html")

    async def get_docs(self, request: Request) -> Response:
        """Return the API documentation, which is built from /openapi.json."""
        return _page_response(request, "docs.html")

    async def get_sample(self) -> Response:
        """Return a short generated song to try the server with."""
        return Response(await asyncio.to_thread(_make_sample), media_type="audio/wav")


@contextmanager
def _release_at_end(slot: Slot) -> Iterator[None]:
    try:
        yield
    finally:
        slot.release()


@contextmanager
def _release_on_error(slot: Slot) -> Iterator[None]:
    try:
        yield
    except BaseException:
        slot.release()
        raise


@lru_cache(maxsize=1)
def _make_sample() -> bytes:
    file = io.BytesIO()
    sample = song(3.0, seed=4)
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, sample.sample_rate, 0, "NONE", ""))
        mono = (sample.mix.mean(0) * 32767).round().short()
        wav.writeframes(mono.numpy().astype("<i2").tobytes())
    return file.getvalue()


def _page_response(request: Request, name: str) -> Response:
    path = STATIC / name
    status = path.stat()
    etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
    if is_not_modified(request, etag):
        return not_modified(etag)
    return FileResponse(path, headers={"ETag": etag, "Cache-Control": "no-cache"})


def _no_such_stem(name: str, names: Sequence[str]) -> ApiError:
    return ApiError(
        "no_such_stem", f"this job has no stem {name!r}: expected one of {', '.join(names)}"
    )


def _health(status_code: int, status: str, message: str = "") -> JSONResponse:
    return JSONResponse(Health(status=status, message=message).model_dump(), status_code)


def _view_download(job: Job) -> DownloadView:
    return DownloadView(received_bytes=job.received_bytes, total_bytes=job.total_bytes)


def _get_format(record: JobRecord) -> str:
    return str(record.request.get("format", RequestSchema.model_fields["format"].default))


def _name_inputs(results: Sequence[Job | ApiError]) -> dict[str, str]:
    """Return the header with the sha256 of each upload, `-` for one that could not be read."""
    digests = [result.record.sha256 if isinstance(result, Job) else "-" for result in results]
    return {"X-Demucs-Input-Sha256": ", ".join(digests)}


def _name_stem(record: JobRecord, stem: CachedStem) -> str:
    return content_disposition(f"{Path(record.name).stem} ({stem.stem}){stem.path.suffix}")


def _name_zip(record: JobRecord) -> str:
    return content_disposition(f"{Path(record.name).stem}.zip")


# ── the Accept header ──

_FORMATS_BY_TYPE = {
    **{media_type: name for name, media_type in MIME_TYPES.items() if name != "alac"},
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/mp3": "mp3",
    "audio/x-flac": "flac",
    "audio/opus": "opus",
    "audio/m4a": "m4a",
}


def _several_stems(names: Sequence[str]) -> ApiError:
    return ApiError(
        "several_stems",
        f"the result has several stems ({', '.join(names)}): choose one with stems=, "
        "or accept application/zip",
    )


def _first_media_type(accept: str) -> str:
    return accept.partition(",")[0].partition(";")[0].strip().lower()


def _accepts_audio(accept: str) -> bool:
    return _first_media_type(accept).startswith("audio/")


def _add_format(fields: dict[str, Any], accept: str) -> dict[str, Any]:
    """Return the fields with the format that `Accept` requests; raise `ApiError` if they differ."""
    media_type = _first_media_type(accept)
    if not _accepts_audio(accept) or media_type == "audio/*":
        return fields
    if media_type not in _FORMATS_BY_TYPE:
        raise ApiError(
            "unknown_type",
            f"unsupported type {media_type}: expected one of {', '.join(_FORMATS_BY_TYPE)}",
        )
    format = _FORMATS_BY_TYPE[media_type]
    if fields.setdefault("format", format) != format:
        raise ApiError(
            "contradiction", f"format={fields['format']} contradicts 'Accept: {media_type}'"
        )
    return fields
