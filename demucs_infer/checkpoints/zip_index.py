"""Locate the entries of an uncompressed zip archive as slices of a mapped file.

`torch.save` never compresses, so each entry is a slice of the file. Unlike with `zipfile`, weights
are not copied before they are read, and a compressed entry (a zip bomb) is rejected.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from demucs_infer.errors import CheckpointError

MAX_DIRECTORY_BYTES = 16 * 2**20
"""Limit for the zip directory: enough for 50,000 tensors with long names; Demucs has about 600."""

_END = struct.Struct("<4s4H2LH")  # the end-of-directory record
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # in front of an entry's bytes
_FULL32 = 0xFFFFFFFF


def is_zip(data: memoryview) -> bool:
    """Return whether a file starts with the signature of a zip archive."""
    return bytes(data[:4]) == b"PK\x03\x04"


def read_entries(data: memoryview) -> dict[str, memoryview]:
    """Return the bytes of each entry by name; raise `CheckpointError` if the archive is damaged."""
    try:
        entries = dict(_iterate_entries(data, *_find_directory(data)))
    except (struct.error, IndexError, OverflowError) as error:  # an offset of 2**63 overflows
        raise CheckpointError("the zip directory is damaged") from error
    if not entries:
        raise CheckpointError("the zip archive is empty")
    return entries


def _find_directory(data: memoryview) -> tuple[int, int]:
    """Return the positions at which the zip directory starts and ends."""
    tail = bytes(data[max(0, len(data) - _END.size - 2**16) :])
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise CheckpointError("truncated file: the zip archive has no directory")
    at += max(0, len(data) - len(tail))
    _, _, _, _, _, size, start, _ = _END.unpack_from(data, at)
    if _FULL32 in (size, start) and at >= _END64_LOCATOR.size:
        magic, _, at64, _ = _END64_LOCATOR.unpack_from(data, at - _END64_LOCATOR.size)
        if magic != b"PK\x06\x07":
            raise CheckpointError("the zip directory is damaged")
        *_, size, start = _END64.unpack_from(data, at64)
    if size > MAX_DIRECTORY_BYTES or start + size > len(data):
        raise CheckpointError(
            f"invalid zip directory: {size} bytes at {start} of a file of {len(data)}"
        )
    return start, start + size


def _iterate_entries(data: memoryview, at: int, stop: int) -> Iterator[tuple[str, memoryview]]:
    while at < stop:
        magic, _, _, _, method, _, _, _, packed, size, *lengths, _, _, _, start = (
            _DIRECTORY_ENTRY.unpack_from(data, at)
        )
        if magic != b"PK\x01\x02":
            raise CheckpointError("the zip directory is damaged")
        names, extras, comments = lengths
        at += _DIRECTORY_ENTRY.size
        name = bytes(data[at : at + names]).decode("utf-8", errors="replace")
        extra = data[at + names : at + names + extras]
        at += names + extras + comments
        if method != 0 or packed != size:
            raise CheckpointError("unsupported compressed zip archive: torch.save never compresses")
        size, start = _read_zip64(extra, size, packed, start)
        yield name, _entry_bytes(data, start, size)


def _read_zip64(extra: memoryview, size: int, packed: int, start: int) -> tuple[int, int]:
    """Return the size and start of an entry, from the 64-bit field if 32 bits are too few."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, at))
            size = values.pop(0) if size == _FULL32 else size
            if packed == _FULL32:
                values.pop(0)
            start = values.pop(0) if start == _FULL32 else start
        at += length
    return size, start


def _entry_bytes(data: memoryview, start: int, size: int) -> memoryview:
    if start + _LOCAL_HEADER.size > len(data):
        raise CheckpointError("an entry of the zip archive lies outside the file")
    magic, *_, names, extras = _LOCAL_HEADER.unpack_from(data, start)
    begin = start + _LOCAL_HEADER.size + names + extras
    if magic != b"PK\x03\x04" or begin + size > len(data):
        raise CheckpointError("an entry of the zip archive lies outside the file")
    return data[begin : begin + size]
