"""Compute checksums of files."""

import hashlib
from collections.abc import Callable
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def sha256_file(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """Return the sha256 of a file; `check` is called before each block and may raise to stop."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            check()
            digest.update(block)
    return digest.hexdigest()
