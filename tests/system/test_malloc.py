"""Large blocks are used again while that is asked for, and only then."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is meant")

SCRIPT = """
import resource
import torch

from demucs_infer.system import malloc as heap
from demucs_infer.options import Options
from demucs_infer.engine.pipeline import TensorTrack
from demucs_infer.engine.pipeline import separate


BYTES, TIMES = 64 << 20, 4


def fill(size):
    for _ in range(TIMES):
        torch.empty(size, dtype=torch.uint8)[:BYTES].fill_(1)


def share(size=BYTES):
    '''Of the pages that were filled, how many the system had to give.'''
    fill(size), fill(size)  # until the heap has found its size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill(size)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults / (TIMES * BYTES / 4096)


def larger():
    '''As large as the process: it finds no room in what was kept, whatever holes that has.'''
    return int(open("/proc/self/statm").read().split()[0]) * 4096


class Echo:
    sources, samplerate, audio_channels = ["all"], 100, 2

    def __init__(self, segment):
        self.segment = segment

    def __call__(self, mix):
        return mix[:, None]


TRACK = TensorTrack(torch.randn(2, 300))
"""


def run(body: str) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT + body], check=True)


# All or nothing, but for what the interpreter itself touches.
BODIES: dict[str, str] = {
    "outside, every block is new": "assert share() > 0.9",
    "inside, none is": """
with heap.keep_large_allocations():
    assert share() < 0.1
""",
    "afterwards it is as it was": """
with heap.keep_large_allocations():
    share()
assert share(larger()) > 0.9
""",
    "what was kept is given back": """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


before, small = resident(), []
with heap.keep_large_allocations():
    for _ in range(4):
        blocks = [torch.ones(BYTES // 4) for _ in range(4)]
        small.append(torch.ones(4096))  # lies above them in the heap
    del blocks
    assert resident() - before > 3 * BYTES
assert resident() - before < BYTES
""",
    "the last one out puts it back": """
with heap.keep_large_allocations():
    with heap.keep_large_allocations():
        share()
    assert share() < 0.1
assert share(larger()) > 0.9
""",
    "while a track is separated": """
shares = [share() for _ in separate(TRACK, Echo(1))]
assert len(shares) > 2 and max(shares) < 0.1
assert share(larger()) > 0.9
""",
    "not where a window takes hundreds of megabytes": """
for echo, options in [
    (Echo(44), Options()), (Echo(1), Options(segment_seconds=44)), (Echo(1), Options(batch_size=44))
]:
    running = separate(TRACK, echo, options=options)
    next(running)
    assert share(larger()) > 0.9
    running.close()
""",
}


@pytest.mark.parametrize("case", BODIES)
def test_large_blocks(case: str) -> None:
    run(BODIES[case])


def test_rules_of_whoever_started_the_process_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    run("""
with heap.keep_large_allocations():
    assert share() > 0.9
""")


def test_what_torch_brings_is_left_to_itself() -> None:
    """And what comes later is collected as ever."""
    script = """
import gc

from demucs_infer.system import malloc as heap

try:
    with heap.exempt_imports_from_gc():
        raise KeyboardInterrupt
except KeyboardInterrupt:
    assert gc.isenabled() and not gc.get_freeze_count()
with heap.exempt_imports_from_gc():
    import torch
count = gc.get_freeze_count()
assert count > 50_000 and gc.isenabled()
with heap.exempt_imports_from_gc():
    later = [[]]
assert gc.get_freeze_count() <= count and gc.is_tracked(later)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_peak_memory_is_that_of_the_process_alone() -> None:
    """`ru_maxrss`, which others read, begins with the peak of the parent."""
    child = "from demucs_infer.system.malloc import peak_memory; print(peak_memory())"
    parent = f"""
import subprocess, sys
from demucs_infer.system.malloc import peak_memory
held = b"x" * (400 << 20)
child = int(subprocess.check_output([sys.executable, "-c", {child!r}]))
assert child < len(held) < peak_memory(), child
"""
    subprocess.run([sys.executable, "-c", parent], check=True)


def test_the_bench_tells_the_memory_of_a_command_not_its_own() -> None:
    bench = """
import sys
from pathlib import Path
from tests.bench.pairs import timed
held = b"x" * (400 << 20)
# The command holds 100 MiB, and its interpreter some ten; the bench, four times that.
took = timed([[sys.executable, "-c", "held = b'x' * (100 << 20)"]], "ours", Path())
assert 100 < took["peak"] < 200 and 0 < took["cpu"] and 0 < took["seconds"], took
"""
    subprocess.run([sys.executable, "-c", bench], check=True)
