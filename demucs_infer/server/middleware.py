"""What every request passes: the key, the headers, the log, and the words for what goes wrong."""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demucs_infer.server.errors import ApiError
from demucs_infer.server.metrics import Metrics

access = logging.getLogger("demucs_infer.access")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; media-src 'self' blob:; font-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class ApiKeys:
    """The keys of those who may come in; only their digests are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admits(self, key: str) -> bool:
        """Whether `key` is one of them; takes as long whichever it is."""
        given = hashlib.sha256(key.encode(errors="replace")).digest()
        found = False
        for digest in self._digests:  # all of them: the time must not tell which
            found |= hmac.compare_digest(given, digest)
        return found


def key_of(headers: Headers) -> str:
    """The key that a request carries, or nothing."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key", "")


def client_of(scope: Scope) -> str:
    """Whose request this is: its key, or its address."""
    key = key_of(Headers(scope=scope))
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
        locked: Iterable[str],
        gauges: Metrics,
        origins: Iterable[str] = (),
        base_path: str = "",
        is_logging: bool = True,
    ) -> None:
        self._app = app
        self._keys = keys
        self._locked = tuple(locked)
        self._gauges = gauges
        self._origins = frozenset(origins)
        self._base_path = base_path
        self._is_logging = is_logging

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or not, and note how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 500, 0

        async def guarded(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._admit(scope, receive, guarded)
        finally:
            self._note(scope, status, sent, time.perf_counter() - began)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = self.path(scope)
        if self._base_path and scope["path"] == self._base_path:
            await RedirectResponse(f"{self._base_path}/")(scope, receive, send)
            return
        # The whole path and its beginning, whether the proxy took that away or not.
        scope["root_path"], scope["path"] = self._base_path, self._base_path + path
        is_locked = any(path == one or path.startswith(f"{one}/") for one in self._locked)
        # A browser asks without a key whether it may send one.
        is_question = scope["method"] == "OPTIONS"
        needs_key = bool(self._keys) and is_locked and not is_question
        if needs_key and not self._keys.admits(key_of(Headers(scope=scope))):
            await refusal(_NO_KEY)(scope, receive, send)
            return
        if not is_locked or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if _is_foreign(Headers(scope=scope), self._origins):
            await refusal(_FOREIGN)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def path(self, scope: Scope) -> str:
        """The path behind the one that a proxy puts before it."""
        path: str = scope["path"]
        if self._base_path and path.startswith(f"{self._base_path}/"):
            return path[len(self._base_path) :]
        return path

    def _note(self, scope: Scope, status: int, sent: int, seconds: float) -> None:
        # The template of the route, as paths hold the ids of jobs, which are secrets.
        route = getattr(scope.get("route"), "path", None) or "other"
        self._gauges.count(scope["method"] if route != "other" else "any", route, status, seconds)
        if self._is_logging:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "client": client_of(scope),
                "method": scope["method"],
                "route": route,
                "status": status,
                "bytes": sent,
                "seconds": round(seconds, 4),
            }
            access.info(json.dumps(line))


def _is_foreign(headers: Headers, friends: frozenset[str]) -> bool:
    """Whether a page of another site makes somebody's browser send this without being allowed.

    Forms need no permission to cross sites; without this a stranger's page could use a server on
    the visitor's own machine. Browsers say so themselves; programs say nothing.
    """
    origin = headers.get("origin")
    if origin in friends:
        return False
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "cross-site"
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def refusal(refused: ApiError) -> JSONResponse:
    """The answer to a request that is turned down."""
    return JSONResponse(refused.as_json(), refused.status, refused.headers)


_NO_KEY = ApiError(
    401, "no_key", "a key is needed: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
)
_FOREIGN = ApiError(403, "foreign_origin", "pages of other sites may not use this server")
