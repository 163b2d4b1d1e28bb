"""Ctrl-C, or a scheduler's SIGTERM, ends the command soon, whatever its threads are busy with.

A signal is seen where Python runs, and a network may be in one call for many seconds, in the main
thread or in another that has to be waited for. Nothing is lost by not waiting: what is in the
spools is whole at any moment, as it has to be for a power cut, and the same command goes on there.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from demucs_infer.batch.attempts import withdraw_all
from demucs_infer.cli.exit_codes import ExitCode

_GRACE_SECONDS = 1.5  # within which all that can end by itself does; two are promised
_ENDS = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


class Terminated(KeyboardInterrupt):
    """As by Ctrl-C, but the machine is wanted for something else."""


@contextmanager
def exit_on_signal(words: str, grace_seconds: float = _GRACE_SECONDS) -> Iterator[None]:
    """End the process a moment after an interrupt, saying `words`, unless it ends by itself.

    A second interrupt ends it at once. For the main thread of a process that is the command's.
    """
    # The system's own handler writes here, even while no Python runs in the main thread.
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    unwound = threading.Event()
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    is_ours = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, _terminate)
    watch = (ears, words, unwound, grace_seconds)
    threading.Thread(target=_watch, args=watch, daemon=True).start()
    try:
        yield
    finally:
        unwound.set()
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        mouth.close()


def _terminate(*_: object) -> None:
    raise Terminated


def _watch(ears: socket.socket, words: str, unwound: threading.Event, grace_seconds: float) -> None:
    with ears:
        code = _heard(ears)
        if code is None:
            return  # the work is over
        end = time.monotonic() + grace_seconds
        withdraw_all()
        ears.settimeout(grace_seconds)
        is_urgent = _heard(ears) is not None
    if unwound.is_set() and not is_urgent:
        # What is left are threads that the interpreter joins: it may still end before us.
        time.sleep(max(0.0, end - time.monotonic()))
    elif not unwound.is_set():  # then there is nobody else to say it
        sys.stderr.write(f"\n{words}\n")
        sys.stderr.flush()
    os._exit(code)


def _heard(ears: socket.socket) -> int | None:
    """The exit code of the interrupt that came; None if none did."""
    try:
        while heard := ears.recv(64):
            for number in heard:
                if number in _ENDS:
                    return _ENDS[signal.Signals(number)]
    except TimeoutError:
        pass
    return None
