"""What a file says about its own length, where FFmpeg does not pass it on.

FFmpeg believes the bytes that are there: a WAV that was cut off is for it a shorter WAV. To say
how much is missing, the few bytes that hold the promise are read here.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

_MOST_CHUNKS = 1000  # a file of a million empty chunks is no music
_UNKNOWN = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFFFFFFFFFF)  # what writers into a pipe leave there
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_PAGE = 1 << 16  # no page of an Ogg stream is longer


def data_bytes(file: BinaryIO, container: str) -> int | None:
    """How many bytes of samples a WAV, RF64, W64 or CAF says it holds; None: it does not say."""
    readers = {"wav": _wav_data, "w64": _w64_data, "caf": _caf_data}
    if container not in readers:
        return None
    file.seek(0)
    try:
        size = readers[container](file)
    except struct.error:  # it ends inside a header
        return None
    return None if size is None or size in _UNKNOWN else size


def counts_frames(file: BinaryIO) -> bool:
    """Whether an MPEG file says how many frames it holds (Xing, Info or VBRI)."""
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0)))
    file.seek(start)
    head = file.read(4096)
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def end_mark(file: BinaryIO) -> int | None:
    """The time of an Ogg file's last page; None where it is torn or does not say it is the last."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - 2 * _PAGE, 0))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :] if b"OggS" in tail else b""
    if len(page) < 27 or len(page) < 27 + page[26]:
        return None
    is_whole = len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    if not (is_whole and page[5] & 4):
        return None
    return max(int.from_bytes(page[6:14], "little", signed=True), 0)


def _chunks(file: BinaryIO, header: str) -> Iterator[tuple[bytes, int]]:
    """Names and sizes of chunks from here on; the caller may read in a chunk, not beyond it."""
    for _ in range(_MOST_CHUNKS):
        raw = file.read(struct.calcsize(header))
        if not raw:
            return
        name, size = struct.unpack(header, raw)
        start = file.tell()
        yield name, size
        file.seek(start + size + (size & 1 if header[0] == "<" else 0))


def _wav_data(file: BinaryIO) -> int | None:
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


def _w64_data(file: BinaryIO) -> int | None:
    file.seek(40)
    for _ in range(_MOST_CHUNKS):
        start = file.tell()
        name, size = struct.unpack("<16sQ", file.read(24))
        if name == _W64_DATA:
            return int(size) - 24
        file.seek(start + max((size + 7) & ~7, 24))
    return None


def _caf_data(file: BinaryIO) -> int | None:
    file.seek(8)
    for name, size in _chunks(file, ">4sQ"):
        if name == b"data":
            return None if size in _UNKNOWN else size - 4  # four bytes count edits
    return None
