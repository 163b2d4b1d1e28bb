"""Tune how the process allocates memory, and measure how much it uses.

The layers of a network return tensors of tens of megabytes. glibc gets new memory from the system
for every allocation above 32 MB, and returns free memory at the end of its heap. The system clears
every page that it hands out, which takes up to a tenth of the time of a network on a CPU. These
functions call `mallopt` and `malloc_trim`, for which Python has no API; without glibc they do
nothing.
"""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import RLock

from demucs_infer.system.cgroups import cgroup_folders
from demucs_infer.system.cores import count_cores

# Constants of malloc.h, and the values that glibc settles on after it has seen large allocations.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_DEFAULTS = {_M_TRIM_THRESHOLD: 64 << 20, _M_MMAP_THRESHOLD: 32 << 20, _M_MMAP_MAX: 65_536}
# The mapping threshold cannot be raised above 32 MB, so mapping is turned off.
_KEEP_LARGE = {_M_TRIM_THRESHOLD: 1 << 30, _M_MMAP_MAX: 0}
_MAP_LARGE = {**_DEFAULTS, _M_MMAP_THRESHOLD: 64 << 10}

_USER_SETTINGS = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
"""Environment variables that configure malloc; if one is set, nothing is changed here."""

_lock = RLock()  # the garbage collector may leave a context in a thread that has it
# Open contexts of either kind: malloc has one setting for the whole process.
_users = 0
_loaders = 0


@contextmanager
def keep_large_allocations() -> Iterator[None]:
    """Keep the memory of large allocations in the process when it is freed, for reuse.

    Heaps of other threads than the main one consist of pieces of 64 MB, which glibc still returns.
    The contexts may be nested, also across threads; after the last one, free memory is returned
    to the system.
    """
    global _users
    with _lock:
        _users += 1
        _apply_settings()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            _apply_settings()
            if not _users:
                return_free_memory()


@contextmanager
def map_large_allocations() -> Iterator[None]:
    """Get separate memory from the system for every large allocation, for weights that stay.

    In the heap, the weights that a network is loaded with, and its optimized ones, would leave
    holes between each other when the former are freed. While `keep_large_allocations` is in use, as
    for another track, this does nothing.
    """
    global _loaders
    with _lock:
        _loaders += 1
        _apply_settings()
    try:
        yield
    finally:
        with _lock:
            _loaders -= 1
            _apply_settings()


def limit_heaps() -> None:
    """Let threads share at most a heap per core, and a spare one; call it before importing torch.

    Each heap has holes that only its own threads can fill; by default, there may be eight per core.
    With a single one, threads that run windows side by side would wait for each other. This changes
    the whole process, so it is for the command, not for programs that import the package. A limit
    that the user has set stays.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    _mallopt({_M_ARENA_MAX: count_cores() + 1})


def return_free_memory() -> None:
    """Return all free pages of the heap to the system, also those between allocations."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def exempt_imports_from_gc() -> Iterator[None]:
    """Exempt all objects that are created in the context from garbage collection.

    Importing torch creates 150,000 objects, none of them garbage. Python's collector visits them
    again and again during the import, and once more at exit, which takes a third of a second. This
    changes the whole process, so it is for the command, not for programs that import the package.
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
    """Return the peak memory of this process in bytes, or None if the system does not report it.

    On Linux, `ru_maxrss` is not used, because it starts with the peak of the parent process.
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
    match = re.search(r"VmHWM:\s*(\d+)", status)
    return 1024 * int(match[1]) if match else None


def used_memory() -> int | None:
    """Return the memory of this process in bytes, or None if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return peak_memory()
    match = re.search(r"VmRSS:\s*(\d+)", status)
    return 1024 * int(match[1]) if match else None


def free_memory(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process can still take without swapping, or None if unknown."""
    limits: list[int] = []
    with suppress(OSError):
        match = re.search(r"^MemAvailable:\s*(\d+)", (root / "proc/meminfo").read_text(), re.M)
        limits += [1024 * int(match[1])] if match else []
    for folder in cgroup_folders(root, "memory"):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            # A limit of "max" is not a number. Cached files count as used, but can be dropped.
            with suppress(OSError, ValueError):
                used = int((folder / usage).read_text())
                stat = (folder / "memory.stat").read_text()
                match = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.M)
                used -= int(match[1]) if match else 0
                limits.append(max(0, int((folder / limit).read_text()) - used))
    if not limits and hasattr(os, "sysconf"):
        with suppress(ValueError, OSError):  # macOS: half of the installed memory
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(limits, default=None)


def _apply_settings() -> None:
    if _USER_SETTINGS.isdisjoint(os.environ):
        _mallopt(_KEEP_LARGE if _users else _MAP_LARGE if _loaders else _DEFAULTS)


def _mallopt(options: dict[int, int]) -> None:
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        for option, value in options.items():
            libc.mallopt(option, value)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    """Return glibc, or None on a system without it."""
    try:
        return ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
