"""What a worker takes for a second of sound, measured in a few seconds on this machine."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from demucs_infer.api import Separator
from demucs_infer.audio.reader import TrackReader
from demucs_infer.audio.writer import save_audio
from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.batch.runner import open_separator
from demucs_infer.demo import song
from demucs_infer.distributed.planner import Benchmark
from demucs_infer.errors import DownloadError

# Three strides of htdemucs less the longest shift: the last window is nearly full.
_SECONDS = 17.0

ASSUMED = Benchmark(
    name="assumed, not measured: htdemucs, one thread of a server's processor",
    separate=0.58,
    read=0.0045,
    write=0.0073,
    start_seconds=30.0,
    track_seconds=0.1,
    bytes_in=40_000.0,
    bytes_out=340_000.0,
)
"""What stands for a model that is not on this machine."""


def measure_here(
    model: ModelSpec, order: SeparationRequest, *, device: str, jobs: int
) -> Benchmark:
    """A worker as this process would be one; `ASSUMED` where the model would have to be fetched."""
    begun = perf_counter()
    try:
        separator = open_separator(model, order, device=device, jobs=jobs)
    except DownloadError:
        return ASSUMED
    start_seconds = round(perf_counter() - begun, 1)
    with separator:
        name = f"measured here: {model.name} on {separator.device}"
        if separator.device.type == "cpu":
            name += f", {torch.get_num_threads()} threads"
        return measure(separator, order, name=name, start_seconds=start_seconds)


def measure(
    separator: Separator,
    order: SeparationRequest,
    *,
    name: str,
    seconds: float = _SECONDS,
    start_seconds: float = 0.0,
    clock: Callable[[], float] = perf_counter,
) -> Benchmark:
    """mp3 in, the files of `order` out, and the network once it is warm."""
    made = song()
    rate, count = made.sample_rate, int(seconds * made.sample_rate)
    mix = made.mix.repeat(1, count // made.mix.shape[1] + 1)[:, :count]

    def timed(work: Callable[[], object]) -> float:
        begun = clock()
        work()
        return (clock() - begun) / seconds

    with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
        source, stem = Path(folder, "mix.mp3"), Path(folder, f"stem.{order.extension}")
        save_audio(mix, source, rate)
        track = TrackReader(
            source, sample_rate=separator.samplerate, channels=separator.audio_channels
        )
        read = timed(lambda: [list(track.blocks()) for _ in range(2)])  # also for the level
        write = timed(lambda: save_audio(mix, stem, rate))
        sizes = source.stat().st_size / seconds, stem.stat().st_size / seconds
    list(separator.stream_blocks(separator.open_audio(mix[:, :rate], rate)))
    separate = timed(lambda: list(separator.stream_blocks(separator.open_audio(mix, rate))))
    stems = len(separator.stems)
    return Benchmark(
        name=name,
        separate=round(separate, 5),
        read=round(read, 5),
        write=round(stems * write, 5),
        start_seconds=start_seconds,
        bytes_in=round(sizes[0]),
        bytes_out=round(stems * sizes[1]),
    )
