"""Open the bytes of an audio file as often as needed: from a path, memory or a file object."""

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
    """A binary file object; one that cannot seek is copied to disk first."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes."""


Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Readable
"""A path, the bytes of a file, or a binary file object, read from its current position."""

_UNNAMED = "the audio data"


class ReopenableFile:
    """An audio input that can be opened repeatedly; each `open` returns an independent file."""

    def __init__(self, source: Source) -> None:
        self._path: Path | None = None
        self._bytes: bytes | None = None
        self._file: _SharedFile | None = None
        if isinstance(source, str | os.PathLike):
            self._path = Path(source)
            self.name = str(self._path)
        elif isinstance(source, bytes | bytearray | memoryview):
            self._bytes = bytes(source)
            self.name = _UNNAMED
        elif hasattr(source, "read"):
            name = getattr(source, "name", None)
            self.name = name if isinstance(name, str) else _UNNAMED
            self._file = _SharedFile(source, self.name)
        else:
            raise ValueError(
                f"unsupported audio source: {type(source).__name__}; expected a path, bytes, or a "
                "file opened in binary mode"
            )

    def open(self) -> BinaryIO:
        """Return a file at its beginning; the caller closes it.

        Raises:
            AudioReadError: The path cannot be opened.
        """
        if self._bytes is not None:
            return io.BytesIO(self._bytes)
        if self._file is not None:
            return cast(BinaryIO, _FileView(self._file))
        assert self._path is not None
        try:
            file = self._path.open("rb")
            if file.seekable():
                return file
        except OSError as error:
            raise AudioReadError(f"cannot read {self.name}: {_describe(error)}") from error
        with file:  # a pipe can be read only once, so a copy is kept
            self._file = _SharedFile(file, self.name)
        return cast(BinaryIO, _FileView(self._file))


def _describe(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder; give a file in it"
    if isinstance(error, PermissionError):
        return "permission denied"
    return (error.strerror or str(error)).lower()


class _SharedFile:
    """An open file that several views read, each at its own position."""

    def __init__(self, file: Readable, name: str) -> None:
        self.lock = threading.Lock()
        if isinstance(file.read(0), str):
            raise ValueError(f"{name} is open as text: open it in binary mode ('rb')")
        self.file = self._make_seekable(file)
        self.origin = self.file.tell()
        self.size = self.file.seek(0, io.SEEK_END) - self.origin
        self.file.seek(self.origin)
        if not self.size and self.origin:
            raise AudioReadError(
                f"{name} is at its end, with nothing left to read: call `seek(0)` first"
            )

    def _make_seekable(self, file: Readable) -> BinaryIO:
        """Return the file itself, or a copy on disk if it cannot seek."""
        seekable = getattr(file, "seekable", None)
        if seekable is not None and seekable():
            return cast(BinaryIO, file)
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (lives as long as self)
        weakref.finalize(self, spool.close)
        shutil.copyfileobj(file, spool)
        spool.seek(0)
        return spool


class _FileView(io.RawIOBase):
    """A view of a shared file, with its own position; closing it does not close the file."""

    def __init__(self, shared: _SharedFile) -> None:
        super().__init__()
        self._shared = shared
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._shared.size}
        self._position = max(origins[whence] + offset, 0)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        shared = self._shared
        rest = max(shared.size - self._position, 0)
        count = rest if size is None or size < 0 else min(size, rest)
        with shared.lock:
            shared.file.seek(shared.origin + self._position)
            data = shared.file.read(count)
        self._position += len(data)
        return data
