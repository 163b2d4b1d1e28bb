"""What every request passes through: API keys, security headers, metrics and the access log."""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demucs_infer.server.errors import ApiError
from demucs_infer.server.metrics import Metrics
from demucs_infer.server.responses import error_response

access_log = logging.getLogger("demucs_infer.access")

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; media-src 'self' blob:; font-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_NO_KEY = ApiError(
    "no_key", "API key required: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
)
_CROSS_ORIGIN = ApiError(
    "foreign_origin", "request from a page of another site: its origin must be in cors_origins"
)


class ApiKeys:
    """The accepted API keys; only their digests are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def is_valid(self, key: str) -> bool:
        """Return whether `key` is accepted, in the same time for every key."""
        digest = hashlib.sha256(key.encode(errors="replace")).digest()
        is_valid = False
        for accepted in self._digests:  # no early exit: the time must not depend on the match
            is_valid |= hmac.compare_digest(digest, accepted)
        return is_valid


def get_api_key(headers: Headers) -> str:
    """Return the API key in the headers, or an empty string."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key", "")


def identify_client(scope: Scope) -> str:
    """Return what identifies the client: a digest of its key, or its address."""
    key = get_api_key(Headers(scope=scope))
    if key:
        return hashlib.sha256(key.encode(errors="replace")).hexdigest()[:16]
    return str((scope.get("client") or ("unknown",))[0])


class SecurityMiddleware:
    """The outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        protected_paths: Iterable[str],
        metrics: Metrics,
        allowed_origins: Iterable[str] = (),
        base_path: str = "",
        is_logging: bool = True,
    ) -> None:
        self._app = app
        self._keys = keys
        self._protected_paths = tuple(protected_paths)
        self._metrics = metrics
        self._allowed_origins = frozenset(allowed_origins)
        self._base_path = base_path
        self._is_logging = is_logging

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authorize a request, pass it on, and record the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at, status, bytes_sent = time.perf_counter(), 500, 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status, bytes_sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            bytes_sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._authorize(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, bytes_sent, time.perf_counter() - started_at)

    async def _authorize(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if self._base_path and path == self._base_path:
            await RedirectResponse(f"{self._base_path}/")(scope, receive, send)
            return
        if self._base_path and path.startswith(f"{self._base_path}/"):
            path = path[len(self._base_path) :]
        # The application expects the full path, whether the proxy removed the base path or not.
        scope["root_path"], scope["path"] = self._base_path, self._base_path + path
        headers, method = Headers(scope=scope), scope["method"]
        if any(path == root or path.startswith(f"{root}/") for root in self._protected_paths):
            # A browser's preflight request carries no key.
            needs_key = bool(self._keys) and method != "OPTIONS"
            if needs_key and not self._keys.is_valid(get_api_key(headers)):
                await error_response(_NO_KEY)(scope, receive, send)
                return
            if method not in _SAFE_METHODS and _is_cross_origin(headers, self._allowed_origins):
                await error_response(_CROSS_ORIGIN)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _record(self, scope: Scope, status: int, bytes_sent: int, seconds: float) -> None:
        # The template of the route: the path itself may contain the id of a job, which is secret.
        route = getattr(scope.get("route"), "path", None) or "other"
        method = scope["method"] if route != "other" else "any"
        self._metrics.observe_request(method, route, status, seconds)
        if self._is_logging:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "client": identify_client(scope),
                "method": scope["method"],
                "route": route,
                "status": status,
                "bytes": bytes_sent,
                "seconds": round(seconds, 4),
            }
            access_log.info(json.dumps(line))


def _is_cross_origin(headers: Headers, allowed_origins: frozenset[str]) -> bool:
    """Return whether a browser sends this for a page of another site that is not allowed.

    Browsers let forms cross sites without asking, so that any page could use a server on the
    visitor's own machine. Browsers declare the origin; other clients send neither header.
    """
    origin = headers.get("origin")
    if origin in allowed_origins:
        return False
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "cross-site"
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
