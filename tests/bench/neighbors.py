"""Keep cores busy beside a measurement, or leave it only some of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

COMPUTE = "while True: pass"
STREAM = (
    "import numpy\n"
    "a, b = numpy.ones((2, 1 << 25), numpy.float32)\n"  # larger than caches: memory is the limit
    "while True: numpy.copyto(b, a); numpy.copyto(a, b)"
)


@contextmanager
def busy_processes(computing: int, streaming: int = 0) -> Iterator[None]:
    """Run processes that only compute, and others that only move memory, until the block ends."""
    programs = [COMPUTE] * computing + [STREAM] * streaming
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def limited_cores(count: int | None) -> Iterator[None]:
    """Let this process, and those it starts, use only `count` cores (None: all)."""
    before = os.sched_getaffinity(0)
    if count is not None and not 1 <= count <= len(before):
        raise ValueError(f"cannot use {count} cores: this process may use {len(before)}")
    try:
        if count is not None:
            os.sched_setaffinity(0, sorted(before)[:count])
        yield
    finally:
        os.sched_setaffinity(0, before)
