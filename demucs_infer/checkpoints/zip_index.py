"""Where each entry of a torch file lies: the directory of an uncompressed zip, nothing unpacked.

`torch.save` never compresses, so an entry is simply a slice of the file: a zip bomb has no place
to hide, and no weight is copied before it is wanted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from demucs_infer.errors import CheckpointError

MAX_DIRECTORY_BYTES = 16 * 2**20
"""Fifty thousand tensors with long names; a Demucs file has about six hundred."""

_END = struct.Struct("<4s4H2LH")  # the end-of-directory record
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s6H3L5H2L")  # one line of the directory
_LOCAL = struct.Struct("<4s5H3L2H")  # the header in front of an entry's bytes
_FULL32 = 0xFFFFFFFF


def is_zip(data: memoryview) -> bool:
    """Whether a file starts as every archive of torch does."""
    return bytes(data[:4]) == b"PK\x03\x04"


def entries(data: memoryview) -> dict[str, memoryview]:
    """Each entry's name and bytes, of a whole archive in (mapped) memory."""
    try:
        found = dict(_members(data, *_directory(data)))
    except (struct.error, IndexError) as error:
        raise CheckpointError("the zip directory is damaged") from error
    if not found:
        raise CheckpointError("the zip archive is empty")
    return found


def _directory(data: memoryview) -> tuple[int, int]:
    """Where the directory starts and stops."""
    tail = bytes(data[max(0, len(data) - _END.size - 2**16) :])
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise CheckpointError("the zip archive has no directory: the file is truncated")
    at += max(0, len(data) - len(tail))
    _, _, _, _, _, size, start, _ = _END.unpack_from(data, at)
    if _FULL32 in (size, start) and at >= _END64_LOCATOR.size:
        magic, _, at64, _ = _END64_LOCATOR.unpack_from(data, at - _END64_LOCATOR.size)
        if magic != b"PK\x06\x07":
            raise CheckpointError("the zip directory is damaged")
        *_, size, start = _END64.unpack_from(data, at64)
    if size > MAX_DIRECTORY_BYTES or start + size > len(data):
        raise CheckpointError(
            f"the zip directory claims {size} bytes at {start} of a file of {len(data)}"
        )
    return start, start + size


def _members(data: memoryview, at: int, stop: int) -> Iterator[tuple[str, memoryview]]:
    while at < stop:
        magic, _, _, _, method, _, _, _, packed, size, *lengths, _, _, _, start = (
            _MEMBER.unpack_from(data, at)
        )
        if magic != b"PK\x01\x02":
            raise CheckpointError("the zip directory is damaged")
        names, extras, comments = lengths
        at += _MEMBER.size
        name = bytes(data[at : at + names]).decode("utf-8", errors="replace")
        extra = data[at + names : at + names + extras]
        at += names + extras + comments
        if method != 0 or packed != size:
            raise CheckpointError("the zip archive is compressed; torch never writes one so")
        size, start = _wide(extra, size, packed, start)
        yield name, _body(data, start, size)


def _wide(extra: memoryview, size: int, packed: int, start: int) -> tuple[int, int]:
    """Size and start of an entry, from its 64-bit field where 32 bits did not do."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, at))
            size = wide.pop(0) if size == _FULL32 else size
            if packed == _FULL32:
                wide.pop(0)
            start = wide.pop(0) if start == _FULL32 else start
        at += length
    return size, start


def _body(data: memoryview, start: int, size: int) -> memoryview:
    magic, *_, names, extras = _LOCAL.unpack_from(data, start)
    begin = start + _LOCAL.size + names + extras
    if magic != b"PK\x03\x04" or begin + size > len(data):
        raise CheckpointError("an entry of the zip archive lies outside the file")
    return data[begin : begin + size]
