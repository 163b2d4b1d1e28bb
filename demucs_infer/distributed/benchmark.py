"""Measure in a few seconds how much time a worker on this machine takes per second of audio."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from demucs_infer.api import Separator
from demucs_infer.audio.reader import TrackReader
from demucs_infer.audio.writer import save_audio
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.runner import open_separator
from demucs_infer.demo import song
from demucs_infer.distributed.planner import Benchmark
from demucs_infer.errors import DownloadError
from demucs_infer.options import Request

# Three strides of htdemucs, minus the longest shift, so that the last window is nearly full.
_SECONDS = 17.0

ASSUMED = Benchmark(
    name="assumed, not measured: htdemucs, one thread of a server CPU",
    separate=0.58,
    read=0.0045,
    write=0.0073,
    start_seconds=30.0,
    track_seconds=0.1,
    bytes_in=40_000.0,
    bytes_out=340_000.0,
)
"""The benchmark of a model that is not on this machine."""


def measure_worker(model: ModelSpec, request: Request) -> Benchmark:
    """Measure this process as a worker; return `ASSUMED` if the model is not downloaded."""
    start = perf_counter()
    try:
        separator = open_separator(model, request)
    except DownloadError:
        return ASSUMED
    start_seconds = round(perf_counter() - start, 1)
    with separator:
        name = f"measured here: {model.name} on {separator.device}"
        if separator.device.type == "cpu":
            name += f", {torch.get_num_threads()} threads"
        return measure(separator, request, name=name, start_seconds=start_seconds)


def measure(
    separator: Separator,
    request: Request,
    *,
    name: str,
    seconds: float = _SECONDS,
    start_seconds: float = 0.0,
    clock: Callable[[], float] = perf_counter,
) -> Benchmark:
    """Measure decoding of mp3, the network after one warm-up pass, and encoding as requested."""
    demo = song()
    rate, count = demo.sample_rate, int(seconds * demo.sample_rate)
    mix = demo.mix.repeat(1, count // demo.mix.shape[1] + 1)[:, :count]

    def measure_rate(work: Callable[[], object]) -> float:
        start = clock()
        work()
        return (clock() - start) / seconds

    with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
        source, stem = Path(folder, "mix.mp3"), Path(folder, f"stem.{request.output.extension}")
        save_audio(mix, source, rate)
        track = TrackReader(
            source, sample_rate=separator.samplerate, channels=separator.audio_channels
        )
        read = measure_rate(lambda: [list(track.blocks()) for _ in range(2)])  # once for the level
        write = measure_rate(lambda: save_audio(mix, stem, rate))
        bytes_in, bytes_out = source.stat().st_size / seconds, stem.stat().st_size / seconds
    list(separator.stream_blocks(separator.open_audio(mix[:, :rate], rate)))
    separate = measure_rate(lambda: list(separator.stream_blocks(separator.open_audio(mix, rate))))
    stems = len(separator.stems)
    return Benchmark(
        name=name,
        separate=round(separate, 5),
        read=round(read, 5),
        write=round(stems * write, 5),
        start_seconds=start_seconds,
        bytes_in=round(bytes_in),
        bytes_out=round(stems * bytes_out),
    )
