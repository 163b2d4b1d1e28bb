"""Paths and URIs alike: what is local or mounted is a path, all else goes through fsspec."""

import codecs
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")


def is_remote(place: str) -> bool:
    """Whether it takes fsspec to get there."""
    return bool(_URI.match(place)) and not place.startswith("file://")


def local(place: str) -> Path:
    """The path of a place that is not remote."""
    return Path(place.removeprefix("file://"))


def joined(root: str, path: str) -> str:
    """`path`, seen from `root`."""
    if _URI.match(path) or Path(path).is_absolute():
        return path
    return f"{root.rstrip('/')}/{path}" if is_remote(root) else str(local(root) / path)


def folder_of(place: str) -> str:
    """What it lies in."""
    return place.rpartition("/")[0] if is_remote(place) else str(local(place).parent)


def _filesystem(place: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ValueError(f"{place} needs fsspec: pip install 'demucs-infer[remote]'") from error
    try:
        found: tuple[Any, str] = url_to_fs(place)
    except (ImportError, ValueError) as error:  # its driver is not installed, or there is none
        raise ValueError(f"{place} cannot be reached: {error}") from error
    return found


@contextmanager
def open_binary(place: str) -> Iterator[BinaryIO]:
    """The file, for reading."""
    if not is_remote(place):
        with local(place).open("rb") as file:
            yield file
        return
    system, path = _filesystem(place)
    with system.open(path, "rb") as remote:
        yield cast(BinaryIO, remote)


@contextmanager
def open_text(place: str) -> Iterator[TextIO]:
    """The file, for reading; names of files that are not UTF-8 survive."""
    with open_binary(place) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{place} is UTF-16: save it as UTF-8")
        file.seek(0)
        yield TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def check_driver(place: str) -> None:
    """A `ValueError` if nothing that is installed leads there."""
    if is_remote(place):
        _filesystem(place)


def fetch(place: str, to: Path) -> None:
    """Copy a file, or what lies directly in a folder, from a URI."""
    system, path = _filesystem(place)
    if not system.isdir(path):
        _copy_down(system, path, to)
        return
    to.mkdir(parents=True, exist_ok=True)
    for name in system.ls(path, detail=False):
        if not system.isdir(name):
            _copy_down(system, name, to / name.rpartition("/")[2])


def _copy_down(system: Any, path: str, to: Path) -> None:
    with system.open(path, "rb") as source, to.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def put(source: Path, place: str) -> None:
    """Copy a file to a URI or a path."""
    if not is_remote(place):
        local(place).parent.mkdir(parents=True, exist_ok=True)
        partial = local(place).with_name(f".{local(place).name}.{os.getpid()}")
        shutil.copyfile(source, partial)
        partial.replace(local(place))
        return
    system, path = _filesystem(place)
    system.makedirs(folder_of(path), exist_ok=True)
    with source.open("rb") as file, system.open(path, "wb") as target:
        shutil.copyfileobj(file, target, 1 << 20)


def read(place: str) -> str | None:
    """A small text at a path or a URI; None where there is none."""
    with suppress(FileNotFoundError):
        if not is_remote(place):
            return local(place).read_text("utf-8")
        system, path = _filesystem(place)
        # Not `open`: that may remember how long it was.
        found: str = system.cat_file(path).decode()
        return found
    return None


def write(place: str, text: str) -> None:
    """Put a small text at a path, in one step, or at a URI."""
    if not is_remote(place):
        with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
            source = Path(folder, "text")
            source.write_text(text, "utf-8")
            put(source, place)
        return
    system, path = _filesystem(place)
    system.makedirs(folder_of(path), exist_ok=True)
    system.pipe_file(path, text.encode())


def remove(place: str) -> None:
    """Remove the file at a URI, if there is one."""
    system, path = _filesystem(place)
    with suppress(FileNotFoundError):
        system.rm_file(path)


def fingerprint(folder: str) -> str:
    """Another one when a file that lies in the folder was changed; of an absent folder, too."""
    files: list[tuple[object, ...]] = []
    if is_remote(folder):
        system, path = _filesystem(folder)
        with suppress(FileNotFoundError):
            for file in system.ls(path, detail=True):
                changed = [file.get(name) for name in ("ETag", "LastModified", "mtime", "created")]
                files.append((file["name"], file["size"], *map(str, changed)))
    else:
        with suppress(OSError):
            for entry in os.scandir(local(folder)):
                files.append((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
    return hashlib.sha256(repr(sorted(files, key=str)).encode(errors="replace")).hexdigest()


def size(place: str) -> int | None:
    """Bytes of the file at a URI; None where there is none."""
    system, path = _filesystem(place)
    with suppress(FileNotFoundError):
        found: int | None = system.info(path)["size"]
        return found
    return None
