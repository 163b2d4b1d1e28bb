"""Every address of the server: HTTP on one side, values and jobs on the other."""

import asyncio
import io
import json
import wave
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from fastapi import Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError

from demucs_infer import __version__
from demucs_infer.audio.formats import FORMATS
from demucs_infer.demo import song
from demucs_infer.server.cache import CachedStems
from demucs_infer.server.errors import ApiError
from demucs_infer.server.metrics import Metrics
from demucs_infer.server.middleware import client_of
from demucs_infer.server.openapi import (
    Capabilities,
    ErrorDetail,
    FormatView,
    Health,
    JobView,
    ModelView,
    PredictRequest,
    StemView,
)
from demucs_infer.server.queue import Job, JobQueue, Slot
from demucs_infer.server.responses import (
    StreamedFile,
    as_base64,
    as_zip,
    attachment,
    in_pieces,
    predictions,
)
from demucs_infer.server.schemas import MIME, SeparateRequest, enter, explain, read_wish
from demucs_infer.server.store import JobRecord
from demucs_infer.server.uploads import Upload, decode, receive, receive_body

STATIC = Path(__file__).parent / "page"


class Routes:
    """What answers each address."""

    def __init__(self, jobs: JobQueue, gauges: Metrics) -> None:
        self._jobs = jobs
        self._settings = jobs.settings
        self._gauges = gauges

    # ── operation ──

    async def health(self) -> JSONResponse:
        """200 once the first model is there, as load balancers and Vertex AI want it."""
        if self._jobs.is_stopping:
            return _state(503, "stopping")
        if not self._jobs.is_ready:
            return _state(503, "loading", self._jobs.problem)
        return _state(200, "healthy")

    async def livez(self) -> JSONResponse:
        """200 as long as the process answers."""
        return _state(200, "alive")

    async def metrics(self) -> Response:
        """Counters in the text format of Prometheus."""
        return Response(self._gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def menu(self) -> Capabilities:
        """The models and formats there are, and the limits."""
        jobs, settings = self._jobs, self._settings
        first = next(iter(jobs.models))
        return Capabilities(
            models=[
                ModelView(name=name, stems=None if stems is None else list(stems),
                          is_default=name == first)
                for name, stems in jobs.stems.items()
            ],
            formats=[
                FormatView(name=name, is_lossy=kind.is_lossy, type=MIME[name])
                for name, kind in FORMATS.items()
            ],
            max_bytes=settings.max_bytes,
            max_duration_seconds=settings.max_duration_seconds,
            keep_seconds=settings.keep_seconds,
            version=__version__,
        )  # fmt: skip

    # ── predictions ──

    async def predict(
        self, request: Request, flat: bool = Query(False, description="One track, as a plain map.")
    ) -> Response:
        """Stems in base64 for every instance, in order; a bad one says so in its place."""
        with _holding(self._jobs.admit(client_of(request.scope))):
            asked = await self._asked(request)
            if flat and len(asked.instances) > 1:
                raise ApiError(422, "several_instances", "flat=1 is for one instance")
            wish = read_wish({"format": "mp3", **asked.parameters})
            texts = [one.b64 for one in asked.instances]
            del asked
            jobs = [await self._instance(text, wish) for text in texts]
            del texts
            waited = [one for one in jobs if isinstance(one, Job)]
            await self._finished(request, waited)
        answers = [self._answer(one) for one in jobs]
        if all(isinstance(one, ApiError) for one in answers):
            raise answers[0]  # type: ignore[misc]  # all of them are
        plain = [one.as_json() if isinstance(one, ApiError) else one for one in answers]
        pieces = (
            as_base64(plain[0])
            if flat and isinstance(plain[0], CachedStems)
            else predictions(plain)
        )
        return StreamedFile(pieces, "application/json", after=lambda: self._clean(waited))

    async def _asked(self, request: Request) -> PredictRequest:
        settings = self._settings
        body = await receive_body(
            request, max_bytes=settings.max_json_bytes, seconds=settings.upload_seconds
        )
        try:
            found = await asyncio.to_thread(json.loads, body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "not_json", "the body is not JSON") from error
        try:
            asked = PredictRequest.model_validate(found)
        except ValidationError as error:
            raise ApiError(422, "invalid_request", explain(error)) from error
        if len(asked.instances) > settings.max_instances:
            message = f"{len(asked.instances)} instances, and {settings.max_instances} are allowed"
            raise ApiError(413, "too_many_instances", message)
        return asked

    async def _instance(self, text: str, wish: SeparateRequest) -> "Job | ApiError":
        folder, most = self._jobs.uploads, self._settings.max_bytes
        try:
            upload = await asyncio.to_thread(decode, text, folder, max_bytes=most)
            return await self._jobs.submit(upload, wish)
        except ApiError as refused:
            if refused.code in ("unknown_model", "invalid_parameters", "too_much_work"):
                raise  # it is not the track's fault
            return refused

    def _answer(self, job: "Job | ApiError") -> "CachedStems | ApiError":
        if isinstance(job, ApiError):
            return job
        try:
            if job.refused:
                return job.refused
            return self._jobs.entry(job.row)
        except ApiError as refused:
            return refused

    # ── files ──

    async def separate(self, request: Request) -> Response:
        """The stems as a zip; or one stem, when `Accept` asks for audio.

        Send the audio as the body with parameters in the query, or as a form.
        """
        with _holding(self._jobs.admit(client_of(request.scope))):
            upload, wish = await self._taken(request, request.headers.get("accept", ""))
            job = await self._jobs.submit(upload, wish)
            await self._finished(request, [job])
        if job.refused:
            raise job.refused
        entry = self._jobs.entry(job.row)
        stem = Path(job.row.name).stem
        headers = {"X-Demucs-Cached": "yes" if job.row.is_cached else "no"}
        if not _wants_audio(request.headers.get("accept", "")):
            headers["Content-Disposition"] = attachment(f"{stem}.zip")
            pieces, kind = as_zip(entry), "application/zip"
        elif len(entry.stems) != 1:  # of a model whose stems nobody knew before
            self._clean([job])
            raise _several([one.stem for one in entry.stems])
        else:
            one = entry.stems[0]
            headers["Content-Disposition"] = attachment(f"{stem} ({one.stem}){one.path.suffix}")
            headers["Content-Length"] = str(one.size)
            pieces, kind = in_pieces(one.path), MIME[wish.format]
        return StreamedFile(pieces, kind, headers=headers, after=lambda: self._clean([job]))

    async def _taken(self, request: Request, accept: str) -> tuple[Upload, SeparateRequest]:
        """The audio and the parameters of a request; nothing is left if they are wrong."""
        query: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            enter(query, name, value)
        settings = self._settings
        read_wish(query)  # before an upload that would be for nothing
        upload, fields = await receive(
            request,
            self._jobs.uploads,
            max_bytes=settings.max_bytes,
            seconds=settings.upload_seconds,
        )
        try:
            wish = read_wish(_with_format({**query, **fields}, accept))
            names = self._jobs.outputs(wish) if _wants_audio(accept) else None
            if names and len(names) != 1:
                raise _several(names)
            return upload, wish
        except BaseException:
            upload.path.unlink(missing_ok=True)
            raise

    async def _finished(self, request: Request, jobs: list[Job]) -> None:
        """Wait for the end of jobs; they end when the client goes away."""
        watching = asyncio.create_task(self._until_gone(request, jobs))
        try:
            for job in jobs:
                while not job.row.is_over:
                    if self._jobs.is_stopping and self._jobs.position(job.row.id) is not None:
                        raise ApiError(503, "stopping", "the server is about to stop", 30)
                    await job.news()
        finally:
            watching.cancel()
            for job in jobs:
                self._jobs.abandon(job)

    async def _until_gone(self, request: Request, jobs: list[Job]) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for job in jobs:
            self._jobs.abandon(job)

    def _clean(self, jobs: list[Job]) -> None:
        """Remove what was made for one request alone."""
        for job in jobs:
            if job.row.entry.endswith(job.row.id):
                self._jobs.results.remove(job.row.entry)

    # ── jobs ──

    async def create(self, request: Request) -> JSONResponse:
        """Begin a job; the answer says where to look for it."""
        ticket = self._jobs.admit(client_of(request.scope))
        try:
            upload, wish = await self._taken(request, "")
            job = await self._jobs.submit(upload, wish, ticket=ticket)
        except BaseException:
            ticket.release()
            raise
        where = f"v1/jobs/{job.row.id}"
        return JSONResponse(
            self._view(job.row).model_dump(),
            202,
            {"Location": f"{request.scope.get('root_path', '')}/{where}"},
        )

    async def job(self, id: str) -> JobView:
        """A job as it stands."""
        return self._view(self._jobs.row(id))

    async def events(self, id: str, request: Request) -> StreamingResponse:
        """What the engine does, as server-sent events; the last, `end`, is the job itself."""
        self._jobs.row(id)
        last = request.headers.get("last-event-id", "")
        after = int(last) if last.isdecimal() and len(last) < 9 else 0
        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(
            self._told(id, after), media_type="text/event-stream", headers=headers
        )

    async def _told(self, id: str, after: int) -> AsyncIterator[str]:
        job = self._jobs.live(id)
        if job:
            async for number, event in self._jobs.watch(job, after):
                if event is None:
                    yield ": still here\n\n"
                    continue
                name = event["event"]
                yield f"id: {number}\nevent: {name}\ndata: {json.dumps(event)}\n\n"
        with suppress(ApiError):  # forgotten meanwhile
            row = self._jobs.row(id)
            if row.is_over:
                yield f"event: end\ndata: {self._view(row).model_dump_json()}\n\n"

    async def stem(self, id: str, name: str) -> FileResponse:
        """A stem of a job; parts of it by `Range`."""
        row = self._jobs.row(id)
        entry = self._jobs.entry(row)
        for one in entry.stems:
            if name in (one.stem, one.path.name):
                return FileResponse(
                    one.path,
                    media_type=MIME[_format_of(row)],
                    headers={
                        "Content-Disposition": attachment(
                            f"{Path(row.name).stem} ({one.stem}){one.path.suffix}"
                        )
                    },
                )
        names = ", ".join(one.stem for one in entry.stems)
        raise ApiError(404, "no_such_stem", f"this job has no stem {name!r}; it has {names}")

    async def archive(self, id: str) -> StreamedFile:
        """All stems of a job as a zip."""
        row = self._jobs.row(id)
        headers = {"Content-Disposition": attachment(f"{Path(row.name).stem}.zip")}
        return StreamedFile(as_zip(self._jobs.entry(row)), "application/zip", headers=headers)

    async def cancel(self, id: str) -> Response:
        """End a job within a batch (202); one that is over is forgotten (204)."""
        row = self._jobs.cancel(id)
        if row is None:
            return Response(status_code=204)
        return JSONResponse(self._view(row).model_dump(), 202)

    def _view(self, row: JobRecord) -> JobView:
        job = self._jobs.live(row.id)
        stems: list[StemView] = []
        if row.status == "done":
            with suppress(ApiError):
                stems = [
                    StemView(name=one.stem, file=one.path.name, bytes=one.size,
                             url=f"{row.id}/stems/{one.stem}")
                    for one in self._jobs.entry(row).stems
                ]  # fmt: skip
        keep = self._settings.keep_seconds
        return JobView(
            id=row.id,
            status=row.status,
            name=row.name,
            model=row.wish.get("model") or next(iter(self._jobs.models)),
            format=_format_of(row),
            created=row.created,
            expires=None if row.finished is None else row.finished + keep,
            progress=job.fraction if job else float(row.status == "done"),
            stage=job.stage if job else "",
            seconds_left=job.seconds_left if job and not row.is_over else None,
            position=self._jobs.position(row.id),
            seconds=row.seconds,
            is_cached=row.is_cached,
            stems=stems,
            warnings=list(row.warnings),
            error=None if row.error is None else ErrorDetail(**row.error),
        )

    # ── for people ──

    async def page(self) -> FileResponse:
        """The page."""
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    async def docs(self) -> FileResponse:
        """The documentation, made of /openapi.json."""
        return FileResponse(STATIC / "docs.html", headers={"Cache-Control": "no-cache"})

    async def sample(self) -> Response:
        """A little song that was composed by a program, to try things with."""
        return Response(await asyncio.to_thread(_sample), media_type="audio/wav")


@contextmanager
def _holding(ticket: Slot) -> Iterator[None]:
    """Give a ticket back at the end."""
    try:
        yield
    finally:
        ticket.release()


@lru_cache(maxsize=1)
def _sample() -> bytes:
    file = io.BytesIO()
    found = song(3.0, seed=4)
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, found.sample_rate, 0, "NONE", ""))
        wav.writeframes((found.mix.mean(0) * 32767).round().short().numpy().astype("<i2").tobytes())
    return file.getvalue()


def _state(status: int, word: str, message: str = "") -> JSONResponse:
    return JSONResponse(Health(status=word, message=message).model_dump(), status)


def _format_of(row: JobRecord) -> str:
    return str(row.wish.get("format", SeparateRequest.model_fields["format"].default))


_FORMAT_OF = {
    **{kind: name for name, kind in MIME.items() if name != "alac"},
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/mp3": "mp3",
    "audio/x-flac": "flac",
    "audio/opus": "opus",
    "audio/m4a": "m4a",
}


def _several(names: Sequence[str]) -> ApiError:
    message = f"name one with stems=: {', '.join(names)}; or take a zip"
    return ApiError(406, "several_stems", message)


def _kinds(accept: str) -> list[str]:
    return [part.partition(";")[0].strip().lower() for part in accept.split(",")]


def _wants_audio(accept: str) -> bool:
    return _kinds(accept)[0].startswith("audio/")


def _with_format(fields: dict[str, str], accept: str) -> dict[str, str]:
    """The fields, with the format that `Accept` names."""
    kind = _kinds(accept)[0]
    if not kind.startswith("audio/") or kind == "audio/*":
        return fields
    if kind not in _FORMAT_OF:
        raise ApiError(406, "unknown_type", f"{kind} is not made; there is {', '.join(_FORMAT_OF)}")
    if fields.setdefault("format", _FORMAT_OF[kind]) != _FORMAT_OF[kind]:
        raise ApiError(406, "contradiction", f"format={fields['format']} is not {kind}")
    return fields
