"""Estimate how long a manifest takes on given workers, what it costs, and what limits it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from demucs_infer.distributed.manifest import TrackRow

_MAX = 1e15  # of any rate: sums stay finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Measurements of one worker, which reads, separates and writes in parallel."""

    name: str = ""
    separate: float
    """Seconds in the network per second of audio."""

    read: float = 0.0
    """Seconds of decoding per second of audio."""

    write: float = 0.0
    """Seconds of encoding all stems per second of audio."""

    track_seconds: float = 0.0
    """Fixed seconds per track."""

    start_seconds: float = 0.0
    """Seconds to start a worker and load its model."""

    bytes_in: float = 0.0
    """Bytes of the input per second of audio."""

    bytes_out: float = 0.0
    """Bytes of all stems per second of audio."""

    storage_bytes_per_second: float | None = None
    """Throughput of the storage for all workers together; None for no limit."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name = {self.name!r} of a benchmark must be text")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and 0 <= value <= _MAX):
                raise ValueError(f"{field.name} = {value!r} of a benchmark must be a number >= 0")
        if not self.seconds_per_second or self.storage_bytes_per_second == 0:
            raise ValueError("invalid benchmark: rates must be finite and non-zero")

    @classmethod
    def read_file(cls, path: Path) -> "Benchmark":
        """Read a benchmark from a JSON file, raising `ValueError` for what is wrong with it."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{"name": f"from {path.name}", **values})
        except TypeError as error:  # no object, or other fields
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(
                f"{path} must be a JSON object with `separate`, and optionally others of: {names}"
            ) from error
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def seconds_per_second(self) -> float:
        """Seconds per second of audio of a worker's slowest part."""
        return max(self.separate, self.read, self.write)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """The estimated time and cost of a run."""

    tracks: int
    sound_hours: float
    unknown_durations: int
    """Tracks without a duration in the manifest; assumed to be average."""

    workers: int
    hours: float
    """From the start of the first worker to the end of the last track, without crashes."""

    hours_at_worst: float
    """`hours` if the longest track starts last."""

    cost: float
    """Price of all workers until the end."""

    gigabytes: float
    """Read and written in total."""

    bottleneck: str
    """What limits the run: the network, storage, the longest track, ..."""

    worker: str
    """Name of the benchmark."""

    times_real_time: float
    """Speed of a worker that never waits."""

    def to_text(self) -> str:
        """Return the estimate as lines of text."""
        unknown = f" ({self.unknown_durations} of unknown length)" if self.unknown_durations else ""
        lines = [
            f"{self.tracks} tracks{unknown}, {self.sound_hours:.1f} h of sound, "
            f"{self.gigabytes:.1f} GB in and out",
            f"{self.workers} workers: {self.hours:.2f} h, {self.hours_at_worst:.2f} h at worst",
        ]
        if self.cost:
            lines.append(f"cost: {self.cost:.2f}")
        lines.append(f"a worker: {self.times_real_time:.2f} x real time ({self.worker})")
        return "\n".join([*lines, f"bottleneck: {self.bottleneck}"])


def plan(
    rows: Iterable[TrackRow], benchmark: Benchmark, workers: int, price: float = 0.0
) -> RunEstimate:
    """Estimate a run on `workers` like the benchmark, each at `price` per hour.

    Raises:
        ValueError: if there are no rows, or none has a duration.
    """
    tracks = unknown = 0
    sound = longest = 0.0
    for row in rows:
        tracks += 1
        unknown += row.duration is None
        sound += row.duration or 0.0
        longest = max(longest, row.duration or 0.0)
    if not tracks:
        raise ValueError("nothing to plan: the manifest, or this shard of it, is empty")
    if unknown == tracks:
        raise ValueError("planning needs the column `duration` (seconds) in the manifest")
    sound *= tracks / (tracks - unknown)
    num_bytes = sound * (benchmark.bytes_in + benchmark.bytes_out)
    per_second = benchmark.seconds_per_second
    stages = {
        "the network": benchmark.separate,
        "reading": benchmark.read,
        "writing": benchmark.write,
    }
    # Lower bounds of the run time: each holds whatever the others are.
    bounds = {
        max(stages, key=lambda name: stages[name]): sound * per_second / workers,
        "the fixed time per track": tracks * benchmark.track_seconds / workers,
    }
    work = sum(bounds.values())
    storage = num_bytes / (benchmark.storage_bytes_per_second or float("inf"))
    longest_track = benchmark.track_seconds + longest * per_second
    busy = max(work, longest_track, storage)
    if busy == longest_track > work:
        bounds = {"the longest track": longest_track}
    elif busy == storage > work:
        bounds = {"storage": storage}
    bounds["starting workers"] = benchmark.start_seconds
    hours = (benchmark.start_seconds + busy) / 3600
    # List scheduling: no worker is idle before the last track starts.
    worst = (benchmark.start_seconds + max(work, storage) + longest_track) / 3600
    return RunEstimate(
        tracks=tracks,
        sound_hours=sound / 3600,
        unknown_durations=unknown,
        workers=workers,
        hours=hours,
        hours_at_worst=max(hours, worst),
        cost=hours * workers * price,
        gigabytes=num_bytes / 1e9,
        bottleneck=max(bounds, key=lambda name: bounds[name]),
        worker=benchmark.name or "unnamed",
        times_real_time=1 / per_second,
    )
