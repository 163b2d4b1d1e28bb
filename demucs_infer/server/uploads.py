"""Audio from a request into a file of ours: counted and hashed while it arrives."""

import binascii
import hashlib
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote
from uuid import uuid4

import anyio
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from demucs_infer.server.errors import ApiError
from demucs_infer.server.schemas import display_name, enter

_MAX_FIELD_BYTES = 1 << 16
_MAX_FIELDS = 64
_PIECE = 3 << 18
"""Letters of base64 at a time; a multiple of four."""

_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that arrived whole."""

    path: Path
    sha256: str
    size: int
    name: str
    """What the client calls it: for people, never for the file system."""


@dataclass(slots=True, eq=False)
class UploadWriter:
    """A file that is arriving; leaves nothing unless `finish` is reached."""

    folder: Path
    max_bytes: int
    path: Path = field(init=False)
    size: int = 0
    _digest: "hashlib._Hash" = field(default_factory=hashlib.sha256, init=False)
    _file: BinaryIO = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.folder / uuid4().hex
        self._file = self.path.open("xb")

    def write(self, piece: bytes) -> None:
        """Take the next bytes; `ApiError` once there are too many."""
        self.size += len(piece)
        if self.size > self.max_bytes:
            raise too_large(self.max_bytes)
        self._digest.update(piece)
        self._file.write(piece)

    def finish(self, name: str | None) -> Upload:
        """It is all here."""
        self._file.close()
        if not self.size:
            raise ApiError(
                422, "empty_audio", "the upload is empty; send the bytes of an audio file"
            )
        return Upload(self.path, self._digest.hexdigest(), self.size, display_name(name))

    def discard(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # of a full disk, which is told already
            self._file.close()
        self.path.unlink(missing_ok=True)


def too_large(max_bytes: int) -> ApiError:
    """More was sent than is taken."""
    return ApiError(413, "too_large", f"more than {max_bytes} bytes; send less")


async def receive(
    request: Request, folder: Path, *, max_bytes: int, seconds: float
) -> tuple[Upload, dict[str, str]]:
    """The audio of a form or of a raw body, and the fields that came with it."""
    try:
        with anyio.fail_after(seconds):
            return await _receive(request, folder, max_bytes)
    except TimeoutError as error:
        raise ApiError(408, "too_slow", f"the upload took longer than {seconds:g} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "disconnected", "the upload ended before its end") from error


async def _receive(request: Request, folder: Path, max_bytes: int) -> tuple[Upload, dict[str, str]]:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes + _MAX_FIELDS * _MAX_FIELD_BYTES:
        raise too_large(max_bytes)
    intake = UploadWriter(folder, max_bytes)
    try:
        if kind == b"multipart/form-data":
            form = _Form(intake, options.get(b"boundary", b""))
            await _feed(request, form.write)
            return form.finish(), form.fields
        await _feed(request, intake.write)
        return intake.finish(_named(request.headers)), {}
    except BaseException:
        intake.discard()
        raise


async def _feed(request: Request, write: Callable[[bytes], object]) -> None:
    async for piece in request.stream():
        write(piece)


def _named(headers: Mapping[str, str]) -> str | None:
    """The name in `Content-Disposition`, or in the header that the page sends."""
    _, options = parse_options_header(headers.get("content-disposition", ""))
    given = options.get(b"filename", b"").decode(errors="replace")
    return given or unquote(headers.get("x-file-name", ""), errors="replace") or None


class _Form:
    """A form with one file, `file` or whatever it is called, and fields of text."""

    def __init__(self, intake: UploadWriter, boundary: bytes) -> None:
        if not boundary:
            raise ApiError(400, "bad_form", "the form does not say what separates its parts")
        self.fields: dict[str, str] = {}
        self._intake = intake
        self._name = ""
        self._file_name: str | None = None
        self._has_file = False
        self._is_file = False
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._is_over = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_header_field": lambda data, i, j: self._header[0].extend(data[i:j]),
                "on_header_value": lambda data, i, j: self._header[1].extend(data[i:j]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_end": self._finished,
            },
        )

    def write(self, piece: bytes) -> None:
        """The next bytes of the body."""
        try:
            self._parser.write(piece)
        except ValueError as error:  # what the parser raises
            raise ApiError(400, "bad_form", f"the form cannot be read: {error}") from error

    def finish(self) -> Upload:
        """The file of the form."""
        if not self._is_over:
            raise ApiError(400, "bad_form", "the form ends before its end")
        if not self._has_file:
            raise ApiError(422, "no_file", "the form has no file; send one in the field 'file'")
        return self._intake.finish(self._file_name)

    def _begin(self) -> None:
        self._headers, self._value, self._is_file = {}, bytearray(), False
        self._header = (bytearray(), bytearray())

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = b"filename" in options or self._name == "file"
        if self._is_file:
            if self._has_file:
                raise ApiError(
                    422, "several_files", "the form has several files; send one a request"
                )
            self._has_file = True
            self._file_name = options.get(b"filename", b"").decode(errors="replace")
        elif len(self.fields) >= _MAX_FIELDS:
            raise ApiError(413, "too_large", f"the form has more than {_MAX_FIELDS} fields")

    def _data(self, data: bytes, start: int, stop: int) -> None:
        if self._is_file:
            self._intake.write(data[start:stop])
            return
        self._value.extend(data[start:stop])
        if len(self._value) > _MAX_FIELD_BYTES:
            raise ApiError(413, "too_large", f"the field {self._name!r} is too long")

    def _end(self) -> None:
        if not self._is_file:
            enter(self.fields, self._name, self._value.decode(errors="replace"))

    def _finished(self) -> None:
        self._is_over = True


async def receive_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """A body that has to be in memory, such as JSON; `ApiError` once it is too long."""
    try:
        with anyio.fail_after(seconds):
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise too_large(max_bytes)
            return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, "too_slow", f"the upload took longer than {seconds:g} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "disconnected", "the upload ended before its end") from error


def decode(text: str, folder: Path, *, max_bytes: int) -> Upload:
    """Base64 into a file, piece by piece; whatever is no base64 is refused."""
    intake = UploadWriter(folder, max_bytes)
    try:
        if len(text) % 4 or not _BASE64.fullmatch(text):
            raise ApiError(
                422, "bad_base64", "b64 is not base64: send the standard alphabet, padded"
            )
        for start in range(0, len(text), _PIECE):
            intake.write(b64decode(text[start : start + _PIECE]))
        return intake.finish(None)
    except binascii.Error as error:
        intake.discard()
        raise ApiError(422, "bad_base64", "b64 is not base64") from error
    except BaseException:
        intake.discard()
        raise
