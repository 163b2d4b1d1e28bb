"""Withdraw open attempts on a clean shutdown, so that interrupted tracks do not count as crashes.

An attempt is counted in a journal before it begins, as a process that crashes cannot count it. When
a process is told to end, by Ctrl-C or a scheduler, it takes its open attempts back.
"""

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

_open_attempts: dict[Hashable, Callable[[], None]] = {}
_shutting_down = threading.Event()


def register(key: Hashable, undo: Callable[[], None]) -> None:
    """Register an attempt that was counted; `undo` takes the count back."""
    _open_attempts[key] = undo
    if _shutting_down.is_set():  # begun by a thread that is still running
        withdraw(key)


def complete(key: Hashable) -> None:
    """Forget an attempt that has ended, whether it succeeded or failed."""
    _open_attempts.pop(key, None)


def withdraw(key: Hashable) -> None:
    """Take an attempt back, if it has not ended."""
    undo = _open_attempts.pop(key, None)
    if undo:
        with suppress(Exception):  # then it stays counted
            undo()


def withdraw_all() -> None:
    """Take back all open attempts, and those that begin from now on: the process is ending."""
    _shutting_down.set()
    for key in tuple(_open_attempts):
        withdraw(key)
