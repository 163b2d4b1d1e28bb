"""Check, count and log every request, and add security headers to every response.

`RecordMiddleware` is the outermost layer. `AccessMiddleware` is inside the layer for CORS, so that
pages of allowed sites can read why a request was refused.
"""

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from secrets import token_hex
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demucs_infer.errors import format_error
from demucs_infer.server.errors import ApiError
from demucs_infer.server.logs import REQUEST_ID
from demucs_infer.server.metrics import Metrics
from demucs_infer.server.responses import error_response
from demucs_infer.server.tracing import Tracing

logger = logging.getLogger(__name__)
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
_CLIENT = "demucs_infer.client"
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_CLIENT_ID = re.compile(r"[\w-]{16,64}", re.ASCII)
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_NO_KEY = ApiError(
    "no_key", "API key required: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
)
_BUSY = ApiError("busy", "the server has too many requests: try again later", 1)
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


@dataclass(frozen=True, slots=True)
class Client:
    """The sender of a request."""

    name: str
    """For limits and the log: a digest of a valid API key, or the address."""

    owner: str
    """For jobs: the same digest; without API keys, that of the secret in `X-Client-Id`."""

    has_key: bool
    """Whether a valid API key was sent."""


def get_client(scope: Scope) -> Client:
    """Return the client that `AccessMiddleware` has identified."""
    client: Client = scope[_CLIENT]
    return client


def _identify_client(scope: Scope, keys: ApiKeys) -> Client:
    headers = Headers(scope=scope)
    key = get_api_key(headers)
    if keys and keys.is_valid(key):
        digest = _digest(key)
        return Client(digest, digest, has_key=True)
    secret = headers.get("x-client-id", "")
    owner = _digest(secret) if _CLIENT_ID.fullmatch(secret) and not keys else ""
    return Client(_get_network(scope), owner, has_key=False)


def _get_network(scope: Scope) -> str:
    """Return the address of a client; of IPv6, its network, as each client has one to itself."""
    address = str((scope.get("client") or ("unknown",))[0])
    try:
        version = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if version.version == 4 or version.is_loopback:
        return address
    return str(ipaddress.ip_network((int(version) >> 64 << 64, 64)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]


class RecordMiddleware:
    """The outermost layer: identifies, counts and logs requests, and adds headers to responses."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        metrics: Metrics,
        tracing: Tracing,
        base_path: str = "",
        is_logging: bool = True,
    ) -> None:
        self._app = app
        self._tracing = tracing
        self._keys = keys
        self._metrics = metrics
        self._base_path = base_path
        self._is_logging = is_logging

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at, status, bytes_sent = time.perf_counter(), 500, 0
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = token_hex(8)
        REQUEST_ID.set(request_id)
        scope[_CLIENT] = _identify_client(scope, self._keys)

        async def send_with_headers(message: Message) -> None:
            nonlocal status, bytes_sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                is_static = scope["path"].startswith(f"{self._base_path}/static/")
                headers.setdefault("Cache-Control", "no-cache" if is_static else "no-store")
                headers["X-Request-Id"] = request_id
            bytes_sent += len(message.get("body", b""))
            await send(message)

        with self._tracing.trace_request(scope) as end_span:
            try:
                if not await self._redirect_to_page(scope, receive, send_with_headers):
                    await self._app(scope, receive, send_with_headers)
            except RuntimeError as error:  # of Starlette: too late for an error response
                if not isinstance(error.__cause__, OSError | sqlite3.Error):
                    raise
                logger.error("a response is cut off: %s", format_error(error.__cause__))
            finally:
                seconds = time.perf_counter() - started_at
                end_span(_get_route(scope), status)
                self._record(scope, request_id, status, bytes_sent, seconds)

    async def _redirect_to_page(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Complete the path, or redirect the base path itself and return True."""
        path: str = scope["path"]
        if self._base_path and path == self._base_path:
            await RedirectResponse(f"{self._base_path}/")(scope, receive, send)
            return True
        if self._base_path and path.startswith(f"{self._base_path}/"):
            path = path[len(self._base_path) :]
        # The application expects the full path, whether the proxy removed the base path or not.
        scope["root_path"], scope["path"] = self._base_path, self._base_path + path
        return False

    def _record(
        self, scope: Scope, request_id: str, status: int, bytes_sent: int, seconds: float
    ) -> None:
        route = _get_route(scope)
        self._metrics.observe_request(scope["method"], route, status, seconds)
        if self._is_logging:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request": request_id,
                "client": get_client(scope).name,
                "method": scope["method"],
                "route": route,
                "status": status,
                "bytes": bytes_sent,
                "seconds": round(seconds, 4),
            }
            access_log.info(json.dumps(line))


def _get_route(scope: Scope) -> str:
    """Return the template of the route, as the path itself may contain the secret id of a job."""
    return getattr(scope.get("route"), "path", None) or "other"


class AccessMiddleware:
    """Refuses requests with a wrong host, origin or API key, and requests above the limit."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        needs_key: bool,
        protected_paths: Iterable[str],
        health_paths: Iterable[str],
        allowed_hosts: "AllowedHosts",
        allowed_origins: Iterable[str] = (),
        open_prefix: str | None = None,
        max_requests: int = 256,
    ) -> None:
        """Protect `protected_paths`; those that begin with `open_prefix` can be read by all."""
        self._app = app
        self._needs_key = needs_key
        self._protected_paths = tuple(protected_paths)
        self._health_paths = frozenset(health_paths)
        self._allowed_hosts = allowed_hosts
        self._allowed_origins = frozenset(allowed_origins)
        self._open_prefix = open_prefix
        self._max_requests = max_requests
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it is allowed; health checks always are."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) if "path" in scope else ""
        if scope["type"] != "http" or path in self._health_paths:
            await self._app(scope, receive, send)
            return
        error = self._find_error(scope, path)
        if error is not None:
            await error_response(error)(scope, receive, send)
            return
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests -= 1

    def _is_open(self, path: str) -> bool:
        return self._open_prefix is not None and path.startswith(self._open_prefix)

    def _find_error(self, scope: Scope, path: str) -> ApiError | None:
        headers, method = Headers(scope=scope), scope["method"]
        host = headers.get("host", "")
        if not self._allowed_hosts.contains(host):
            return ApiError(
                "unknown_host",
                f"the server is not called {host[:100]!r}: add the name to allowed_hosts",
            )
        if any(path == root or path.startswith(f"{root}/") for root in self._protected_paths):
            # A browser's preflight request carries no key.
            is_open = method == "OPTIONS" or (method in _SAFE_METHODS and self._is_open(path))
            if self._needs_key and not is_open and not get_client(scope).has_key:
                return _NO_KEY
            if method not in _SAFE_METHODS and _is_cross_origin(headers, self._allowed_origins):
                return _CROSS_ORIGIN
        return _BUSY if self._requests >= self._max_requests else None


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """The host names that requests may be addressed to, as a protection from DNS rebinding.

    Another site can make its own name resolve to this server, so that a browser treats both as the
    same origin. The `Host` header of such a request has the name of that site.
    """

    names: frozenset[str]
    has_addresses: bool
    """Whether IP addresses are allowed, which cannot be used for rebinding."""

    @classmethod
    def make(cls, names: Iterable[str], host: str) -> "AllowedHosts":
        """Return `names`, or by default those of a server that listens on `host`."""
        listed = frozenset(_strip_port(name).lower() for name in names)
        if listed:
            return cls(listed, has_addresses=False)
        return cls(frozenset({"localhost", host.lower(), socket.gethostname().lower()}), True)

    def contains(self, host: str) -> bool:
        """Return whether a `Host` header is allowed."""
        name = _strip_port(host).lower().removesuffix(".")
        return "*" in self.names or name in self.names or (self.has_addresses and _is_address(name))


def _strip_port(host: str) -> str:
    """Return the name in a `Host` header, or the address without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_cross_origin(headers: Headers, allowed_origins: frozenset[str]) -> bool:
    """Return whether a request comes from a page of another origin that is not allowed.

    Browsers let any page send forms to any server, including one on the visitor's own machine, but
    state the origin of the page in a header. Other clients do not send such a header.
    """
    origin = headers.get("origin")
    if origin in allowed_origins:
        return False
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
