"""Paths and URIs alike: what is local or mounted is a path, all else goes through fsspec."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    if not is_remote(place):
        with local(place).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield file
        return
    system, path = _filesystem(place)
    with system.open(path, "rt", encoding="utf-8-sig", newline="") as remote:
        yield cast(TextIO, remote)


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
    """A small text at a URI; None where there is none."""
    system, path = _filesystem(place)
    with suppress(FileNotFoundError):
        found: str = system.cat_file(path).decode()
        return found
    return None


def write(place: str, text: str) -> None:
    """Put a small text at a URI."""
    system, path = _filesystem(place)
    system.makedirs(folder_of(path), exist_ok=True)
    system.pipe_file(path, text.encode())


def remove(place: str) -> None:
    """Remove the file at a URI, if there is one."""
    system, path = _filesystem(place)
    with suppress(FileNotFoundError):
        system.rm_file(path)


def size(place: str) -> int | None:
    """Bytes of the file at a URI; None where there is none."""
    system, path = _filesystem(place)
    with suppress(FileNotFoundError):
        found: int | None = system.info(path)["size"]
        return found
    return None
