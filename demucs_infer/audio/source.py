"""Where the bytes of a recording come from: a path, bytes in memory, or an open file."""

import io
import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from demucs_infer.errors import AudioReadError


class Readable(Protocol):
    """The least that is asked of an open file; one that cannot seek is copied to disk first."""

    def read(self, size: int = -1, /) -> bytes: ...


Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Readable
"""A path, the bytes of a file, or a binary file object read from where it stands."""


class ReopenableFile:
    """A recording that can be opened as often as it takes; openings do not disturb each other."""

    def __init__(self, source: Source) -> None:
        self._path: Path | None = None
        self._bytes: bytes | None = None
        self._file: _Shared | None = None
        if isinstance(source, str | os.PathLike):
            self._path = Path(source)
            self.name = str(self._path)
        elif isinstance(source, bytes | bytearray | memoryview):
            self._bytes = bytes(source)
            self.name = "the recording given"
        elif hasattr(source, "read"):
            self.name = _name_of(source)
            self._file = _Shared(source, self.name)
        else:
            raise ValueError(
                f"{type(source).__name__} is no source of sound: "
                "give a path, bytes, or a file opened for reading in binary mode"
            )

    def open(self) -> BinaryIO:
        """A file at its beginning, for the caller to close."""
        if self._bytes is not None:
            return io.BytesIO(self._bytes)
        if self._file is not None:
            return cast(BinaryIO, _View(self._file))
        assert self._path is not None
        try:
            file = self._path.open("rb")
            if file.seekable():
                return file
        except OSError as error:
            raise AudioReadError(f"cannot read {self.name}: {_reason(error)}") from error
        with file:  # a pipe can be read only once: keep what it says
            self._file = _Shared(file, self.name)
        return cast(BinaryIO, _View(self._file))


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder; give a file in it"
    if isinstance(error, PermissionError):
        return "you may not read it"
    return (error.strerror or str(error)).lower()


def _name_of(file: object) -> str:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else "the recording given"


class _Shared:
    """An open file that several views read, each from a place of its own."""

    def __init__(self, file: Readable, name: str) -> None:
        self.lock = threading.Lock()
        if isinstance(file.read(0), str):
            raise ValueError(f"{name} is open as text: open it in binary mode ('rb')")
        self.file = self._seekable(file)
        self.origin = self.file.tell()
        self.size = self.file.seek(0, io.SEEK_END) - self.origin
        self.file.seek(self.origin)
        if not self.size and self.origin:
            raise AudioReadError(
                f"nothing is left of {name}: it stands at its end; seek to its beginning first"
            )

    def _seekable(self, file: Readable) -> BinaryIO:
        seekable = getattr(file, "seekable", None)
        if seekable is not None and seekable():
            return cast(BinaryIO, file)
        # It outlives this function and goes when the last view does.
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
        weakref.finalize(self, spool.close)
        shutil.copyfileobj(file, spool)
        spool.seek(0)
        return spool


class _View(io.RawIOBase):
    """A file of its own on the bytes of a shared one, which stays open when this is closed."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__()
        self._shared = shared
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shared.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        shared = self._shared
        left = max(shared.size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        with shared.lock:
            shared.file.seek(shared.origin + self._at)
            data = shared.file.read(wanted)
        self._at += len(data)
        return data
