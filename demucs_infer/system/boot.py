"""Tell when the machine was started."""

import time

_UNWRITTEN_SECONDS = 600.0
"""How long a file may wait for the disk: systems write after 30 s, slow disks have a long queue."""

_CLOCK_SECONDS = 60.0
"""Error of the estimate, as clocks are adjusted."""


def started_at() -> float:
    """Return the time at which the machine was started, in seconds since the epoch."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # counts the time of a suspended machine as well
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - time.monotonic()


def is_from_before_start(modified: float) -> bool:
    """Return whether a file was written shortly before the machine was started.

    If the power failed then, a part of it may be missing, though its size is right.
    """
    return started_at() - _UNWRITTEN_SECONDS <= modified <= started_at() + _CLOCK_SECONDS
