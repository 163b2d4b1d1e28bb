"""Whom this process would leave behind at work: told to end, it takes the blame off them.

A journal counts an attempt before it begins, for a process that dies cannot count. One that is
interrupted, or whose machine is wanted for something else, is nobody's fault.
"""

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

_at_work: dict[Hashable, Callable[[], None]] = {}
_leaving = threading.Event()


def register(key: Hashable, take_back: Callable[[], None]) -> None:
    """An attempt was counted; `take_back` undoes that."""
    _at_work[key] = take_back
    if _leaving.is_set():  # begun by a thread that has not heard of it
        withdraw(key)


def complete(key: Hashable) -> None:
    """It is over, one way or another."""
    _at_work.pop(key, None)


def withdraw(key: Hashable) -> None:
    """Take it back, if it is not over."""
    take_back = _at_work.pop(key, None)
    if take_back:
        with suppress(Exception):  # then it stays counted
            take_back()


def withdraw_all() -> None:
    """The process is about to end, and so is whatever it still begins."""
    _leaving.set()
    for key in tuple(_at_work):
        withdraw(key)
