"""Build the ASGI application from settings: routes, middleware and error handlers."""

import sqlite3
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
from demucs_infer.errors import ConfigError
from demucs_infer.server.errors import ApiError, from_exception
from demucs_infer.server.metrics import Metrics
from demucs_infer.server.middleware import (
    AccessMiddleware,
    AllowedHosts,
    ApiKeys,
    RecordMiddleware,
)
from demucs_infer.server.queue import JobQueue
from demucs_infer.server.responses import error_response
from demucs_infer.server.routes import STATIC, Routes
from demucs_infer.server.schemas import (
    AUDIO,
    INFERENCE,
    JOB,
    PREDICTION,
    SECURITY_SCHEMES,
    Capabilities,
    Health,
    InferModelView,
    InferServerView,
    JobList,
    JobView,
    ModelView,
    Waveform,
    add_shared_schemas,
    error_responses,
)
from demucs_infer.server.settings import ServerSettings
from demucs_infer.server.sharing import SHARED_PREFIX

_HEALTH_PATHS = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
_PARTIAL: dict[int | str, dict[str, Any]] = {
    206: {"description": "The requested range."},
    304: {"description": "The client has it already (`If-None-Match`)."},
}


def create_app(settings: ServerSettings | None = None) -> FastAPI:
    """Return an application that is ready to run; its queue is `app.state.jobs`."""
    settings = settings or ServerSettings()
    jobs = JobQueue(settings)
    metrics = Metrics(jobs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await jobs.start()
        except Exception as error:
            app.state.failure = error  # for `run.serve`, as uvicorn only logs it
            raise
        try:
            yield
        finally:
            await jobs.stop()

    app = FastAPI(
        title="demucs-infer",
        version=__version__,
        summary="Separates music into stems.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.jobs = jobs
    app.state.failure = None
    _add_routes(app, Routes(jobs, metrics), settings)
    _check_route_conflicts(app, settings)
    _describe_security(app, settings)
    _add_error_handlers(app)
    keys = ApiKeys(settings.api_keys)
    app.add_middleware(
        AccessMiddleware,
        needs_key=bool(keys),
        protected_paths=("/v1", "/v2", "/metrics", settings.predict_route),
        health_paths=(*_HEALTH_PATHS, settings.health_route),
        allowed_hosts=AllowedHosts.make(settings.allowed_host_names, settings.host),
        allowed_origins=settings.cors_origins,
        open_prefix=f"/v1/jobs/{SHARED_PREFIX}" if settings.share_links else None,
        max_requests=max(4 * settings.max_queue, 256),
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "Authorization", "X-API-Key", "X-Client-Id", "Content-Type", "X-File-Name", "Range",
            ],
            expose_headers=["Content-Disposition", "Retry-After", "Location", "X-Request-Id"],
        )  # fmt: skip
    app.add_middleware(
        RecordMiddleware,
        keys=keys,
        metrics=metrics,
        tracing=jobs.tracing,
        base_path=settings.base_path,
        is_logging=settings.access_log,
    )
    return app


def _add_routes(app: FastAPI, routes: Routes, settings: ServerSettings) -> None:
    def get(path: str, handler: Callable[..., Any], **options: Any) -> None:
        app.add_api_route(path, handler, methods=["GET"], **options)
        app.add_api_route(path, handler, methods=["HEAD"], **options | {"include_in_schema": False})

    def post(path: str, handler: Callable[..., Any], body: dict[str, Any], **options: Any) -> None:
        app.add_api_route(
            path,
            handler,
            methods=["POST"],
            openapi_extra=body,
            responses=error_responses(400, 406, 408, 413, 429, 500, 504, 507)
            | options.pop("responses", {}),
            **options,
        )

    health: dict[str, Any] = {"response_model": Health, "responses": {503: {"model": Health}}}
    get(settings.health_route, routes.get_health, **health)
    if settings.health_route != "/readyz":
        get("/readyz", routes.get_health, **health)
    get("/livez", routes.get_liveness, **health)
    get(
        "/metrics",
        routes.get_metrics,
        response_class=PlainTextResponse,
        responses=error_responses(),
    )
    get("/v1/models", routes.list_models, response_model=Capabilities, responses=error_responses())
    for action, handler in (("load", routes.load_model), ("unload", routes.unload_model)):
        app.add_api_route(
            f"/v1/models/{{name:path}}/{action}",
            handler,
            methods=["POST"],
            response_model=ModelView,
            responses=error_responses(404, 500),
        )
    get(
        "/v1/models/{name:path}",
        routes.get_model,
        response_model=ModelView,
        responses=error_responses(404),
    )
    post(settings.predict_route, routes.predict, PREDICTION)
    get(
        "/v2",
        routes.get_server_metadata,
        response_model=InferServerView,
        responses=error_responses(),
    )
    get("/v2/health/live", routes.get_liveness, **health)
    get("/v2/health/ready", routes.get_health, **health)
    get(
        "/v2/models/{name:path}/ready",
        routes.get_model_readiness,
        responses=error_responses(404),
    )
    post("/v2/models/{name:path}/infer", routes.infer, INFERENCE, responses=error_responses(404))
    get(
        "/v2/models/{name:path}",
        routes.get_model_metadata,
        response_model=InferModelView,
        responses=error_responses(404),
    )
    for path in ("/v1/separate", "/v1/audio/separations"):
        post(
            path,
            routes.separate,
            AUDIO,
            response_class=Response,
            responses=_content("application/zip", "audio/*"),
        )
    job: dict[int | str, dict[str, Any]] = {202: {"model": JobView}}
    post("/v1/jobs", routes.create_job, JOB, status_code=202, responses=job)
    get(
        "/v1/jobs",
        routes.list_jobs,
        response_model=JobList,
        responses=error_responses(400, 422),
    )
    get("/v1/jobs/{id}", routes.get_job, response_model=JobView, responses=error_responses(404))
    get(
        "/v1/jobs/{id}/events",
        routes.stream_job_events,
        response_class=Response,
        responses=error_responses(404) | _content("text/event-stream"),
    )
    get(
        "/v1/jobs/{id}/stems.zip",
        routes.get_job_zip,
        response_class=Response,
        responses=error_responses(404, 409, 410, 416) | _PARTIAL | _content("application/zip"),
    )
    get(
        "/v1/jobs/{id}/stems/{name}",
        routes.get_job_stem,
        response_class=Response,
        responses=error_responses(404, 409, 410, 416, 422) | _PARTIAL | _content("audio/*"),
    )
    get(
        "/v1/jobs/{id}/stems/{name}/part",
        routes.get_stem_part,
        response_class=Response,
        responses=error_responses(404, 409, 410, 422) | _content("audio/wav"),
    )
    get(
        "/v1/jobs/{id}/stems/{name}/waveform",
        routes.get_stem_waveform,
        response_model=Waveform,
        responses=error_responses(404, 409, 410),
    )
    app.add_api_route(
        "/v1/jobs/{id}",
        routes.cancel_job,
        methods=["DELETE"],
        status_code=202,
        responses=error_responses(404) | job | {204: {"description": "Deleted."}},
    )
    get("/docs", routes.get_docs, include_in_schema=False)
    get("/sample.wav", routes.get_sample, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    if settings.page:
        get("/", routes.get_page, include_in_schema=False)


def _describe_security(app: FastAPI, settings: ServerSettings) -> None:
    """Add to /openapi.json how to send an API key, and whether one is needed."""
    make_schema = app.openapi
    needs: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]
    needs += [] if settings.api_keys else [{}]

    def make_with_security() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make_schema()
            add_shared_schemas(schema)
            for methods in schema["paths"].values():
                for operation in methods.values():
                    if "401" in operation["responses"]:
                        operation["security"] = needs
        return app.openapi_schema or {}

    app.openapi = make_with_security  # type: ignore[method-assign]  # as FastAPI documents


def _check_route_conflicts(app: FastAPI, settings: ServerSettings) -> None:
    """Raise `ConfigError` if a configured path is already used by another route."""
    for name, method in (("predict_route", "POST"), ("health_route", "GET")):
        path = getattr(settings, name)
        scope = {"type": "http", "path": path, "method": method}
        if sum(route.matches(scope)[0] is Match.FULL for route in app.routes) > 1:
            raise ConfigError(f"{name} = {path!r} is already used by another route: choose another")


def _content(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """Describe a successful response that is not JSON."""
    return {200: {"content": {media_type: {} for media_type in media_types}}}


def _list_methods(app: FastAPI, request: Request) -> list[str]:
    """Return the methods of all routes that match the path of a request."""
    methods: set[str] = set()
    # A mount has added its own path to `root_path`.
    root = request.scope.get("app_root_path", request.scope.get("root_path", ""))
    scope = {**request.scope, "root_path": root}
    for route in app.routes:
        if route.matches(scope)[0] is not Match.NONE:
            # Older versions of Starlette give no methods with the refusal of a static file.
            is_static = isinstance(getattr(route, "app", None), StaticFiles)
            methods |= {"GET", "HEAD"} if is_static else getattr(route, "methods", None) or set()
    return sorted(methods)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    @app.exception_handler(RequestValidationError)
    async def handle_bad_request(_: Request, error: Exception) -> JSONResponse:
        return error_response(from_exception(error))

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(from_exception(error))
        response.headers.update(error.headers or {})
        methods = _list_methods(app, request) if error.status_code == 405 else []
        if methods:  # the router lists the methods of one route only
            response.headers["Allow"] = ", ".join(methods)
        return response

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.Error)
    async def handle_system_error(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, TimeoutError):
            raise error
        return error_response(from_exception(error))

    @app.exception_handler(Exception)
    async def handle_bug(_: Request, __: Exception) -> JSONResponse:  # uvicorn logs the traceback
        return error_response(ApiError("failed", "internal error: see the server log"))
