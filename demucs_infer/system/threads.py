"""Limit threads of this package to one core.

The threads of OpenMP wait actively for their next step, as long as there are no more of them than
cores. If a second Python thread computes with OpenMP, it starts its own team of threads; from then
on, all threads sleep and must be woken for every step. A network has thousands of steps per second,
and takes a tenth longer, however little the second thread computes.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from threading import Event, Lock, Thread
from typing import TypeVar

import torch

_T = TypeVar("_T")

_lock = Lock()
_leaves_cores = False


def limit_to_one_thread() -> None:
    """Make torch compute in the calling thread alone; for threads that this package starts."""
    limit_threads(1)


def limit_threads(number: int) -> None:
    """Make torch use that many threads in the calling thread, and as many as before in others."""
    with _lock:
        torch.get_num_threads()  # a thread that never asked would take the default over later
        # Setting the number also changes the default of later threads. Only another thread can
        # restore that without changing the number of this one.
        is_ready, is_changed = Event(), Event()

        def restore_default() -> None:
            default = torch.get_num_threads()
            is_ready.set()
            is_changed.wait()
            torch.set_num_threads(default)

        restorer = Thread(target=restore_default, daemon=True)
        try:
            restorer.start()
        except RuntimeError:  # out of memory or threads: later threads have this number, too
            torch.set_num_threads(number)
            return
        try:
            is_ready.wait()
            torch.set_num_threads(number)
        finally:  # also if a signal raises an exception here
            is_changed.set()
            restorer.join()


def count_threads() -> int:
    """Return how many threads torch uses in the calling thread.

    A thread that never asked takes the default over, but not while `limit_threads` changes it.
    """
    with _lock:
        return torch.get_num_threads()


def leave_cores_to_windows() -> None:
    """Let `compute_in_one_thread` limit the calling thread from now on.

    For programs without threads that compute apart from those of this package: if such a thread
    began while the number changes, it would have a single one. Not for servers, where changing it
    takes longer than small windows of many tracks.
    """
    global _leaves_cores
    _leaves_cores = True


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Make torch use that many threads in the calling thread inside the context."""
    before = count_threads()
    if number == before:
        yield
        return
    try:
        limit_threads(number)
        yield
    finally:
        limit_threads(before)


def compute_in_one_thread(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Pass `items` on, with torch in one thread while they are made, and as before in between.

    Otherwise a second thread would wait actively after each step, on a core that has other work.
    Without `leave_cores_to_windows`, nothing is limited.
    """
    with closing(items):
        while True:
            with use_threads(1) if _leaves_cores else nullcontext():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
