"""Limiting a thread does not change other threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from demucs_infer.system.threads import limit_to_one_thread, use_threads


def run_in_new_thread(function: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_limit_applies_to_the_calling_thread_only() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1, initializer=limit_to_one_thread) as ours:
            assert ours.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 3
            assert run_in_new_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_limit_in_concurrent_threads() -> None:
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
        assert run_in_new_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_nested_limits_leave_the_number_of_later_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with use_threads(1):
            assert run_in_new_thread(torch.get_num_threads) == 3
            with use_threads(2):
                assert torch.get_num_threads() == 2
                assert run_in_new_thread(torch.get_num_threads) == 3
            assert torch.get_num_threads() == 1
            assert run_in_new_thread(torch.get_num_threads) == 3
        assert torch.get_num_threads() == 3
        assert run_in_new_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_no_thread_is_left_when_a_signal_interrupts_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_num_threads, count = torch.set_num_threads, threading.active_count()

    def interrupt(number: int) -> None:
        if threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
            raise KeyboardInterrupt
        set_num_threads(number)

    monkeypatch.setattr(torch, "set_num_threads", interrupt)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), use_threads(before + 1):
        pass
    assert threading.active_count() == count
    assert torch.get_num_threads() == before
