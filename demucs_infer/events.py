"""Define the events of a separation, which the library, the command line and the server share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar


class Stage:
    """The two events around a named step of the work."""

    @dataclass(frozen=True, slots=True)
    class Started:
        """Sent when `stage` begins."""

        stage: str
        total_batches: int | None = None

    @dataclass(frozen=True, slots=True)
    class Completed:
        """Sent when `stage` ends."""

        stage: str


@dataclass(frozen=True, slots=True)
class Position:
    """The network, time shift and offset of a window, as reported to upstream's callback."""

    member: int
    """Index of the network in its bag."""
    shift: int
    """Index of the time shift."""
    offset: int
    """First sample of the chunk, counted from the first chunk of its pass."""


@dataclass(frozen=True, slots=True)
class ChunkStarted:
    """Sent before a batch runs, if requested with `announce=True`."""

    batch_index: int
    total_batches: int
    positions: tuple[Position, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class ChunkProcessed:
    """Sent after a batch; `batch_index` counts from 1, over all networks and time shifts."""

    batch_index: int
    total_batches: int
    positions: tuple[Position, ...] = field(default=(), repr=False)
    """Windows of this batch."""
    fraction: float = field(default=0.0, repr=False)
    """Share of the track's work that is done: never falls, ends at exactly 1."""
    seconds_total: float = field(default=0.0, repr=False)
    """Duration of the track in seconds."""

    @property
    def seconds_done(self) -> float:
        """`fraction` in seconds of the track."""
        return self.fraction * self.seconds_total


@dataclass(frozen=True, slots=True)
class BatchSizeReduced:
    """Sent when memory ran out: from now on, batches of this network are smaller."""

    old: int
    new: int
    reason: str


@dataclass(frozen=True, slots=True)
class WarningEvent:
    """A problem that did not stop the work."""

    message: str


@dataclass(frozen=True, slots=True)
class DeviceChosen:
    """Sent before the first window where the device was left to "auto".

    Once per separator, or for each track where a network belongs to the caller.
    """

    device: str
    reason: str
    has_unused_gpu: bool = False
    """Whether there is a GPU that does not work with this installation."""


Event = (
    Stage.Started
    | Stage.Completed
    | ChunkStarted
    | ChunkProcessed
    | BatchSizeReduced
    | WarningEvent
    | DeviceChosen
)

StreamItem = TypeVar("StreamItem")


@dataclass(frozen=True, slots=True, eq=False)
class TrackFailed:
    """Last event of a track that could not be read or separated; other tracks go on."""

    error: Exception


@dataclass(frozen=True, slots=True, eq=False)
class TrackFinished:
    """Last event of a track that was separated."""


def event_to_json(event: Event) -> dict[str, object]:
    """Convert an event to JSON, for the server and (with a `track`) for `--progress json`.

    The first key, `event`, is the name of the class. Positions are left out: they are for
    upstream's callback, and there may be thousands.
    """
    values = {field.name: getattr(event, field.name) for field in fields(event)}
    values.pop("positions", None)
    if isinstance(event, ChunkProcessed):
        values["seconds_done"] = event.seconds_done
    return {"event": type(event).__qualname__, **values}


def call_back(
    stream: Iterable[StreamItem],
    callback: Callable[[dict[str, object]], object],
    *,
    models: int = 1,
    extra: Mapping[str, object] | None = None,
) -> Iterator[StreamItem]:
    """Yield the items of `stream`, and report its windows to `callback` as upstream does.

    `callback` is called with `state="start"` before a window runs and with `state="end"` after
    it, so the stream must include `ChunkStarted` events. An exception in `callback` ends the work.
    Each call gets its own dictionary, which `callback` may change.
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
