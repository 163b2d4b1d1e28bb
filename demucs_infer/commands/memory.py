"""How the process asks the system for memory."""

import ctypes
import sys
from contextlib import suppress

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_large_blocks() -> None:
    """Let glibc reuse large blocks instead of giving each back and asking for it again.

    A network's layers answer with tens of megabytes each. Above 32 MB glibc maps each anew, and
    the system clears every page of it when it is first touched: a tenth of the time of a pass on
    a CPU. Elsewhere there is no such call, and nothing happens. Must come before torch allocates.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # The threshold of mapping itself cannot be raised beyond 32 MB: no mapping at all.
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        # Large blocks in a heap for each thread leave holes; in one heap others fill them.
        libc.mallopt(_M_ARENA_MAX, 1)
