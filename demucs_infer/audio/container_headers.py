"""Read from container headers how long a file should be, where FFmpeg does not report it.

To FFmpeg, a WAV that was cut off is a shorter WAV. To tell how much is missing, the size fields in
the headers are read here.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

_MAX_CHUNKS = 1000  # audio files have a few; a file of a million empty chunks must not take hours
_UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFFFFFFFFFF)  # left by writers into a pipe
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_MAX_OGG_PAGE = 1 << 16


def read_data_size(file: BinaryIO, container: str) -> int | None:
    """Return the declared size in bytes of the samples of a WAV, RF64, W64 or CAF, or None."""
    readers = {"wav": _wav_data_size, "w64": _w64_data_size, "caf": _caf_data_size}
    if container not in readers:
        return None
    file.seek(0)
    try:
        size = readers[container](file)
    except (struct.error, OSError):  # a header is incomplete, or a size is impossible
        return None
    return None if size is None or size in _UNKNOWN_SIZES else size


def has_frame_count(file: BinaryIO) -> bool:
    """Return whether an MPEG file declares its number of frames (Xing, Info or VBRI)."""
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0)))
    file.seek(start)
    head = file.read(4096)
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def read_final_position(file: BinaryIO) -> int | None:
    """Return the sample position at the end of an Ogg file.

    None if the last page is incomplete, or is not marked as the last.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - 2 * _MAX_OGG_PAGE, 0))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :] if b"OggS" in tail else b""
    if len(page) < 27 or len(page) < 27 + page[26]:
        return None
    is_complete = len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    if not (is_complete and page[5] & 4):
        return None
    return max(int.from_bytes(page[6:14], "little", signed=True), 0)


def _chunks(file: BinaryIO, header: str) -> Iterator[tuple[bytes, int]]:
    """Yield (name, size) of each chunk from the current position on; the caller may read it."""
    for _ in range(_MAX_CHUNKS):
        raw = file.read(struct.calcsize(header))
        if not raw:
            return
        name, size = struct.unpack(header, raw)
        start = file.tell()
        yield name, size
        file.seek(start + size + (size & 1 if header[0] == "<" else 0))


def _wav_data_size(file: BinaryIO) -> int | None:
    form, _, kind = struct.unpack("<4sI4s", file.read(12))
    if form not in (b"RIFF", b"RF64", b"BW64") or kind != b"WAVE":
        return None
    long_size = None
    for name, size in _chunks(file, "<4sI"):
        if name == b"ds64" and size >= 16:
            long_size = struct.unpack("<QQ", file.read(16))[1]
        if name == b"data":
            return long_size if long_size is not None and size == 0xFFFFFFFF else size
    return None


def _w64_data_size(file: BinaryIO) -> int | None:
    file.seek(40)
    for _ in range(_MAX_CHUNKS):
        start = file.tell()
        name, size = struct.unpack("<16sQ", file.read(24))
        if name == _W64_DATA:
            return int(size) - 24
        file.seek(start + max((size + 7) & ~7, 24))
    return None


def _caf_data_size(file: BinaryIO) -> int | None:
    file.seek(8)
    for name, size in _chunks(file, ">4sQ"):
        if name == b"data":
            return None if size in _UNKNOWN_SIZES else size - 4  # less the edit count
    return None
