"""Recognize files that a download gave in place of the requested one."""

from __future__ import annotations

_KINDS = {
    b"<!doctype html": "a web page: does its server ask for a login or a consent?",
    b"<html": "a web page: does its server ask for a login or a consent?",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull, or "
    "download it",
}


def describe_mistaken_file(start: bytes) -> str | None:
    """Return what a file is whose first 64 bytes or more are `start`; None for all other files."""
    start = start[:64].lstrip().lower()
    return next((text for prefix, text in _KINDS.items() if start.startswith(prefix)), None)
