"""Send HTTP requests to hosts that clients name, without becoming a door to the inner network.

HTTP packages resolve a name themselves, follow redirects, decode compressed bodies and read proxies
from the environment. Here, the address that was checked is the one that is connected to, and h11,
which uvicorn brings, reads the response.
"""

import ssl
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urljoin

import anyio
import h11
from anyio.abc import ByteStream

from demucs_infer.errors import is_disk_full
from demucs_infer.server.addresses import Resolver, is_public, resolve_host
from demucs_infer.server.urls import AllowedPrefixes, RemoteUrl, parse_url

_MAX_REDIRECTS = 5
_MAX_HEADER_BYTES = 1 << 14
_MAX_LENGTH_DIGITS = 16
_REDIRECTS = (301, 302, 303, 307, 308)
_CONNECTION_ERRORS = (
    OSError,  # ssl.SSLError is one
    EOFError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    h11.ProtocolError,
)
Headers = Sequence[tuple[str, str]]


class UrlRefusedError(Exception):
    """Raised for a URL, a redirect or an address that is not allowed."""


class RemoteError(Exception):
    """Raised when the other server cannot be reached, or does not answer as expected."""


@dataclass(slots=True)
class _Response:
    """The head of a response; `read` passes the body on."""

    status: int
    headers: dict[str, str]
    _connection: h11.Connection
    _stream: ByteStream

    async def read(self, receive: Callable[[bytes], None]) -> None:
        """Pass the body to `receive`, piece by piece; raise if it is not complete."""
        event: object = None
        while not isinstance(event, h11.EndOfMessage):
            event = await _next_event(self._connection, self._stream)
            if isinstance(event, h11.Data):
                receive(bytes(event.data))


@dataclass(slots=True)
class HttpClient:
    """Requests to allowed URLs only; the caller limits their time."""

    allowed: AllowedPrefixes
    resolve: Resolver = resolve_host

    async def check_host(self, url: RemoteUrl) -> None:
        """Raise an error if the host of a URL has no address, or one that is not public."""
        try:
            if not await self._find_addresses(url):
                raise RemoteError("its host has no address")
        except OSError as error:
            raise RemoteError("its host has no address") from error

    async def get(
        self,
        url: RemoteUrl,
        receive: Callable[[bytes], None],
        on_size: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Pass the body of a file to `receive`, and follow redirects to other allowed URLs.

        `on_size` is called first with the size of the body, if the header states it.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            # Not compressed: a few bytes could otherwise become any number of them.
            async with self._send("GET", url, [("Accept-Encoding", "identity")]) as response:
                if response.status not in _REDIRECTS:
                    if response.status != 200:
                        raise RemoteError(f"its server responded with {response.status}")
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise RemoteError("its server sent a compressed body, unasked")
                    length = response.headers.get("content-length", "")
                    if length.isdecimal() and len(length) < _MAX_LENGTH_DIGITS:
                        on_size(int(length))
                    await response.read(receive)
                    return
                location = response.headers.get("location", "")
            url = self._follow(url, location)
        raise RemoteError(f"it leads to more than {_MAX_REDIRECTS} redirects")

    def _follow(self, url: RemoteUrl, location: str) -> RemoteUrl:
        try:
            target = parse_url(urljoin(str(url), location))
        except ValueError as error:
            raise UrlRefusedError(f"it redirects to a URL that is refused: {error}") from error
        if target.is_store:
            raise UrlRefusedError(f"it redirects to the scheme {target.scheme}")
        return target

    async def send_body(
        self,
        method: str,
        url: RemoteUrl,
        headers: Headers,
        size: int,
        body: AsyncIterable[bytes],
    ) -> int:
        """Send a body and return the status of the response; redirects are not followed."""
        headers = [*headers, ("Content-Length", str(size))]
        async with self._send(method, url, headers, body) as response:
            return response.status

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        url: RemoteUrl,
        headers: Headers,
        body: AsyncIterable[bytes] | None = None,
    ) -> AsyncIterator[_Response]:
        """Send a request and yield the response; raise `RemoteError` for whatever goes wrong."""
        if not self.allowed.allow(url):
            raise UrlRefusedError("no prefix that the operator allows contains it")
        stream: ByteStream | None = None
        try:
            stream = await self._connect(url)
            yield await _exchange(stream, method, url, headers, body)
        except _CONNECTION_ERRORS as error:
            if is_disk_full(error):  # ours
                raise
            raise RemoteError(f"its server cannot be used: {_describe(error)}") from error
        finally:
            if stream is not None:  # without waiting for the other side
                await anyio.aclose_forcefully(stream)

    async def _connect(self, url: RemoteUrl) -> ByteStream:
        """Connect to the very address that was checked, and verify the host's certificate."""
        addresses = await self._find_addresses(url)
        problem: OSError = OSError("the host has no address")
        for address in addresses:
            try:
                if url.scheme == "http":
                    return await anyio.connect_tcp(address, url.port)
                return await anyio.connect_tcp(
                    address, url.port, tls_hostname=url.host, ssl_context=_make_context()
                )
            except OSError as error:
                problem = error
        raise problem

    async def _find_addresses(self, url: RemoteUrl) -> list[str]:
        """Return the addresses of a host; raise `UrlRefusedError` if one is not public."""
        if url.is_address:  # allowed by name: the operator chose it
            return [url.host]
        addresses = await self.resolve(url.host, url.port)
        if not all(map(is_public, addresses)):
            raise UrlRefusedError("its host has an address that is not public")
        return addresses


@lru_cache(maxsize=1)
def _make_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _describe(error: BaseException) -> str:
    """Return what is wrong in few words, and without addresses."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not valid: {error.verify_message}"
    if isinstance(error, h11.ProtocolError):
        return f"not HTTP: {error}"
    return "the connection failed"


async def _exchange(
    stream: ByteStream,
    method: str,
    url: RemoteUrl,
    headers: Headers,
    body: AsyncIterable[bytes] | None,
) -> _Response:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
    fields = [
        ("Host", url.authority),
        ("User-Agent", "demucs-infer"),
        ("Connection", "close"),
        *headers,
    ]
    request = h11.Request(method=method, target=url.target, headers=fields)
    await stream.send(connection.send(request) or b"")
    if body is not None:
        async for data in body:
            await stream.send(connection.send(h11.Data(data)) or b"")
    await stream.send(connection.send(h11.EndOfMessage()) or b"")
    while not isinstance(event := await _next_event(connection, stream), h11.Response):
        pass  # 100 Continue and the like
    found = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers
    }
    return _Response(event.status_code, found, connection, stream)


async def _next_event(connection: h11.Connection, stream: ByteStream) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        try:
            data = await stream.receive(1 << 16)
        except anyio.EndOfStream:
            data = b""
        connection.receive_data(data)
    if isinstance(event, h11.ConnectionClosed):
        raise EOFError
    return event
