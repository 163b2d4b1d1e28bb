"""What the engine says while it works: frozen values, one stream for every listener."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar


class Stage:
    """A named step of the work begins, or is over."""

    @dataclass(frozen=True, slots=True)
    class Started:
        """`stage` begins."""

        stage: str
        total_batches: int | None = None

    @dataclass(frozen=True, slots=True)
    class Completed:
        """`stage` is over."""

        stage: str


@dataclass(frozen=True, slots=True)
class Position:
    """Which window of which pass: what upstream's callback reports."""

    member: int
    """Index of the network in its bag."""
    shift: int
    """Index of the time shift."""
    offset: int
    """First sample of the chunk, counted from where the grid of this pass begins."""


@dataclass(frozen=True, slots=True)
class ChunkStarted:
    """A batch is about to run; sent only to those who ask for it (`announce=True`)."""

    batch_index: int
    total_batches: int
    positions: tuple[Position, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class ChunkProcessed:
    """A planned batch is done; `batch_index` counts from 1, over all members and shifts."""

    batch_index: int
    total_batches: int
    positions: tuple[Position, ...] = field(default=(), repr=False)
    """The windows of this batch."""
    fraction: float = field(default=0.0, repr=False)
    """How much of this track's work is done: never falls, ends at exactly 1."""
    seconds_total: float = field(default=0.0, repr=False)
    """How long the track is."""

    @property
    def seconds_done(self) -> float:
        """The same fraction, as seconds of the track."""
        return self.fraction * self.seconds_total


@dataclass(frozen=True, slots=True)
class BatchSizeReduced:
    """Memory ran out: from here on, batches of the network at hand are smaller."""

    old: int
    new: int
    reason: str


@dataclass(frozen=True, slots=True)
class WarningEvent:
    """Something the listener should know, and that did not stop the work."""

    message: str


Event = (
    Stage.Started
    | Stage.Completed
    | ChunkStarted
    | ChunkProcessed
    | BatchSizeReduced
    | WarningEvent
)

TrackEvent = TypeVar("TrackEvent")


def call_back(
    stream: Iterable[TrackEvent],
    callback: Callable[[dict[str, object]], object],
    *,
    models: int = 1,
    extra: Mapping[str, object] | None = None,
) -> Iterator[TrackEvent]:
    """The same stream, reported on its way to upstream's kind of callback.

    One call with `state="start"` before a window runs and one with `state="end"` after it,
    so the stream must announce its batches. What `callback` raises ends the work; whatever
    it does to the dictionary it was given stays its own.
    """
    states = {ChunkStarted: "start", ChunkProcessed: "end"}
    for item in stream:
        if isinstance(item, ChunkStarted | ChunkProcessed):
            for position in item.positions:
                callback(
                    {
                        **(extra or {}),
                        "model_idx_in_bag": position.member,
                        "shift_idx": position.shift,
                        "segment_offset": position.offset,
                        "models": models,
                        "state": states[type(item)],
                    }
                )
        yield item


class Progress:
    """One fraction for many tracks: never falls, and is 1 when all of them are done."""

    def __init__(self, num_tracks: int) -> None:
        if num_tracks < 1:
            raise ValueError(f"{num_tracks = } must be at least 1")
        self._done = [0.0] * num_tracks

    @property
    def fraction(self) -> float:
        """The share of all the work that is done."""
        if all(done == 1.0 for done in self._done):
            return 1.0  # a sum of fractions could fall short of it by a rounding
        return sum(self._done) / len(self._done)

    def update(self, track: int, item: object) -> float:
        """Count what `item` says about track number `track`; what says nothing is free."""
        if isinstance(item, ChunkProcessed):
            self._done[track] = max(self._done[track], item.fraction)
        return self.fraction

    def finish(self, track: int) -> float:
        """Count a track as done, whether it was separated, skipped or given up."""
        self._done[track] = 1.0
        return self.fraction
