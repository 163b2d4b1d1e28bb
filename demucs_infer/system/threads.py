"""Limit the threads that compute beside a network.

The threads of OpenMP wait actively for their next step, as long as there are no more of them than
processors. Another Python thread that computes in parallel starts a team of its own; from then on
all threads sleep and are woken at every step. A network has thousands of steps per second, and
takes a tenth longer, however little the other thread computes.
"""

import threading

import torch

_lock = threading.Lock()


def limit_to_one_thread() -> None:
    """Let the calling thread compute without a team of threads; for threads of our own."""
    with _lock:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        # This also set the number with which later threads begin. Only another thread can restore
        # that without changing the number of this one.
        restorer = threading.Thread(target=torch.set_num_threads, args=(count,))
        restorer.start()
        restorer.join()
