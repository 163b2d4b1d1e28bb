"""Measure windows, tracks, the command and the floor that the hardware sets."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from demucs_infer.api import Separator
from demucs_infer.engine.pipeline import TensorTrack, separate_many
from demucs_infer.optimized.gpu import build, kernel_loader
from demucs_infer.optimized.gpu.arithmetic import PRECISIONS, Precision
from demucs_infer.options import SeparationOptions
from demucs_infer.separator_state import make_runner
from tests.bench.gpu.checks import make_fast, make_graphs
from tests.bench.gpu.report import Part
from tests.bench.gpu.shapes import Shapes, make_network, write_repository
from tests.bench.music import RATE, song
from tests.helpers.bursts import decibels

WINDOW_FLOPS = 334.9e9
"""Floating-point operations of a window of htdemucs."""

WINDOW_ADVANCE = 5.85
"""Seconds by which a window of htdemucs advances at the default overlap."""

GOALS = {"3 min": 700.0, "1 h": 700.0, "3 s": 250.0}
"""Speed of htdemucs in fp16, in multiples of real time, on an H100 or H200."""


def time_on(device: torch.device, run: Callable[[], Any], rounds: int) -> float:
    """Return the seconds of a run: the median, after one run that warms up."""
    seconds = []
    for number in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        if number:
            seconds.append(time.perf_counter() - started)
    return median(seconds)


_make_minute = lru_cache(maxsize=4)(song)


@lru_cache(maxsize=2)
def make_music(seconds: float) -> torch.Tensor:
    """Make a track of any length in little time: a minute at most, repeated."""
    count = int(seconds * RATE)
    minute = _make_minute(min(seconds, 60.0))
    return minute.repeat(1, -(-count // minute.shape[1]))[:, :count].contiguous()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest_precision(device: torch.device) -> str:
    """Return the precision that the goals are about; a CPU has no fp16."""
    return "fp16" if device.type == "cuda" else "fp32"


def measure(part: Part, shapes: Shapes, device: torch.device, work: Path) -> None:
    """Run all measurements, the most important first."""
    part.run("floor", lambda: measure_floor(part, device))
    part.run("windows", lambda: measure_windows(part, shapes, device))
    part.run("tracks", lambda: measure_tracks(part, shapes, device, work))
    part.run("start-up", lambda: measure_start(part, shapes, device, work))
    part.run("short tracks", lambda: measure_short_tracks(part, shapes, device))
    part.run("bag", lambda: measure_bag(part, shapes, device, work))
    part.run("command", lambda: measure_command(part, shapes, device, work))
    for name in list(shapes.networks)[1:]:
        part.run(name, partial(measure_other, part, shapes, device, work, name))


def measure_floor(part: Part, device: torch.device) -> None:
    """Measure what products and copies can do at most here."""
    size = 8192 if device.type == "cuda" else 256
    for dtype in (torch.float16, torch.float32):
        a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
        seconds = time_on(device, partial(torch.matmul, a, a), 5)
        name = str(dtype).removeprefix("torch.")
        part.add(f"product of {size} x {size}, {name}", 2 * size**3 / seconds / 1e12, "TFLOP/s")
    source = torch.empty((1 << 30) if device.type == "cuda" else 1 << 20, device=device)
    target = torch.empty_like(source)
    seconds = time_on(device, lambda: target.copy_(source), 5)
    part.add("copy on the device", 2 * source.numel() * 4 / seconds / 1e12, "TB/s")


def measure_windows(part: Part, shapes: Shapes, device: torch.device) -> None:
    """Measure windows of htdemucs: as it is, and as it runs here, with and without graphs."""
    network = make_network(shapes, "htdemucs").to(device)
    samples = int(network.segment * RATE)
    baseline = best_fp32 = 0.0
    for batch in shapes.batches:
        mix = song(samples / RATE + 0.1)[None, :, :samples].repeat(batch, 1, 1).to(device)
        forms: dict[str, Any] = {"fp32, plain network": network}
        for precision in ("fp32", fastest_precision(device)):
            forms[f"{precision}, eager"] = make_fast(network, device, precision, graphs=False)
            forms[f"{precision}, graph"] = make_fast(network, device, precision)
        for name, form in forms.items():
            with torch.inference_mode():
                form(mix)  # the second batch of a size is captured
                seconds = time_on(device, partial(form, mix), shapes.rounds)
            milliseconds = 1000 * seconds / batch
            note = f"{WINDOW_ADVANCE / seconds * batch:.0f} x real time"
            if name.startswith("fp32, plain"):
                baseline = milliseconds
            if device.type == "cuda":
                note += f", {WINDOW_FLOPS * batch / seconds / 1e12:.0f} TFLOP/s"
            part.add(f"window, batch {batch}, {name}", milliseconds, "ms", note=note)
            if name == "fp32, graph":
                ratio = baseline / milliseconds
                part.add(f"fp32 against the plain network, batch {batch}", ratio, "x")
            if name == "fp32, graph" and batch == shapes.batches[0]:
                best_fp32 = milliseconds
            if name == "fp32, plain network" and batch == 1:
                # As upstream runs it: window by window.
                least = 4.0 if device.type == "cuda" else None
                ratio = milliseconds / best_fp32
                part.add("fp32 against one plain window at a time", ratio, "x", least=least)
    part.run("variants", partial(measure_variants, part, network, device, shapes))


def measure_variants(part: Part, network: Any, device: torch.device, shapes: Shapes) -> None:
    """Measure what single choices are worth, at the largest batch."""
    batch, samples = shapes.batches[0], int(network.segment * RATE)
    mix = make_music(samples / RATE + 0.1)[None, :, :samples].repeat(batch, 1, 1).to(device)
    emulated = device.type == "cpu"
    half = PRECISIONS["fp16"].exceptions
    waves: dict[Any, Any] = {
        f"wave {name}": "float32" for name in ("encoder", "decoder", "branches")
    }
    variants: dict[str, Precision] = {
        "fp32, all products of strict float32": Precision("float32", {}, emulated),
        "fp32": Precision("float32", PRECISIONS["fp32"].exceptions, emulated),
        "fp32, all products of 22 bits": Precision("split", {}, emulated),
        "fp16": Precision("half", half, emulated),
        "fp16, waveform branch in strict float32": Precision("half", {**half, **waves}, emulated),
        "fp16, waveform branch in half, too: not exact": Precision("half", {}, emulated),
    }
    reference: torch.Tensor | None = None
    for name, precision in variants.items():
        graphs = make_graphs(device)
        form = build.optimize_for_gpu(network, precision, device, graphs=graphs)
        with torch.inference_mode():
            output = form(mix[:1])
        reference = output if reference is None else reference
        note = f"{decibels(reference, output):.1f} dB against strict float32"
        add_variant(part, name, form, mix, device, shapes, note)
    with mock.patch.object(kernel_loader, "load_kernels", lambda: None):
        form = make_fast(network, device, "fp16")
        add_variant(part, "fp16, without Triton", form, mix, device, shapes, "")


def add_variant(
    part: Part,
    name: str,
    form: Any,
    mix: torch.Tensor,
    device: torch.device,
    shapes: Shapes,
    note: str,
) -> None:
    """Measure one form of the network."""
    with torch.inference_mode():
        form(mix)
        seconds = time_on(device, partial(form, mix), shapes.rounds)
    part.add(f"window, batch {len(mix)}, {name}", 1000 * seconds / len(mix), "ms", note=note)


def measure_tracks(part: Part, shapes: Shapes, device: torch.device, work: Path) -> None:
    """Measure whole tracks from memory to memory, after a warm-up."""
    write_repository(work / "htdemucs", shapes, "htdemucs")
    separator = open_separator(work / "htdemucs", "htdemucs", device)
    for name, seconds in shapes.tracks.items():
        track = make_music(seconds)
        reset_peak(device)
        rounds = shapes.rounds if seconds < 600 else 1
        elapsed = time_on(device, partial(run_track, separator, track), rounds)
        least = GOALS.get(name) if device.type == "cuda" else None
        note = f"{elapsed:.3f} s{describe_peak(device)}"
        label = f"htdemucs, {fastest_precision(device)}, {name}"
        part.add(label, seconds / elapsed, "x real time", least=least, note=note)
    separator.close()


def run_track(separator: Separator, track: torch.Tensor) -> None:
    """Separate a track; the stems are in the memory of the CPU."""
    separator.separate_tensor(track, RATE)


def open_separator(repo: Path, name: str, device: torch.device, **changes: Any) -> Separator:
    """Open a model of a local repository in the precision that the goals are about."""
    precision: Any = fastest_precision(device)
    return Separator(name, repo, device=str(device), shifts=0, precision=precision, **changes)


def reset_peak(device: torch.device) -> None:
    """Begin to measure the peak of the device's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def describe_peak(device: torch.device) -> str:
    """Return the peak of the device's memory, for a note."""
    if device.type != "cuda":
        return ""
    used, kept = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return f", {used / 1e9:.1f} GB used, {kept / 1e9:.1f} GB reserved"


def measure_short_tracks(part: Part, shapes: Shapes, device: torch.device) -> None:
    """Measure many short tracks that share batches."""
    count, seconds = shapes.short_tracks
    network = make_network(shapes, "htdemucs").to(device)
    precision: Any = fastest_precision(device)
    options = SeparationOptions(shifts=0, precision=precision)
    runner = make_runner([device], compile=False)
    tracks = [TensorTrack(part.contiguous()) for part in make_music(6 * seconds).chunk(6, dim=1)]

    def run() -> None:
        many = (tracks[number % len(tracks)] for number in range(count))
        for _ in separate_many(many, network, options=options, runner=runner):
            pass

    elapsed = time_on(device, run, 1)
    name = f"{count} tracks of {seconds:g} s, {precision}"
    part.add(name, count * seconds / elapsed, "x real time", note=f"{count / elapsed:.1f} tracks/s")


def measure_bag(part: Part, shapes: Shapes, device: torch.device, work: Path) -> None:
    """Measure htdemucs_ft: all stems, and one of them, which is one network of four."""
    write_repository(work / "ft", shapes, "htdemucs_ft")
    seconds = shapes.tracks["3 min"]
    track = make_music(seconds)
    for name, changes in {"all stems": {}, "one stem": {"stems": ["vocals"]}}.items():
        separator = open_separator(work / "ft", "htdemucs_ft", device, **changes)
        elapsed = time_on(device, partial(run_track, separator, track), 1)
        note = f"{elapsed:.3f} s{describe_peak(device)}"
        part.add(f"htdemucs_ft, {name}, 3 min", seconds / elapsed, "x real time", note=note)
        separator.close()


def measure_other(part: Part, shapes: Shapes, device: torch.device, work: Path, name: str) -> None:
    """Measure a track with another network."""
    write_repository(work / name, shapes, name)
    seconds = shapes.tracks["3 min"]
    separator = open_separator(work / name, name, device)
    track = make_music(seconds)
    elapsed = time_on(device, partial(run_track, separator, track), 1)
    note = f"{elapsed:.3f} s{describe_peak(device)}"
    part.add(f"{name}, 3 min", seconds / elapsed, "x real time", note=note)
    separator.close()


START = """
import sys, time
started = time.perf_counter()
import torch
from demucs_infer.api import Separator
from demucs_infer.engine.pipeline import Block
imported = time.perf_counter()
repo, device, precision, seconds = sys.argv[1:]
separator = Separator("htdemucs", repo, device=device, shifts=0, precision=precision)
opened = time.perf_counter()
mix = 0.1 * torch.randn(2, int(float(seconds) * 44100))
for run in range(3):
    before = time.perf_counter()
    separator.separate_tensor(mix, 44100)
    print(f"track {run + 1}:", time.perf_counter() - before)
print("import:", imported - started)
print("open:", opened - imported)
"""


def measure_start(part: Part, shapes: Shapes, device: torch.device, work: Path) -> None:
    """Measure a fresh process: import, loading, and the first tracks of one window."""
    if not (work / "htdemucs").exists():
        write_repository(work / "htdemucs", shapes, "htdemucs")
    seconds = str(shapes.tracks["3 s"])
    args = [str(work / "htdemucs"), str(device), fastest_precision(device), seconds]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", START, *args], capture_output=True, text=True, timeout=120
    )
    whole = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    for line in done.stdout.splitlines():
        name, _, value = line.partition(":")
        part.add(f"fresh process, {name}", float(value), "s")
    part.add("fresh process, whole", whole, "s", note="three tracks of 3 s")


def measure_command(part: Part, shapes: Shapes, device: torch.device, work: Path) -> None:
    """Measure the command from a wav file to files, as a whole process."""
    if find_spec("av") is None:
        part.add("command", None, note="PyAV is not installed")
        return
    import wave

    seconds = shapes.tracks["3 min"]
    source = work / "song.wav"
    with wave.open(str(source), "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes((make_music(seconds).T * 32767).short().contiguous().numpy().tobytes())
    write_repository(work / "command", shapes, "htdemucs")
    kinds = {"wav": [], **({"mp3": ["--mp3"]} if find_spec("lameenc") else {})}
    for kind, flags in kinds.items():
        command = [sys.executable, "-m", "demucs_infer", "-n", "htdemucs", "--shifts", "0"]
        command += ["--repo", str(work / "command"), "-d", str(device), "--force", "-q"]
        command += ["--precision", fastest_precision(device), "-o", str(work / "out"), *flags]
        started = time.perf_counter()
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=120)
        elapsed = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(done.stderr[-600:])
        name = f"command, 3 min wav to {kind}, {os.cpu_count()} cores"
        part.add(name, seconds / elapsed, "x real time", note=f"{elapsed:.2f} s")
