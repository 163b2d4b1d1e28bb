"""How the process asks the system for memory.

A network's layers answer with tens of megabytes each. glibc maps every block above 32 MB anew and
returns what is free at the end of its heap; the system clears each page again when it is next
touched: up to a tenth of the time of a pass on a CPU. Elsewhere there is no such call, and nothing
happens.
"""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock

# From malloc.h, and what glibc arrives at by itself once it has seen large blocks.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_USUAL = {_M_TRIM_THRESHOLD: 64 << 20, _M_MMAP_THRESHOLD: 32 << 20, _M_MMAP_MAX: 65_536}
# The threshold of mapping itself cannot be raised beyond 32 MB: no mapping at all.
_KEPT = {_M_TRIM_THRESHOLD: 1 << 30, _M_MMAP_MAX: 0}

_OWN_RULES = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
"""Whoever started the process with one of these has decided already."""

_lock = Lock()
_holders = 0


@contextmanager
def keep_large_allocations() -> Iterator[None]:
    """While this lasts, large blocks that are freed stay with the process, to be used again.

    Afterwards all that is free goes back to the system.
    """
    _hold(1)
    try:
        yield
    finally:
        _hold(-1)


def use_single_arena() -> None:
    """One heap for all threads of a process that does nothing else; before torch allocates.

    Large blocks in a heap for each leave holes; in one heap others fill them.
    """
    _tell({_M_ARENA_MAX: 1})


@contextmanager
def exempt_imports_from_gc() -> Iterator[None]:
    """What is made inside lives as long as the process; for the imports of one that is ours.

    torch brings 150,000 objects, none of them garbage. Python's collector goes through them again
    and again while they come, and once more when the process ends: a third of a second.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def peak_memory() -> int | None:
    """The most bytes that this process ever held; None where the system does not tell.

    On Linux `ru_maxrss` would not do: it begins with the peak of whoever started the process.
    """
    if sys.platform == "win32":
        return None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+)", status)
    return 1024 * int(found[1]) if found else None


def _hold(more: int) -> None:
    global _holders
    with _lock:
        before, _holders = _holders, _holders + more
        if before and _holders or not _OWN_RULES.isdisjoint(os.environ):
            return
        _tell(_KEPT if _holders else _USUAL)
        if not _holders:
            _trim()


def _tell(options: dict[int, int]) -> None:
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        for option, value in options.items():
            libc.mallopt(option, value)


def _trim() -> None:
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    """glibc, where that is what there is."""
    try:
        return ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
