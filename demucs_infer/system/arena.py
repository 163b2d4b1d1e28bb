"""Keep the large tensors of the windows that a thread runs in memory of that thread.

From malloc, such tensors would be aligned, and glibc never uses the hole of an aligned block for
another one of the same size: half of the memory of a process would be holes. Written by hand, as
PyTorch has no allocator for CPUs that can be chosen from Python.
"""

import math
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import RLock
from weakref import WeakSet

import torch
from torch import Tensor

_SIZE = 512 << 20
"""Address space of an arena: only the part that tensors have used takes memory."""

_MIN_BYTES = 1 << 20
"""Smaller tensors come from malloc."""

_ALIGNMENT = 64

# Reentrant: the garbage collector may close an abandoned generator, and so leave its context, in a
# thread that already has this lock.
_lock = RLock()
_users = 0  # open contexts


@dataclass(eq=False)  # no slots: there are weak references
class _Holder:
    """What a thread has: its arena, or the fact that the system refused one."""

    arena: "Arena | None" = None
    is_refused: bool = False


_local = threading.local()
_holders: "WeakSet[_Holder]" = WeakSet()
"""Those of all threads that exist: the holder of a thread ends with it."""


@contextmanager
def use_arenas() -> Iterator[None]:
    """Let `empty` take large tensors from an arena per thread.

    The contexts may be nested, also across threads. After the last one, and when a thread ends, the
    arenas are freed, each as soon as no tensor uses it any more.
    """
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for holder in _holders:
                    holder.arena, holder.is_refused = None, False


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a tensor on the CPU: a large one from the arena of this thread, if there is one."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if _users and size >= _MIN_BYTES:
        block = _allocate(size)
        if block is not None:
            return torch.frombuffer(block, dtype=dtype, count=count).view(shape)
    return torch.empty(shape, dtype=dtype)


def _allocate(size: int) -> memoryview | None:
    holder: _Holder | None = getattr(_local, "holder", None)
    if holder is None:
        holder = _local.holder = _Holder()
        with _lock:
            _holders.add(holder)
    arena = holder.arena
    if arena is None and not holder.is_refused:
        arena = holder.arena = _create_arena()
        holder.is_refused = arena is None
    return None if arena is None else arena.allocate(size)


def _create_arena() -> "Arena | None":
    if sys.platform == "win32":  # there, address space counts as memory before it is used
        return None
    try:
        return Arena(_SIZE)
    except OSError:  # a limit of address space
        return None


class Arena:
    """A range of addresses from which one thread allocates; any thread may free.

    A block is free as soon as its memoryview is, which the tensor on it refers to.
    """

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, size, flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(memory)
        self._free = [(0, size)]  # in order, never adjacent
        # Filled by whichever thread drops a block; `append` and `popleft` need no lock.
        self._dropped: deque[tuple[int, int]] = deque()

    def allocate(self, size: int) -> memoryview | None:
        """Return the first free block of `size` bytes, or None if there is none.

        The first one that fits, and not the best: so the highest addresses stay unused.
        """
        self._merge_dropped()
        length = -(-size // _ALIGNMENT) * _ALIGNMENT
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= length:
                self._free[index : index + 1] = [(start + length, stop)] * (stop - start > length)
                block = self._memory[start : start + length]
                finalizer = weakref.finalize(block, self._dropped.append, (start, start + length))
                finalizer.atexit = False
                return block
        return None

    def _merge_dropped(self) -> None:
        """Add the blocks that were dropped to the free ones."""
        if not self._dropped:
            return
        blocks = list(self._free)
        while self._dropped:
            blocks.append(self._dropped.popleft())
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(blocks):
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], stop
            else:
                merged.append((start, stop))
        self._free = merged
