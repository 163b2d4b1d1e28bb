"""Read and write files at local paths and at the URIs of any store that fsspec can reach."""

import codecs
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

_BLOCK_BYTES = 1 << 20
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def is_remote(location: str) -> bool:
    """Return whether `location` is the URI of a store, and not a path or a `file://` URI."""
    return bool(_URI.match(location)) and not location.startswith("file://")


def local_path(location: str) -> Path:
    """Return the path of a location that is not remote."""
    return Path(location.removeprefix("file://"))


def join(root: str, path: str) -> str:
    """Resolve `path`, which may be absolute or a URI, against `root`."""
    if _URI.match(path) or Path(path).is_absolute():
        return path
    return f"{root.rstrip('/')}/{path}" if is_remote(root) else str(local_path(root) / path)


def parent(location: str) -> str:
    """Return the folder of a location."""
    return location.rpartition("/")[0] if is_remote(location) else str(local_path(location).parent)


def _resolve(location: str) -> tuple[Any, str]:
    """Return the file system of a location, and the path in it.

    Raises:
        ValueError: if the driver of the store is not installed, or there is none.
    """
    if not is_remote(location):
        # Not by `url_to_fs`: a file may be called `~` or `a::b`.
        return LocalFileSystem(), local_path(location).absolute().as_posix()
    try:
        filesystem, path = url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{location} cannot be reached: {error}") from error
    return filesystem, path


def check_driver(location: str) -> None:
    """Raise `ValueError` if no installed driver can reach `location`."""
    _resolve(location)


@contextmanager
def open_binary(location: str, block_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading; `block_bytes` are requested from a store at a time."""
    filesystem, path = _resolve(location)
    with filesystem.open(path, "rb", block_size=block_bytes) as file:
        yield file


@contextmanager
def open_text(location: str) -> Iterator[TextIO]:
    """Open a UTF-8 file for reading; bytes that are not UTF-8 become surrogates, as in paths."""
    with open_binary(location) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{location} is UTF-16: save it as UTF-8")
        file.seek(0)
        yield TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def download(location: str, target: Path) -> None:
    """Copy a file, or the files directly in a folder, to a local path."""
    filesystem, path = _resolve(location)
    if not filesystem.isdir(path):
        filesystem.get_file(path, str(target))
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in filesystem.ls(path, detail=False):
        if not filesystem.isdir(name):
            filesystem.get_file(name, str(target / PurePath(name).name))


def upload(source: Path, location: str) -> None:
    """Copy a local file to a URI; stores show an object when it is complete."""
    filesystem, path = _resolve(location)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    filesystem.put_file(str(source), path)


def read_text(location: str) -> str | None:
    """Return a small text, or None if there is no such file."""
    filesystem, path = _resolve(location)
    with suppress(FileNotFoundError):
        # Not `open`, which may use a cached size.
        return str(filesystem.cat_file(path), "utf-8")
    return None


def write_text(location: str, text: str) -> None:
    """Write a small text in one step, so that readers see all of it or none."""
    filesystem, path = _resolve(location)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    if is_remote(location):  # stores show an object when it is complete
        filesystem.pipe_file(path, text.encode())
    else:
        partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        partial.write_text(text, "utf-8")
        partial.replace(path)


def remove(location: str) -> None:
    """Remove a file if it exists."""
    filesystem, path = _resolve(location)
    with suppress(FileNotFoundError):
        filesystem.rm_file(path)


def fingerprint(folder: str) -> str:
    """Return a digest that changes when a file in the folder does; an absent folder has one too."""
    filesystem, path = _resolve(folder)
    files: list[list[str]] = []
    with suppress(FileNotFoundError):
        for entry in filesystem.ls(path, detail=True):
            fields = ("name", "size", "ETag", "LastModified", "mtime", "created")
            files.append([str(entry.get(field)) for field in fields])
    return hashlib.sha256(repr(sorted(files)).encode(errors="replace")).hexdigest()


def file_size(location: str) -> int | None:
    """Return the size of a file in bytes, or None if there is no such file."""
    filesystem, path = _resolve(location)
    with suppress(FileNotFoundError):
        size: int | None = filesystem.info(path)["size"]
        return size
    return None


def sha256(location: str) -> str:
    """Return the digest of a file, read block by block."""
    digest = hashlib.sha256()
    with open_binary(location) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
