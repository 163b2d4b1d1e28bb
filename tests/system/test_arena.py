"""Large tensors come from the arena of their thread, and never share memory while both exist."""

import random
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from demucs_infer.system import arena
from demucs_infer.system.arena import Arena, empty, use_arenas

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no arenas on Windows")

KIB = 1 << 8  # float32 numbers
MIB = 1 << 18


def list_arenas() -> list[Arena]:
    return [holder.arena for holder in arena._holders if holder.arena is not None]


def test_live_tensors_keep_their_values_while_others_come_and_go() -> None:
    """Views keep a tensor's memory, and tensors may be dropped by another thread."""

    def run(seed: int) -> tuple[int, list[tuple[Tensor, float]]]:
        choose = random.Random(seed)
        live: list[tuple[Tensor, float]] = []
        for _ in range(400):
            if live and choose.random() < 0.5:
                tensor, value = live.pop(choose.randrange(len(live)))
                assert bool((tensor == value).all())
            value = choose.random()
            tensor = empty(choose.randrange(MIB, 3 * MIB)).fill_(value)
            live.append((tensor[choose.randrange(MIB) :], tensor[-1].item()))
            del live[:-12]
        space = arena._local.holder.arena
        used = space._free[-1][0]
        return used, live

    with use_arenas(), ThreadPoolExecutor(3) as pool:
        for used, live in pool.map(run, range(3)):
            assert all(bool((tensor == value).all()) for tensor, value in live)
            # At most 13 tensors of up to 3 MiB are alive; holes may take as much again.
            assert used <= 2 * 13 * 3 * 4 * MIB


def test_memory_is_the_same_for_each_of_many_windows() -> None:
    space = Arena(64 << 20)
    sizes = [5 << 20, 3 << 20, 11 << 20, 2 << 20]

    def run_window() -> int:
        kept = [space.allocate(size) for size in sizes]
        del kept[1]
        kept.append(space.allocate(sizes[1] - 100))  # fits into the gap
        return space._free[-1][0]

    assert {run_window() for _ in range(10)} == {sum(sizes)}
    space._merge_dropped()
    assert space._free == [(0, 64 << 20)]


def test_arena_without_room_is_passed_by() -> None:
    with use_arenas():
        first = empty(100 * MIB)
        second = empty(100 * MIB)  # together more than an arena has
        second[0] = first[0] = 1
        assert first.data_ptr() != second.data_ptr()
    space = Arena(1 << 20)
    block = space.allocate(1 << 20)
    assert block is not None and space.allocate(1) is None
    del block
    assert space.allocate(1 << 20) is not None


def test_small_tensors_and_those_outside_come_from_malloc() -> None:
    empty(MIB)
    with use_arenas():
        empty(KIB)
        assert not list_arenas()
        with use_arenas():
            empty(MIB)
        assert len(list_arenas()) == 1, "the outer context still uses it"
    assert not list_arenas()


def test_arena_is_freed_with_its_last_tensor() -> None:
    with use_arenas():
        tensor = empty(MIB, dtype=torch.complex64).zero_()
        (space,) = list_arenas()
        memory = weakref.ref(space._memory.obj)
        del space
    assert memory() is not None
    assert not tensor.any()
    del tensor
    assert memory() is None


def test_arena_of_a_thread_ends_with_it() -> None:
    with use_arenas():
        for _ in range(3):
            thread = Thread(target=empty, args=(MIB,))
            thread.start()
            thread.join()
        assert not list_arenas()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space")
def test_without_address_space_tensors_come_from_malloc() -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with use_arenas():
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + arena._SIZE // 2, limits[1]))
            tensor = empty(MIB).fill_(1)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert tensor.sum() == MIB
        assert not list_arenas()
