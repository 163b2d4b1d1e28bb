"""Response bodies: errors, and stems streamed as base64, as a zip or as one file."""

import hashlib
import json
import re
import zipfile
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from demucs_infer.server.cache import CachedStems
from demucs_infer.server.errors import ApiError, from_exception

_ZIP64_BYTES = 1 << 30
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})", re.ASCII)
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
        content: Iterator[bytes] | AsyncIterator[bytes],
        media_type: str,
        *,
        headers: dict[str, str] | None = None,
        status_code: int = 200,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(content, status_code, headers, media_type)
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


REVALIDATE = "private, no-cache"
"""`Cache-Control` of content that a client may keep, but must revalidate before each use."""


def is_not_modified(request: Request, etag: str) -> bool:
    """Return whether the client already has the content with this tag."""
    tags = request.headers.get("if-none-match", "").split(",")
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in tags)


def not_modified(etag: str) -> Response:
    """Return the response (304) for content that the client already has."""
    return Response(status_code=304, headers={"ETag": etag, "Cache-Control": REVALIDATE})


def zip_response(request: Request, entry: CachedStems, headers: dict[str, str]) -> Response:
    """Return a zip of the stems, or the part of it that `Range` asks for.

    Equal entries give equal bytes, so that an interrupted download can be continued.
    """
    etag = f'"{zip_digest(entry)}"'
    if is_not_modified(request, etag):
        return not_modified(etag)
    size = zip_size(entry)
    headers = {**headers, "ETag": etag, "Cache-Control": REVALIDATE, "Accept-Ranges": "bytes"}
    wanted = request.headers.get("range", "")
    if request.headers.get("if-range", etag) != etag:
        wanted = ""
    first, last, status = 0, size - 1, 200
    if match := _RANGE.fullmatch(wanted.strip()):
        first, last = _read_range(match, size)
        status = 206
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    headers["Content-Length"] = str(last - first + 1)
    content = _cut(iter_zip(entry), first, last + 1)
    return StreamedFile(content, "application/zip", headers=headers, status_code=status)


def _read_range(match: re.Match[str], size: int) -> tuple[int, int]:
    """Return the first and the last byte; raise `ApiError` if the range is beyond the end."""
    start, stop = match.groups()
    if not start:  # the last bytes
        first, last = max(size - int(stop or 0), 0), size - 1
    else:
        first, last = int(start), min(int(stop), size - 1) if stop else size - 1
    if first > last or first >= size:
        raise ApiError("bad_range", f"the range is not within the zip, which has {size} bytes")
    return first, last


def _cut(pieces: Iterator[bytes], first: int, stop: int) -> Iterator[bytes]:
    """Yield bytes `first` to `stop` of the joined pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(first - position, 0) : max(stop - position, 0)]
        position += len(piece)
        if part:
            yield part
        if position >= stop:
            return


def zip_digest(entry: CachedStems) -> str:
    """Return a digest of everything that determines the bytes of the zip."""
    text = [*(f"{stem.path.name}:{stem.sha256}" for stem in entry.stems), _manifest_text(entry)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def zip_size(entry: CachedStems) -> int:
    """Return the number of bytes of `iter_zip`, without reading a stem.

    Its members are stored, so that their sizes just add up to what a zip of empty files takes.
    """
    buffer = _ZipBuffer()
    sizes = [(stem.path.name, stem.size) for stem in entry.stems]
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, size in sizes:
            with archive.open(_zip_info(name), "w", force_zip64=size > _ZIP64_BYTES):
                pass
        before = buffer.tell_written()
        archive.writestr(_zip_info("stems.json"), _manifest_text(entry))
        manifest_bytes = buffer.tell_written() - before
    total = sum(map(len, buffer.drain())) + sum(size for _, size in sizes)
    return total + _count_zip64_bytes(sizes, manifest_bytes)


def _count_zip64_bytes(sizes: Sequence[tuple[str, int]], manifest_bytes: int) -> int:
    """Return what the directory of the zip takes for members that are, or begin, beyond 2 GiB."""
    extra = position = 0
    limit = zipfile.ZIP64_LIMIT
    for name, size in sizes:
        fields = 2 * (size > limit) + (position > limit)
        extra += 4 + 8 * fields if fields else 0
        position += 30 + len(name.encode()) + size + (20 + 24 if size > _ZIP64_BYTES else 16)
    extra += 4 + 8 if position > limit else 0  # the manifest, which is the last member
    return extra + (56 + 20 if position + manifest_bytes > limit else 0)


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


def iter_inference(entry: CachedStems, model: str, id: str | None) -> Iterator[bytes]:
    """Yield the response of the open inference protocol: a tensor of bytes for each stem."""
    head = {"model_name": model, "model_version": "1", "id": id}
    given = {name: value for name, value in head.items() if value is not None}
    yield json.dumps(given).encode()[:-1] + b', "outputs": ['
    for number, stem in enumerate(entry.stems):
        tensor: dict[str, Any] = {"name": stem.stem, "shape": [1], "datatype": "BYTES"}
        tensor["parameters"] = {"content_type": "base64"}
        yield (b", " if number else b"") + json.dumps(tensor).encode()[:-1] + b', "data": ["'
        for data in iter_file(stem.path):
            yield b64encode(data)
        yield b'"]}'
    yield b"]}"


def iter_zip(entry: CachedStems) -> Iterator[bytes]:
    """Yield a zip of the stems and their manifest; equal entries give equal bytes."""
    buffer = _ZipBuffer()
    with zipfile.ZipFile(buffer, "w") as archive:
        for stem in entry.stems:
            info = _zip_info(stem.path.name)
            info.file_size = stem.size
            with archive.open(info, "w", force_zip64=stem.size > _ZIP64_BYTES) as member:
                for data in iter_file(stem.path):
                    member.write(data)
                    yield from buffer.drain()
        archive.writestr(_zip_info("stems.json"), _manifest_text(entry))
    yield from buffer.drain()


def _manifest_text(entry: CachedStems) -> str:
    return json.dumps(entry.public_manifest(), indent=2, ensure_ascii=False) + "\n"


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
        """Do nothing: `drain` still has to return what was written."""

    def tell_written(self) -> int:
        return sum(map(len, self._written))

    def drain(self) -> Iterator[bytes]:
        written, self._written = self._written, []
        yield from written
