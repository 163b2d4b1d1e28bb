"""The application: settings in, ASGI out."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.routing import Match

from demucs_infer import __version__
from demucs_infer.errors import ConfigError, is_disk_full
from demucs_infer.server.errors import ApiError, no_room
from demucs_infer.server.metrics import Metrics
from demucs_infer.server.middleware import ApiKeys, SecurityMiddleware, refusal
from demucs_infer.server.openapi import AUDIO, PREDICTION, Capabilities, Health, JobView, errors
from demucs_infer.server.queue import JobQueue
from demucs_infer.server.routes import STATIC, Routes
from demucs_infer.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 416: "bad_range"}


def create_app(settings: ServerSettings | None = None) -> FastAPI:
    """A server that is ready to run; its queue is `app.state.jobs`."""
    settings = settings or ServerSettings()
    jobs = JobQueue(settings)
    gauges = Metrics(jobs)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        try:
            await jobs.start()
        except Exception as error:
            app.state.failure = error  # for whoever started the server, and does not hear of it
            raise
        try:
            yield
        finally:
            await jobs.stop()

    app = FastAPI(
        title="demucs-infer",
        version=__version__,
        summary="Takes songs apart into stems.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.state.jobs = jobs
    app.state.failure = None
    _add_routes(app, Routes(jobs, gauges), settings)
    _refuse_doubles(app, settings)
    _add_errors(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type", "X-File-Name", "Range"],
            expose_headers=["Content-Disposition", "Retry-After", "Location"],
        )
    app.add_middleware(
        SecurityMiddleware,
        keys=ApiKeys(settings.api_keys),
        locked=("/v1", "/metrics", settings.predict_route),
        gauges=gauges,
        origins=settings.cors_origins,
        base_path=settings.base_path,
        is_logging=settings.access_log,
    )
    return app


def _add_routes(app: FastAPI, routes: Routes, settings: ServerSettings) -> None:
    def get(path: str, answer: Callable[..., Any], **more: Any) -> None:
        app.add_api_route(path, answer, methods=["GET"], **more)
        app.add_api_route(path, answer, methods=["HEAD"], **more | {"include_in_schema": False})

    def post(path: str, answer: Callable[..., Any], extra: dict[str, Any], **more: Any) -> None:
        app.add_api_route(
            path,
            answer,
            methods=["POST"],
            openapi_extra=extra,
            responses=errors(400, 406, 408, 413, 422, 429, 500, 503, 504)
            | more.pop("responses", {}),
            **more,
        )

    busy = {503: {"model": Health}}
    get(settings.health_route, routes.health, response_model=Health, responses=busy)
    if settings.health_route != "/readyz":
        get("/readyz", routes.health, response_model=Health, responses=busy)
    get("/livez", routes.livez, response_model=Health)
    get("/metrics", routes.metrics, response_class=PlainTextResponse, responses=errors())
    get("/v1/models", routes.menu, response_model=Capabilities, responses=errors())
    post(settings.predict_route, routes.predict, PREDICTION)
    post(
        "/v1/separate",
        routes.separate,
        AUDIO,
        response_class=Response,
        responses=_content("application/zip", "audio/*"),
    )
    post(
        "/v1/jobs",
        routes.create,
        AUDIO,
        status_code=202,
        responses={202: {"model": JobView}},
    )
    get("/v1/jobs/{id}", routes.job, response_model=JobView, responses=errors(404))
    plain = {"response_class": Response}  # whose kind is told below
    get(
        "/v1/jobs/{id}/events",
        routes.events,
        **plain,
        responses=errors(404) | _content("text/event-stream"),
    )
    get(
        "/v1/jobs/{id}/stems.zip",
        routes.archive,
        **plain,
        responses=errors(404, 409, 410) | _content("application/zip"),
    )
    get(
        "/v1/jobs/{id}/stems/{name}",
        routes.stem,
        **plain,
        responses=errors(404, 409, 410, 416)
        | {206: {"description": "A part."}}
        | _content("audio/*"),
    )
    app.add_api_route(
        "/v1/jobs/{id}",
        routes.cancel,
        methods=["DELETE"],
        status_code=202,
        responses=errors(404) | {202: {"model": JobView}, 204: {"description": "Forgotten."}},
    )
    get("/docs", routes.docs, include_in_schema=False)
    get("/sample.wav", routes.sample, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    if settings.page:
        get("/", routes.page, include_in_schema=False)


def _refuse_doubles(app: FastAPI, settings: ServerSettings) -> None:
    """Of two answers at one address only the first would be heard."""
    for name, method in (("predict_route", "POST"), ("health_route", "GET")):
        path = getattr(settings, name)
        scope = {"type": "http", "path": path, "method": method}
        if sum(route.matches(scope)[0] is Match.FULL for route in app.routes) > 1:
            raise ConfigError(f"{name} = {path!r} is where the server has something else")


def _content(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """A success that is no JSON, for the documentation."""
    return {200: {"content": {kind: {} for kind in kinds}}}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "refused")
        answer = refusal(ApiError(error.status_code, code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        clauses = [f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()[:8]]
        return refusal(ApiError(422, "invalid_request", "; ".join(clauses)))

    @app.exception_handler(OSError)
    async def system(_: Request, error: OSError) -> JSONResponse:
        if not is_disk_full(error):
            raise error
        logger.error("a request failed: %s", error)
        return refusal(no_room())

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        return refusal(ApiError(500, "failed", "something went wrong; the server's log says what"))
