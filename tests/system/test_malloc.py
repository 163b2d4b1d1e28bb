"""Large allocations are reused inside `keep_large_allocations`, and only there."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is meant")

SCRIPT = """
import resource
import torch

from demucs_infer.system import malloc
from demucs_infer.options import SeparationOptions
from demucs_infer.engine.pipeline import TensorTrack
from demucs_infer.engine.pipeline import separate


BYTES, TIMES = 64 << 20, 4


def fill(size):
    for _ in range(TIMES):
        torch.empty(size, dtype=torch.uint8)[:BYTES].fill_(1)


def share_of_new_pages(size=BYTES):
    '''Return the share of the filled pages that the system had to provide.'''
    fill(size), fill(size)  # until the heap has grown
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill(size)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults / (TIMES * BYTES / 4096)


def oversized():
    '''Return a size that fits into no hole of the heap: that of the process.'''
    return int(open("/proc/self/statm").read().split()[0]) * 4096


class Echo:
    sources, samplerate, audio_channels = ["all"], 100, 2

    def __init__(self, segment):
        self.segment = segment

    def __call__(self, mix):
        return mix[:, None]


TRACK = TensorTrack(torch.randn(2, 300))
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT + body]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True)


# Close to 0 or 1: the interpreter itself touches some pages.
BODIES: dict[str, str] = {
    "outside, every allocation is new": "assert share_of_new_pages() > 0.9",
    "inside, none is new": """
with malloc.keep_large_allocations():
    assert share_of_new_pages() < 0.1
""",
    "afterwards, defaults are restored": """
with malloc.keep_large_allocations():
    share_of_new_pages()
assert share_of_new_pages(oversized()) > 0.9
""",
    "afterwards, memory is returned to the system": """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


before, small = resident(), []
with malloc.keep_large_allocations():
    for _ in range(4):
        blocks = [torch.ones(BYTES // 4) for _ in range(4)]
        small.append(torch.ones(4096))  # lies above them in the heap
    del blocks
    assert resident() - before > 3 * BYTES
assert resident() - before < BYTES
""",
    "weights that are mapped leave no holes when others between them are freed": """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


before = resident()
with malloc.map_large_allocations():
    weights = [torch.ones(1 << 18) for _ in range(128)]  # of 1 MB
    del weights[::2]
    assert resident() - before < 80 << 20
small = [torch.ones(1 << 18) for _ in range(128)]
del small[::2]  # for comparison: they lie in the heap
assert resident() - before > 160 << 20
""",
    "nested contexts: the last one restores defaults": """
with malloc.keep_large_allocations():
    with malloc.keep_large_allocations():
        share_of_new_pages()
    assert share_of_new_pages() < 0.1
assert share_of_new_pages(oversized()) > 0.9
""",
    "during a separation": """
shares = [share_of_new_pages() for _ in separate(TRACK, Echo(1))]
assert len(shares) > 2 and max(shares) < 0.1
assert share_of_new_pages(oversized()) > 0.9
""",
    "not for windows of hundreds of megabytes": """
for echo, options in [
    (Echo(44), SeparationOptions()),
    (Echo(1), SeparationOptions(segment=44)),
    (Echo(1), SeparationOptions(batch_size=44)),
]:
    running = separate(TRACK, echo, options=options)
    next(running)
    assert share_of_new_pages(oversized()) > 0.9
    running.close()
""",
}


Processes = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Run every case in a process of its own, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(run, body) for case, body in BODIES.items()}


@pytest.mark.parametrize("case", BODIES)
def test_keep_large_allocations(case: str, processes: Processes) -> None:
    process = processes[case].result()
    assert process.returncode == 0, process.stderr


def test_settings_of_the_user_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    process = run("""
with malloc.keep_large_allocations():
    assert share_of_new_pages() > 0.9
""")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("of_user", [None, "2", "6"])
def test_threads_share_as_many_heaps_as_there_are_cores(
    of_user: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a spare one, unless the user has set another limit; glibc's own is eight per core."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if of_user:
        monkeypatch.setenv("MALLOC_ARENA_MAX", of_user)
    script = """
import ctypes, sys, threading
from demucs_infer.system import malloc
malloc.count_cores = lambda: 3  # of any machine
malloc.limit_heaps()
barrier = threading.Barrier(12)
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
def allocate():
    libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
file = libc.fdopen(1, b"w")
libc.malloc_info(0, file)
libc.fflush(ctypes.c_void_p(file))
"""
    heaps = subprocess.check_output([sys.executable, "-c", script]).count(b"<heap ")
    assert heaps == (int(of_user) if of_user else 3 + 1)  # among 13 threads


def test_imports_are_exempt_from_garbage_collection() -> None:
    """Later objects are collected as usual."""
    script = """
import gc

from demucs_infer.system import malloc

try:
    with malloc.exempt_imports_from_gc():
        raise KeyboardInterrupt
except KeyboardInterrupt:
    assert gc.isenabled() and not gc.get_freeze_count()
with malloc.exempt_imports_from_gc():
    import torch
count = gc.get_freeze_count()
assert count > 50_000 and gc.isenabled()
with malloc.exempt_imports_from_gc():
    later = [[]]
assert gc.get_freeze_count() <= count and gc.is_tracked(later)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_peak_memory_excludes_the_parent() -> None:
    """`ru_maxrss`, the usual source, starts with the peak of the parent."""
    child = "from demucs_infer.system.malloc import peak_memory; print(peak_memory())"
    parent = f"""
import subprocess, sys
from demucs_infer.system.malloc import peak_memory
held = b"x" * (400 << 20)
child = int(subprocess.check_output([sys.executable, "-c", {child!r}]))
assert child < len(held) < peak_memory(), child
"""
    subprocess.run([sys.executable, "-c", parent], check=True)


def test_bench_measures_the_memory_of_the_command() -> None:
    bench = """
import sys
from pathlib import Path
from tests.bench.pairs import time_commands
held = b"x" * (400 << 20)
# The command holds 100 MiB, and its interpreter some ten; the bench, four times that.
took = time_commands([[sys.executable, "-c", "held = b'x' * (100 << 20)"]], "ours", Path())
assert 100 < took["peak"] < 200 and 0 < took["cpu"] and 0 < took["seconds"], took
"""
    subprocess.run([sys.executable, "-c", bench], check=True)
