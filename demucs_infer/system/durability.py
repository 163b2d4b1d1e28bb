"""Write files that survive a power loss: complete under their final name, or not there at all.

A rename alone does not do that: the file system may store the new name before the content. So the
content is synchronized first, then the file is renamed, then its folder is synchronized.
"""

import errno
import os
import sys
from itertools import takewhile
from pathlib import Path
from typing import IO

_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
"""Errors of file systems that cannot synchronize a file or folder."""


def sync_file(file: IO[bytes]) -> None:
    """Wait until the content of an open file is stored on the disk."""
    file.flush()
    _sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder are stored on the disk."""
    if sys.platform == "win32":  # where folders cannot be opened, and renames are synchronous
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written to, but not listed
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and wait until their names are stored on the disk."""
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def rename_file(temporary: Path, final: Path) -> None:
    """Give a synchronized file its final name, and wait until that is stored on the disk."""
    temporary.replace(final)
    sync_folder(final.parent)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
