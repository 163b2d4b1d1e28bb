"""Ctrl-C ends the command soon, whatever its threads are in the middle of.

An interrupt is seen where Python runs, and a network may be in one call for many seconds, in the
main thread or in another that has to be waited for. Nothing is lost by not waiting: what is in the
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

INTERRUPTED = 130
_GRACE_SECONDS = 1.5  # within which all that can end by itself does; two are promised


@contextmanager
def ends_soon(words: str) -> Iterator[None]:
    """End the process a moment after an interrupt, saying `words`, unless it ends by itself.

    For the main thread of a process that is the command's alone.
    """
    # The system's own handler writes here, even while no Python runs in the main thread.
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    unwound = threading.Event()
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ears, words, unwound), daemon=True).start()
    try:
        yield
    finally:
        unwound.set()
        signal.set_wakeup_fd(before)
        mouth.close()


def _watch(ears: socket.socket, words: str, unwound: threading.Event) -> None:
    with ears:
        while heard := ears.recv(64):
            if signal.SIGINT in heard:
                break
        else:
            return  # the work is over
    time.sleep(_GRACE_SECONDS)  # a daemon's sleep: a process that ends meanwhile does not wait
    if not unwound.is_set():  # then there is nobody else to say it
        sys.stderr.write(f"\n{words}\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED)
