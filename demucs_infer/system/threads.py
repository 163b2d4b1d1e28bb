"""Threads beside the one in which a network runs.

OpenMP's threads wait actively for their next step as long as there are no more of them than
processors. Another thread that computes in parallel brings a team of its own; from then on all
are put to sleep and woken at every step, and a network has thousands of steps a second: it takes a
tenth longer, however little the other thread does.
"""

import threading

import torch

_lock = threading.Lock()


def limit_to_one_thread() -> None:
    """From now on the thread that calls this computes by itself: for threads that are ours."""
    with _lock:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        # It also says what threads to come begin with, and only another one can take that back.
        other = threading.Thread(target=torch.set_num_threads, args=(count,))
        other.start()
        other.join()
