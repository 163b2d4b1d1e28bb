"""Response bodies: errors, and stems streamed as base64, as a zip or as one file."""

import json
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from demucs_infer.server.cache import CachedStems
from demucs_infer.server.errors import ApiError, from_exception

_READ_BYTES = 3 << 17
"""Bytes per read; a multiple of three, so that the pieces of base64 can be joined."""


def error_response(error: ApiError) -> JSONResponse:
    """Return the response for a failed request."""
    return JSONResponse(error.to_json(), error.status, error.headers)


class StreamedFile(StreamingResponse):
    """A streamed response; `after` is called at its end, however it ends.

    Starlette's `BackgroundTask` is not run when the client disconnects.
    """

    def __init__(
        self,
        content: Iterator[bytes],
        media_type: str,
        *,
        headers: dict[str, str] | None = None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()


class StemResponse(FileResponse):
    """A stem file, or parts of it; range errors are JSON, where Starlette sends plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        is_error = False

        async def send_errors_as_json(message: Message) -> None:
            nonlocal is_error
            if message["type"] == "http.response.start" and message["status"] >= 400:
                is_error = True
                await _range_error(message)(scope, receive, send)
            elif not is_error:
                await send(message)

        await super().__call__(scope, receive, send_errors_as_json)


def _range_error(start: Message) -> JSONResponse:
    content_range = Headers(raw=start["headers"]).get("content-range")
    if start["status"] != 416 or content_range is None:
        message = "invalid Range header: expected bytes=FIRST-LAST"
        return error_response(from_exception(HTTPException(start["status"], message)))
    size = content_range.rpartition("/")[2]
    response = error_response(
        ApiError("bad_range", f"the range begins after the end of the file, which has {size} bytes")
    )
    response.headers["Content-Range"] = content_range
    return response


def content_disposition(name: str) -> str:
    """Return the header value for a download called `name`, in ASCII and in UTF-8."""
    ascii_name = "".join(
        c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in name
    )
    return f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"


def iter_file(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file."""
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            yield data


def iter_base64(entry: CachedStems) -> Iterator[bytes]:
    """Yield a JSON object with the base64 of each stem."""
    yield b"{"
    for number, stem in enumerate(entry.stems):
        yield b"%s%s:" % (b"," if number else b"", json.dumps(stem.stem).encode())
        yield b'"'
        for data in iter_file(stem.path):
            yield b64encode(data)
        yield b'"'
    yield b"}"


def iter_predictions(results: Sequence[CachedStems | dict[str, Any]]) -> Iterator[bytes]:
    """Yield `{"predictions": [...]}` with the stems, or the error, of each instance."""
    yield b'{"predictions":['
    for number, result in enumerate(results):
        if number:
            yield b","
        if isinstance(result, CachedStems):
            yield from iter_base64(result)
        else:
            yield json.dumps(result).encode()
    yield b"]}"


def iter_zip(entry: CachedStems) -> Iterator[bytes]:
    """Yield a zip of the stems and their manifest; equal entries give equal bytes."""
    buffer = _ZipBuffer()
    with zipfile.ZipFile(buffer, "w") as archive:
        for stem in entry.stems:
            info = _zip_info(stem.path.name)
            info.file_size = stem.size
            with archive.open(info, "w", force_zip64=stem.size > 1 << 30) as member:
                for data in iter_file(stem.path):
                    member.write(data)
                    yield from buffer.drain()
        text = json.dumps(entry.public_manifest(), indent=2, ensure_ascii=False)
        archive.writestr(_zip_info("stems.json"), f"{text}\n")
    yield from buffer.drain()


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # dated 1980: the bytes must not depend on the time
    info.external_attr = 0o644 << 16
    return info


class _ZipBuffer:
    """The unseekable file that `zipfile` writes to; `drain` removes what has been written."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._written.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Do nothing: `zipfile` requires the method."""

    def close(self) -> None:
        """Do nothing: what was written is still to be drained."""

    def drain(self) -> Iterator[bytes]:
        written, self._written = self._written, []
        yield from written
