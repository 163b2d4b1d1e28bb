"""Decide how many windows run at a time on a CPU, each on one thread.

Threads that share a window must wait for each other at every small step, which is slow while other
programs use the cores. Many kernels also sum in an order that depends on the number of threads. So
each core runs a window of its own, and the bytes of a stem depend neither on the number of cores
nor on the number of windows that run at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from demucs_infer.engine.network import Network
from demucs_infer.options import SeparationOptions
from demucs_infer.system.malloc import free_memory
from demucs_infer.system.threads import count_cores

_BYTES_PER_SAMPLE = 1000
"""Memory per sample of each window that runs: 0.3 GB for the 343,980 samples of htdemucs."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How many windows run at a time, each on its own thread, and why."""

    windows: int
    """0: the calling thread runs one window after another, with all threads of torch."""
    reason: str

    def __str__(self) -> str:
        if not self.windows:
            return f"one batch at a time ({self.reason})"
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        return f"{windows} at a time, one thread each ({self.reason})"


def decide_parallelism(
    *, cores: int, threads: int, memory: int | None, window_bytes: int
) -> Parallelism:
    """Decide how many windows run at a time, given the resources of the machine.

    `cores` is the number of usable cores, `threads` the number that torch may use. The windows
    take at most half of the free `memory` (None: unknown), but at least one window runs.
    """
    usable = min(cores, threads)
    reason = f"{cores} usable cores, {threads} threads of torch"
    if memory is not None and memory // 2 // window_bytes < usable:
        usable = max(1, memory // 2 // window_bytes)
        reason = f"{memory / 1e9:.1f} GB of free memory"
    return Parallelism(usable, reason)


def choose_parallelism(
    networks: Iterable[Network], options: SeparationOptions, device: torch.device
) -> Parallelism:
    """Decide how many windows of `networks` run at a time on this machine.

    With jobs = "auto", several windows run at a time only on a CPU, and only if tracks are split
    and each batch is one window.
    """
    if options.jobs != "auto":
        return Parallelism(options.jobs, f"jobs = {options.jobs}")
    if device.type != "cpu":
        return Parallelism(0, f"on {device}")
    if not options.split:
        return Parallelism(0, "tracks are not split")
    if options.batch_size not in ("auto", 1):
        return Parallelism(0, f"batch_size = {options.batch_size}")
    samples = max(
        (options.segment or float(network.segment)) * network.samplerate for network in networks
    )
    return decide_parallelism(
        cores=count_cores(),
        threads=torch.get_num_threads(),
        memory=free_memory(),
        window_bytes=max(1, int(samples * _BYTES_PER_SAMPLE)),
    )
