"""Tell where the time of a batch goes: the dearest kernels, kinds of kernels, and the idle rest."""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu.checks import make_fast
from tests.bench.gpu.measures import WINDOW_FLOPS, fastest_precision, time_on
from tests.bench.gpu.report import Part
from tests.bench.gpu.shapes import Shapes, make_network
from tests.bench.music import RATE, song

KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "convolutions": ("conv", "cudnn", "implicit", "wgrad", "dgrad", "fprop"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "splitk", "addmm", "aten::mm"),
    "transforms": ("fft",),
    "copies": ("copy", "memcpy", "memset", "cat"),
}
"""Parts of a kernel's name, in the order in which they are tried."""

BATCH = 16


def profile_windows(part: Part, shapes: Shapes, device: torch.device, folder: Path) -> None:
    """Profile batches of htdemucs, large and small."""
    network = make_network(shapes, "htdemucs").to(device)
    for batch in (shapes.batches[0], 1):
        part.run(
            f"batch {batch}",
            partial(profile_batch, part, network, device, folder, batch),
        )


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    lower = name.lower()
    own = ("_bias_gelu", "_gate_", "_measure_", "_norm_", "_add_norm")
    if any(lower.startswith(start) for start in own):
        return "ours"
    kinds = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
    return next(kinds, "elementwise")


def profile_batch(part: Part, network: Any, device: torch.device, folder: Path, batch: int) -> None:
    """Profile one batch, eagerly: the kernels of a graph have the same names and times."""
    samples = int(network.segment * RATE)
    mix = song(samples / RATE + 0.1)[None, :, :samples].repeat(batch, 1, 1).to(device)
    on_gpu = device.type == "cuda"
    fast = make_fast(network, device, fastest_precision(device), graphs=False)
    graphed = make_fast(network, device, fastest_precision(device))
    with torch.inference_mode():
        for _ in range(2):
            fast(mix)
            graphed(mix)
        seconds = time_on(device, lambda: graphed(mix), 3)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            fast(mix)
            if on_gpu:
                torch.cuda.synchronize(device)
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.key_averages():
        # A kernel is an event of the device; an operation of the CPU contains its kernels.
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        is_kernel = not on_gpu or str(event.device_type).endswith("CUDA")
        if spent and is_kernel:
            times[event.key] += spent / 1e6
            calls[event.key] += event.count
    total = sum(times.values())
    part.add(f"batch {batch}: all kernels", 1000 * total / batch, "ms a window")
    part.add(f"batch {batch}: as a graph", 1000 * seconds / batch, "ms a window")
    if on_gpu:
        note = f"{WINDOW_FLOPS * batch / total / 1e12:.0f} TFLOP/s over all kernels"
        part.add(f"batch {batch}: idle", 100 * (1 - min(1.0, total / seconds)), "%", note=note)
    shares: dict[str, float] = defaultdict(float)
    for name, spent in times.items():
        shares[kind_of(name)] += spent
    for kind, spent in sorted(shares.items(), key=lambda item: -item[1]):
        share = f"{100 * spent / total:.1f} %"
        part.add(f"batch {batch}: {kind}", 1000 * spent / batch, "ms a window", note=share)
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:10]:
        share = f"{100 * spent / total:.1f} %, {calls[name]} calls"
        part.add(f"batch {batch}: `{name[:90]}`", 1000 * spent / batch, "ms a window", note=share)
    with (folder / "profile.txt").open("a") as file:
        file.write(f"batch {batch}\n")
        for name, spent in sorted(times.items(), key=lambda item: -item[1]):
            file.write(f"{1000 * spent:10.3f} ms {calls[name]:6} {kind_of(name):14} {name}\n")
