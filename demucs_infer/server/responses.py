"""Stems on their way out: as base64, as a zip, as one file; never held whole."""

import json
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from demucs_infer.server.cache import CachedStems

_PIECE = 3 << 17
"""Bytes at a time; a multiple of three, so that pieces of base64 join."""


class StreamedFile(StreamingResponse):
    """An answer piece by piece; `after` is called at its end, however it ends."""

    def __init__(
        self,
        pieces: Iterator[bytes],
        media_type: str,
        *,
        headers: dict[str, str] | None = None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers=headers)
        self._pieces = pieces
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()


def attachment(name: str) -> str:
    """`Content-Disposition` for a file of that name, whatever letters it has."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def in_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def as_base64(entry: CachedStems) -> Iterator[bytes]:
    """A JSON object of base64 by stem."""
    yield b"{"
    for number, one in enumerate(entry.stems):
        yield b"%s%s:" % (b"," if number else b"", json.dumps(one.stem).encode())
        yield b'"'
        for piece in in_pieces(one.path):
            yield b64encode(piece)
        yield b'"'
    yield b"}"


def predictions(answers: Sequence[CachedStems | dict[str, Any]]) -> Iterator[bytes]:
    """`{"predictions": [...]}`: stems, or what was wrong."""
    yield b'{"predictions":['
    for number, answer in enumerate(answers):
        if number:
            yield b","
        if isinstance(answer, CachedStems):
            yield from as_base64(answer)
        else:
            yield json.dumps(answer).encode()
    yield b"]}"


def as_zip(entry: CachedStems) -> Iterator[bytes]:
    """A zip of the stems and of what they were made of; the same entry gives the same bytes."""
    sink = _ZipBuffer()
    with zipfile.ZipFile(sink, "w") as archive:
        for one in entry.stems:
            about = _about(one.path.name)
            about.file_size = one.size
            with archive.open(about, "w", force_zip64=one.size > 1 << 30) as member:
                for piece in in_pieces(one.path):
                    member.write(piece)
                    yield from sink.taken()
        text = json.dumps(entry.public(), indent=2, ensure_ascii=False)
        archive.writestr(_about("stems.json"), f"{text}\n")
    yield from sink.taken()


def _about(name: str) -> zipfile.ZipInfo:
    about = zipfile.ZipInfo(name)  # of 1980, so that it does not tell when it was made
    about.external_attr = 0o644 << 16
    return about


class _ZipBuffer:
    """A file that only grows, whose bytes are taken away as they come."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """What there is stays to be taken."""

    def taken(self) -> Iterator[bytes]:
        pieces, self._pieces = self._pieces, []
        yield from pieces
