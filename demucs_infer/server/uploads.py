"""Write uploaded audio to a file, counted and hashed while it arrives.

Starlette's `Request.form()` is not used, as it has no limit for the size of a file.
"""

import binascii
import hashlib
import json
import logging
import re
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote
from uuid import uuid4

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from demucs_infer.server.admission import UploadPlace
from demucs_infer.server.disk import Promise
from demucs_infer.server.errors import ApiError, from_exception, too_large
from demucs_infer.server.schemas import add_field, display_name
from demucs_infer.server.urls import RemoteUrl

logger = logging.getLogger(__name__)

_MAX_FIELD_BYTES = 1 << 16
_MAX_FIELDS = 64
_MAX_BOUNDARY_BYTES = 256  # what the parser accepts; RFC 2046 allows 70
_BASE64_LETTERS = 3 << 18
"""Letters of base64 decoded at a time; a multiple of four."""

_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Upload:
    """A complete uploaded file."""

    path: Path
    sha256: str
    size: int
    name: str
    """The client's name for it: to show, never to use as a path."""


@dataclass(slots=True, eq=False)
class UploadWriter:
    """A file that is being uploaded; deleted by `discard` unless `finish` was reached."""

    folder: Path
    max_bytes: int
    promise: Promise = field(default_factory=Promise)
    """The space that was promised to the file."""

    path: Path = field(init=False)
    size: int = 0
    _digest: "hashlib._Hash" = field(default_factory=hashlib.sha256, init=False)
    _file: BinaryIO = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.folder / uuid4().hex
        self._file = self.path.open("xb")

    def write(self, data: bytes) -> None:
        """Append bytes; raise `ApiError` above the limit."""
        self.size += len(data)
        self._check_size(self.size)
        self._digest.update(data)
        self._file.write(data)
        self.promise.written = self.size

    def expect(self, size: int) -> None:
        """Reduce the promised space to the size of the file; raise `ApiError` above the limit."""
        self._check_size(size)
        self.promise.size = min(self.promise.size, size)

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise too_large(self.max_bytes)

    def finish(self, name: str | None) -> Upload:
        """Close the file and return the upload; raise `ApiError` if it is empty."""
        self._file.close()
        self.promise.size = self.size
        if not self.size:
            raise ApiError("empty_audio", "the upload is empty: send the bytes of an audio file")
        return Upload(self.path, self._digest.hexdigest(), self.size, display_name(name))

    def discard(self) -> None:
        """Delete the file."""
        self.promise.size = 0
        with suppress(OSError):  # a full disk has been reported by `write`
            self._file.close()
        remove_upload(self.path)


def remove_upload(path: Path) -> None:
    """Delete an upload; one that cannot be deleted is deleted when the server starts again."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.error("the upload %s cannot be deleted: %s", path.name, error.strerror)


Fetch = Callable[[Mapping[str, Any], UploadWriter], Awaitable[Upload | RemoteUrl | None]]
"""Returns the audio at the URL in the fields of a request, or the URL itself if the audio is to be
downloaded later, or None if there is no URL."""


Reserve = Callable[[int], Awaitable[Promise]]
"""Returns space on disk for a number of bytes, or raises `ApiError`."""


async def receive_upload(
    request: Request,
    folder: Path,
    *,
    max_bytes: int,
    place: UploadPlace,
    fetch: Fetch,
    reserve: Reserve,
) -> tuple[Upload | RemoteUrl, dict[str, Any]]:
    """Return the audio of a form or of a raw body, and the other fields of the form or of JSON.

    If there is no audio, the result of `fetch` counts.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes + _MAX_FIELDS * _MAX_FIELD_BYTES:
        raise too_large(max_bytes)
    size = min(int(length), max_bytes) if length.isdecimal() else max_bytes
    writer = UploadWriter(folder, max_bytes, await reserve(size))
    try:
        if kind == b"multipart/form-data":
            form = _FormReader(writer, options.get(b"boundary", b""))
            await _receive(request, place, form.write)
            upload = None if form.has_file else await fetch(form.fields, writer)
            return _keep(upload or form.finish(), writer), form.fields
        if kind == b"application/json":
            fields = await _receive_object(request, place)
            upload = await fetch(fields, writer)
            if upload is None:
                raise ApiError("no_file", "the body has no url: give that of a track")
            return _keep(upload, writer), fields
        await _receive(request, place, writer.write)
        upload = None if writer.size else await fetch({}, writer)
        return _keep(upload or writer.finish(_get_file_name(request.headers)), writer), {}
    except BaseException:
        writer.discard()
        raise


def _keep(source: Upload | RemoteUrl, writer: UploadWriter) -> Upload | RemoteUrl:
    """Return `source`; delete the file of `writer` if that is not in it."""
    if not isinstance(source, Upload):
        writer.discard()
    return source


async def receive_body(request: Request, *, max_bytes: int, place: UploadPlace) -> bytearray:
    """Return a body that has to be in memory, such as JSON; raise `ApiError` above the limit."""
    body = bytearray()

    def write(data: bytes) -> None:
        body.extend(data)
        if len(body) > max_bytes:
            raise too_large(max_bytes)

    await _receive(request, place, write)
    return body


async def _receive_object(request: Request, place: UploadPlace) -> dict[str, Any]:
    """Return the fields of a JSON object."""
    body = await receive_body(request, max_bytes=_MAX_FIELD_BYTES, place=place)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError("not_json", "the body is not valid JSON") from error
    if not isinstance(fields, dict):
        raise ApiError("invalid_request", "body: expected a JSON object")
    return fields


async def _receive(request: Request, place: UploadPlace, write: Callable[[bytes], None]) -> None:
    """Pass a body on as it arrives; raise `ApiError` if it is too slow or the client leaves."""
    try:
        with place.limit_time():
            async for data in request.stream():
                place.receive(len(data))
                write(data)
    except ClientDisconnect as error:
        raise from_exception(error, "the client disconnected during the upload") from error


def _get_file_name(headers: Mapping[str, str]) -> str | None:
    """Return the name from `Content-Disposition`, or from the header that the page sends."""
    _, options = parse_options_header(headers.get("content-disposition", ""))
    name = options.get(b"filename", b"").decode(errors="replace")
    return name or unquote(headers.get("x-file-name", ""), errors="replace") or None


class _FormReader:
    """A form with text fields and one file, in the field `file` or with a file name."""

    def __init__(self, writer: UploadWriter, boundary: bytes) -> None:
        if not 0 < len(boundary) <= _MAX_BOUNDARY_BYTES:
            raise ApiError(
                "bad_form",
                f"the boundary in Content-Type has {len(boundary)} bytes: expected 1 to "
                f"{_MAX_BOUNDARY_BYTES}",
            )
        self.fields: dict[str, str] = {}
        self._writer = writer
        self._name = ""
        self._file_name: str | None = None
        self._has_file = False
        self._is_file = False
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_header_field": lambda data, i, j: self._header[0].extend(data[i:j]),
                "on_header_value": lambda data, i, j: self._header[1].extend(data[i:j]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_end": self._on_end,
            },
        )

    def write(self, data: bytes) -> None:
        """Parse the next bytes of the body."""
        try:
            self._parser.write(data)
        except ValueError as error:
            raise ApiError("bad_form", f"malformed form: {error}") from error

    @property
    def has_file(self) -> bool:
        """Whether the form has a file; raise `ApiError` if it is incomplete."""
        if not self._is_complete:
            raise ApiError("bad_form", "truncated form: its final boundary is missing")
        return self._has_file

    def finish(self) -> Upload:
        """Return the file of the form; raise `ApiError` if there is none."""
        if not self._has_file:
            raise ApiError("no_file", "the form has no file: send one in the field 'file'")
        return self._writer.finish(self._file_name)

    def _on_part_begin(self) -> None:
        self._headers, self._value, self._is_file = {}, bytearray(), False
        self._header = (bytearray(), bytearray())

    def _on_header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = b"filename" in options or self._name == "file"
        if self._is_file:
            if self._has_file:
                raise ApiError("several_files", "the form has several files: send one per request")
            self._has_file = True
            self._file_name = options.get(b"filename", b"").decode(errors="replace")
        elif len(self.fields) >= _MAX_FIELDS:
            raise ApiError("too_large", f"the form has more than {_MAX_FIELDS} fields")

    def _on_part_data(self, data: bytes, start: int, stop: int) -> None:
        if self._is_file:
            self._writer.write(data[start:stop])
            return
        self._value.extend(data[start:stop])
        if len(self._value) > _MAX_FIELD_BYTES:
            raise ApiError(
                "too_large", f"the field {self._name!r} is larger than {_MAX_FIELD_BYTES} bytes"
            )

    def _on_part_end(self) -> None:
        if not self._is_file:
            add_field(self.fields, self._name, self._value.decode(errors="replace"))

    def _on_end(self) -> None:
        self._is_complete = True


def decode_base64(text: str, folder: Path, promise: Promise, *, max_bytes: int) -> Upload:
    """Write the bytes of base64 text to a file; raise `ApiError` if it is not base64."""
    writer = UploadWriter(folder, max_bytes, promise)
    message = "b64 is not valid base64: use the standard alphabet with padding"
    try:
        if len(text) % 4 or not _BASE64.fullmatch(text):
            raise ApiError("bad_base64", message)
        for start in range(0, len(text), _BASE64_LETTERS):
            writer.write(b64decode(text[start : start + _BASE64_LETTERS]))
        return writer.finish(None)
    except BaseException as error:
        writer.discard()
        if isinstance(error, binascii.Error):
            raise from_exception(error, message) from error
        raise
