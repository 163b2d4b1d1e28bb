"""End the command soon after Ctrl-C or a scheduler's SIGTERM, even in the middle of a long call.

Python handles a signal only between two of its own instructions, and a network may compute for many
seconds in one call. Ending the process without waiting loses no results: the samples separated so
far are on disk, and the same command resumes from them.
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

_GRACE_SECONDS = 1.5  # for the process to end by itself; the documentation promises two
_EXIT_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, as `KeyboardInterrupt` is by Ctrl-C."""


@contextmanager
def exit_on_signal(message: str, grace_seconds: float = _GRACE_SECONDS) -> Iterator[None]:
    """Print `message` and exit a moment after a signal, unless the process ends by itself.

    A second signal ends the process at once. Use this only in the main thread of the command.
    """
    # The signal handler in C writes signal numbers here, even while no Python code runs.
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    finished = threading.Event()
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handles_sigterm = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if handles_sigterm:
        signal.signal(signal.SIGTERM, _raise_terminated)
    arguments = (receiver, message, finished, grace_seconds)
    threading.Thread(target=_exit_after_signal, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        if handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(previous)
        sender.close()


def _raise_terminated(*_: object) -> None:
    raise Terminated


def _exit_after_signal(
    receiver: socket.socket, message: str, finished: threading.Event, grace_seconds: float
) -> None:
    with receiver:
        code = _wait_for_signal(receiver)
        if code is None:
            return
        deadline = time.monotonic() + grace_seconds
        withdraw_all()
        receiver.settimeout(grace_seconds)
        is_repeated = _wait_for_signal(receiver) is not None
    if finished.is_set() and not is_repeated:
        # Only threads that the interpreter joins are left: it may still end before the deadline.
        time.sleep(max(0.0, deadline - time.monotonic()))
    elif not finished.is_set():  # the main thread had no chance to print it
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
    os._exit(code)


def _wait_for_signal(receiver: socket.socket) -> ExitCode | None:
    """Return the exit code of the next signal; None if the sender closes, or after the timeout."""
    try:
        while numbers := receiver.recv(64):
            for number in numbers:
                if number in _EXIT_CODES:
                    return _EXIT_CODES[signal.Signals(number)]
    except TimeoutError:
        pass
    return None
