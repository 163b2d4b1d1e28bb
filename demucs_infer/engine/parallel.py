"""Decide how many windows run at a time on a CPU, each on one thread.

Threads that share a window meet at every small step and wait for the slowest of them, which costs
most where the cores have other work to do; and many kernels add up in another order for each size
of the team. So each core runs a window of its own, and the bytes of a stem depend neither on the
number of cores nor on that of the windows in flight.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from demucs_infer.engine.network import Network
from demucs_infer.options import SeparationOptions
from demucs_infer.system.malloc import free_memory
from demucs_infer.system.threads import count_cores

_BYTES_PER_SAMPLE = 1000
"""Memory that one more window in flight takes: 0.3 GB for the 343 980 samples of htdemucs."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How many windows run at a time, each on one thread of ours, and why."""

    windows: int
    """0: the calling thread runs them one after another, with the threads that torch has there."""
    reason: str

    def __str__(self) -> str:
        if not self.windows:
            return f"one batch at a time ({self.reason})"
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        return f"{windows} at a time, one thread each ({self.reason})"


def decide_parallelism(
    *, cores: int, threads: int, memory: int | None, window_bytes: int
) -> Parallelism:
    """Decide for `cores` that are usable, of which the caller lets torch use `threads`.

    Half of the free `memory` (None: unknown) may be taken, but one window always runs.
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
    """Decide how windows of `networks` run on this machine at this moment.

    With jobs = "auto", a GPU runs one batch at a time, and so does a CPU whole tracks and batches
    of several windows.
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
