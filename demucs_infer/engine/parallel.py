"""Decide how many windows run at a time on a CPU, and on how many threads each.

Threads that share a window must wait for each other at every small step, which is slow while other
programs use the cores. Many kernels also sum in an order that depends on the number of threads. So
by default each core runs a window of its own, and the bytes of a stem depend neither on the number
of cores nor on the number of windows that run at a time.

There are two exceptions, where several threads share a window: tracks of a single batch, which
would leave all other cores idle, and networks with long windows, where there is not enough memory
for a window on each core.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from demucs_infer.engine.device_track import SHARE_OF_MEMORY
from demucs_infer.engine.network import Network
from demucs_infer.options import SeparationOptions
from demucs_infer.system.cores import count_cores
from demucs_infer.system.malloc import free_memory, used_memory

_BYTES_PER_SAMPLE = 800
"""Memory per sample of each window that runs: 0.28 GB for the 343,980 samples of htdemucs, of which
measured are 0.19 to 0.25. 0.14 GB are large tensors that are alive at a time."""

_BYTES_PER_SAMPLE_OF_LONG = 1200
"""The same for windows that are longer than `_LONGEST_WINDOW`, and so have no arena."""

_LONGEST_WINDOW = 12.0
"""Seconds: htdemucs reads 7.8, hdemucs_mmi and mdx 44."""

_SHARE = 2
"""The windows that run take at most one part in so many of the free memory."""

_SHARE_OF_LONG = 4
"""The same for long windows: on many cores they would take tens of gigabytes."""

_LEAST_PLAUSIBLE_BYTES = 10**7  # less is a size without its unit
_OVERHEAD_BYTES = 10**8
"""Memory that the first window takes besides: buffers of libraries, which stay."""

_BYTES_PER_SAMPLE_ON_GPU = 1600
"""Memory for the activations of a window there: about 0.5 GB for htdemucs."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How many windows run at a time in threads of this package, and why."""

    windows: int
    """0: the calling thread runs one window after another, with all threads of torch."""
    reason: str
    threads: int = 1
    """Threads of torch for each window, if `windows` is not 0."""

    def __str__(self) -> str:
        if not self.windows:
            return f"one batch at a time, on all threads ({self.reason})"
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{windows} at a time, {threads} each ({self.reason})"


def decide_parallelism(
    *, cores: int, threads: int, memory: int | None, window_bytes: int, is_long: bool = False
) -> Parallelism:
    """Decide how many windows run at a time, given the resources of the machine.

    `cores` is the number of usable cores, `threads` the number that torch may use. The windows
    take at most half of the free `memory` (None: unknown), long ones a quarter. If there is not
    enough for two, all threads share one. If there is not enough for a long window on each core,
    each has several.
    """
    usable = min(cores, threads)
    if memory is None and is_long:
        return Parallelism(0, "the free memory is unknown")
    windows = usable
    if memory is not None:
        windows = memory // (_SHARE_OF_LONG if is_long else _SHARE) // window_bytes
    if windows >= usable:
        return Parallelism(usable, f"{cores} usable cores, {threads} threads of torch")
    reason = f"{cast(int, memory) / 1e9:.1f} GB of free memory"
    if windows < 2:
        return Parallelism(0, reason)
    return Parallelism(windows, reason, usable // windows if is_long else 1)


def choose_parallelism(
    networks: Iterable[Network],
    options: SeparationOptions,
    device: torch.device,
    num_devices: int = 1,
    max_windows: int | None = None,
) -> Parallelism:
    """Decide how many windows of `networks` run at a time on this machine.

    Each of `num_devices` has a batch. With jobs = 0, several windows run at a time only on a CPU,
    and only if tracks are split and each batch is one window. Other numbers of jobs share the
    threads of torch. Not more than `max_windows` run at a time on a CPU.
    """
    networks = list(networks)
    chosen = _choose_parallelism(networks, options, device, num_devices)
    if max_windows is None or device.type != "cpu" or chosen.windows <= max_windows:
        return chosen
    reason = f"max_memory = {cast(int, options.max_memory) / 1e9:g} GB"
    threads = torch.get_num_threads() if max_windows == 1 else chosen.threads
    return Parallelism(max_windows, reason, threads)


def limit_windows(
    networks: Iterable[Network],
    max_memory: int,
    *,
    segment: float | None,
    used: int,
    is_cpu: bool,
) -> int:
    """Return how many windows `max_memory` has room for, in batches and at a time.

    On GPUs that is the number for each of them. `used` is what was in memory before the first
    track; an optimized copy of the weights comes on top. The size of a window is an estimate for
    networks as wide as htdemucs. Raises `ValueError` if not even one window fits.
    """
    networks = list(networks)
    used += sum(map(_weight_bytes, networks)) + _OVERHEAD_BYTES
    window = estimate_window_bytes(networks, segment, is_cpu=is_cpu)
    # On a GPU, a part of it is for the track.
    available = max_memory if is_cpu else max_memory - max_memory // SHARE_OF_MEMORY
    count = int((available - used) // window)
    if count < 1 and max_memory < _LEAST_PLAUSIBLE_BYTES:
        raise ValueError(
            f"max_memory = {max_memory} bytes is too little: a size with a unit, such as 2GB, may "
            f"be meant; about {(used + window) / 1e9:.2f} GB are needed"
        )
    if count < 1:
        raise ValueError(
            f"max_memory = {max_memory / 1e9:.2f} GB is too little: about "
            f"{(used + window) / 1e9:.2f} GB are needed, {used / 1e9:.2f} GB for the program and "
            f"the weights, and {window / 1e9:.2f} GB for one window; raise it, or choose a smaller "
            "model, or a shorter segment if the model allows it"
        )
    return count


def estimate_window_bytes(
    networks: Iterable[Network], segment: float | None, *, is_cpu: bool
) -> int:
    """Return about how much memory each window takes that runs, for networks as wide as htdemucs.

    `segment` is its length in seconds; None: that of each network, the longest of which counts.
    """
    networks = list(networks)
    seconds = max(segment or float(network.segment) for network in networks)
    samples = max((segment or float(net.segment)) * net.samplerate for net in networks)
    if not is_cpu:
        return int(samples * _BYTES_PER_SAMPLE_ON_GPU)
    is_long = seconds > _LONGEST_WINDOW
    return int(samples * (_BYTES_PER_SAMPLE_OF_LONG if is_long else _BYTES_PER_SAMPLE))


def measure_memory(device: torch.device) -> int:
    """Return the bytes that this process uses, on a GPU those that torch has there."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    used = used_memory()
    if used is None:
        raise ValueError(
            "max_memory is not supported here, as this system does not report the memory of a "
            "process: set jobs and batch_size instead"
        )
    return used


def _weight_bytes(network: Network) -> int:
    if not isinstance(network, nn.Module):
        return 0
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def _choose_parallelism(
    networks: Sequence[Network],
    options: SeparationOptions,
    device: torch.device,
    num_devices: int,
) -> Parallelism:
    if num_devices > 1:
        return Parallelism(num_devices, f"{num_devices} devices")
    if options.jobs:
        threads = max(1, torch.get_num_threads() // options.jobs)
        return Parallelism(options.jobs, f"jobs = {options.jobs}", threads)
    if device.type != "cpu":
        return Parallelism(0, f"on {device}")
    if not options.split:
        return Parallelism(0, "tracks are not split")
    if options.batch_size not in ("auto", 1):
        return Parallelism(0, f"batch_size = {options.batch_size}")
    longest = max(options.segment or float(network.segment) for network in networks)
    return decide_parallelism(
        cores=count_cores(),
        threads=torch.get_num_threads(),
        memory=free_memory(),
        window_bytes=max(1, estimate_window_bytes(networks, options.segment, is_cpu=True)),
        is_long=longest > _LONGEST_WINDOW,
    )
