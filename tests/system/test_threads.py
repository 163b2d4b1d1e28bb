"""A thread that computes alone leaves all others as they were."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from demucs_infer.system.threads import limit_to_one_thread


def elsewhere(ask: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(ask).result()


def test_it_computes_alone_and_nobody_else_does() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1, initializer=limit_to_one_thread) as ours:
            assert ours.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 3
            assert elsewhere(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_many_that_begin_at_once_do_not_mistake_one_another() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    barrier = threading.Barrier(8)

    def begin() -> int:
        barrier.wait()
        limit_to_one_thread()
        return torch.get_num_threads()

    try:
        with ThreadPoolExecutor(8) as ours:
            assert [each.result() for each in [ours.submit(begin) for _ in range(8)]] == [1] * 8
        assert elsewhere(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)
