"""How long a catalogue will take on given machines, what it will cost, and what decides that."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from demucs_infer.distributed.manifest import TrackRow

_MOST = 1e15  # of anything: what is more is a mistake, and would be infinite in a sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What was measured on one worker; a worker reads, separates and writes side by side."""

    name: str = ""
    separate: float
    """Seconds of the network for a second of sound."""

    read: float = 0.0
    """Seconds of decoding, both times, for a second of sound."""

    write: float = 0.0
    """Seconds of encoding all stems for a second of sound."""

    track_seconds: float = 0.0
    """What every track takes besides, however short."""

    start_seconds: float = 0.0
    """From nothing to a worker with its model loaded."""

    bytes_in: float = 0.0
    """Of the input, for a second of sound."""

    bytes_out: float = 0.0
    """Of all stems, for a second of sound."""

    storage_bytes_per_second: float | None = None
    """What the storage gives and takes for all workers together; None for more than enough."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name = {self.name!r} of a benchmark is no text")
        may_lack = {"storage_bytes_per_second"}
        for name in {one.name for one in fields(self)} - {"name"}:
            value = getattr(self, name)
            if value is None and name in may_lack:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and 0 <= value <= _MOST):
                raise ValueError(f"{name} = {value!r} of a benchmark is no number from 0 on")
        if not self.seconds_per_second or self.storage_bytes_per_second == 0:
            raise ValueError("a benchmark in which nothing takes time, or for ever, plans nothing")

    @classmethod
    def read_file(cls, path: Path) -> "Benchmark":
        """The row in a JSON file."""
        known = {one.name for one in fields(cls)}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        if not isinstance(found, dict) or "separate" not in found or set(found) - known:
            raise ValueError(
                f"{path} must be a JSON object with `separate`, and of the rest only "
                f"{', '.join(sorted(known - {'separate'}))}"
            )
        return cls(**{"name": f"as {path.name} says", **found})

    @property
    def seconds_per_second(self) -> float:
        """Of a worker that is never kept waiting: its slowest part."""
        return max(self.separate, self.read, self.write)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """What a run will come to."""

    tracks: int
    sound_hours: float
    unknown: int
    """Tracks whose length the manifest does not tell; taken for average ones."""

    workers: int
    hours: float
    """From the first worker's start to the last track's end, if all goes well."""

    hours_at_worst: float
    """The same if the longest track happens to be begun last."""

    cost: float
    """Of all workers until the end, at the price of an hour that was given."""

    gigabytes: float
    """That are read and written."""

    dominates: str
    """What decides the hours: only doing something about this makes the run shorter."""

    worker: str
    """Where it is known from what a worker takes."""

    times_real_time: float
    """How fast a worker is while it is not kept waiting."""

    def row(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        unknown = f" ({self.unknown} of unknown length)" if self.unknown else ""
        lines = [
            f"{self.tracks} tracks{unknown}, {self.sound_hours:.1f} h of sound, "
            f"{self.gigabytes:.1f} GB in and out",
            f"{self.workers} workers: {self.hours:.2f} h, {self.hours_at_worst:.2f} h at worst",
        ]
        if self.cost:
            lines.append(f"cost: {self.cost:.2f}")
        lines.append(f"a worker: {self.times_real_time:.2f} x real time ({self.worker})")
        return "\n".join([*lines, f"what dominates: {self.dominates}"]) + "\n"


def plan(
    rows: Iterable[TrackRow], bench: Benchmark, workers: int, price: float = 0.0
) -> RunEstimate:
    """A plan for `workers` of the kind that was measured, each at `price` an hour."""
    tracks = known = 0
    sound = longest = 0.0
    for row in rows:
        tracks += 1
        if row.duration is not None:
            known += 1
            sound += row.duration
            longest = max(longest, row.duration)
    if not tracks:
        raise ValueError("there is nothing to plan: the manifest, or this shard of it, is empty")
    if not known:
        raise ValueError("a plan needs the column `duration` in the manifest: seconds of a track")
    sound *= tracks / known
    num_bytes = sound * (bench.bytes_in + bench.bytes_out)
    per_second = bench.seconds_per_second
    stages = {"the network": bench.separate, "reading": bench.read, "writing": bench.write}
    slowest = max(stages, key=lambda name: stages[name])
    longest_seconds = bench.track_seconds + longest * per_second
    # Each of these takes that long, whatever the others do.
    bounds = {
        slowest: sound * per_second / workers,
        "what every track takes besides": tracks * bench.track_seconds / workers,
    }
    work = sum(bounds.values())
    storage = num_bytes / (bench.storage_bytes_per_second or float("inf"))
    busy = max(work, longest_seconds, storage)
    if busy == longest_seconds > work:
        bounds = {"the longest track": longest_seconds}
    elif busy == storage > work:
        bounds = {"storage": storage}
    bounds["starting workers"] = bench.start_seconds
    hours = (bench.start_seconds + busy) / 3600
    # List scheduling: nobody idles before the last track begins.
    worst = (bench.start_seconds + max(work, storage) + longest_seconds) / 3600
    return RunEstimate(
        tracks=tracks,
        sound_hours=sound / 3600,
        unknown=tracks - known,
        workers=workers,
        hours=hours,
        hours_at_worst=max(hours, worst),
        cost=hours * workers * price,
        gigabytes=num_bytes / 1e9,
        dominates=max(bounds, key=lambda name: bounds[name]),
        worker=bench.name or "unnamed",
        times_real_time=1 / per_second,
    )
