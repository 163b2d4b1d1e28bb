"""Withdraw open attempts on a clean shutdown, so that interrupted tracks do not count as crashes.

An attempt to separate a track is counted before it begins, because a process that crashes cannot
count it afterwards. A process that is told to end, by Ctrl-C or a scheduler, undoes this count for
all attempts that have not ended.
"""

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

_open_attempts: dict[Hashable, Callable[[], None]] = {}
_shutting_down = threading.Event()


def register(key: Hashable, undo: Callable[[], None]) -> None:
    """Register an attempt that was counted; `undo` is the function that undoes the count."""
    _open_attempts[key] = undo
    if _shutting_down.is_set():  # begun by a thread that is still running
        withdraw(key)


def complete(key: Hashable) -> None:
    """Forget an attempt that has ended, whether it succeeded or failed."""
    _open_attempts.pop(key, None)


def withdraw(key: Hashable) -> None:
    """Undo the count of an attempt, if it has not ended."""
    undo = _open_attempts.pop(key, None)
    if undo:
        with suppress(Exception):  # if this fails, the attempt remains counted
            undo()


def withdraw_all() -> None:
    """Undo the count of all attempts, also of those that begin while the process is ending."""
    _shutting_down.set()
    for key in tuple(_open_attempts):
        withdraw(key)
