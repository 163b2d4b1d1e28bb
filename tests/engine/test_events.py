"""Events are immutable values with a fixed representation, also in JSON."""

import dataclasses
from typing import Any

import pytest

from demucs_infer.events import (
    BatchSizeReduced,
    ChunkProcessed,
    ChunkStarted,
    Position,
    Stage,
    WarningEvent,
    call_back,
    event_to_json,
)


def test_event_repr() -> None:
    assert repr(Stage.Started("normalize")) == (
        "Stage.Started(stage='normalize', total_batches=None)"
    )
    assert repr(Stage.Completed("normalize")) == "Stage.Completed(stage='normalize')"
    event = ChunkProcessed(1, 9, (Position(0, 0, 0),), fraction=0.5, seconds_total=3.0)
    assert repr(event) == "ChunkProcessed(batch_index=1, total_batches=9)"
    assert repr(ChunkProcessed(1, 9)) == repr(event)
    assert event.seconds_done == 1.5
    assert repr(BatchSizeReduced(8, 4, "why")) == "BatchSizeReduced(old=8, new=4, reason='why')"


@pytest.mark.parametrize(
    "event",
    [
        Stage.Started("stitch"),
        Stage.Completed("stitch"),
        ChunkStarted(1, 2, (Position(0, 1, 2),)),
        ChunkProcessed(1, 2, (Position(0, 1, 2),)),
        BatchSizeReduced(8, 4, "why"),
        WarningEvent("something"),
    ],
)
def test_events_are_frozen_hashable_values(event: object) -> None:
    name = dataclasses.fields(event)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, name, "other")
    copied = dataclasses.replace(event)  # type: ignore[type-var]
    assert copied == event
    assert hash(copied) == hash(event)
    assert copied is not event


def test_callback_gets_its_own_dictionary_per_window_and_state() -> None:
    positions = (Position(1, 2, 30), Position(1, 2, 40))
    stream = [Stage.Started("x"), ChunkStarted(1, 1, positions), ChunkProcessed(1, 1, positions)]
    seen: list[dict[str, object]] = []

    def callback(state: dict[str, object]) -> None:
        seen.append(dict(state))
        state.clear()

    extra = {"audio_length": 99, "mine": "yes"}
    assert list(call_back(stream, callback, models=4, extra=extra)) == stream
    assert extra == {"audio_length": 99, "mine": "yes"}
    assert [(s["segment_offset"], s["state"]) for s in seen] == [
        (30, "start"),
        (40, "start"),
        (30, "end"),
        (40, "end"),
    ]
    assert seen[0] == {
        "audio_length": 99,
        "mine": "yes",
        "model_idx_in_bag": 1,
        "shift_idx": 2,
        "segment_offset": 30,
        "models": 4,
        "state": "start",
    }


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            Stage.Started("stitch"),
            {"event": "Stage.Started", "stage": "stitch", "total_batches": None},
        ),
        (Stage.Completed("stitch"), {"event": "Stage.Completed", "stage": "stitch"}),
        (
            ChunkProcessed(1, 4, (Position(0, 1, 2),), fraction=0.25, seconds_total=8.0),
            {
                "event": "ChunkProcessed",
                "batch_index": 1,
                "total_batches": 4,
                "fraction": 0.25,
                "seconds_total": 8.0,
                "seconds_done": 2.0,
            },
        ),
        (
            BatchSizeReduced(8, 4, "why"),
            {"event": "BatchSizeReduced", "old": 8, "new": 4, "reason": "why"},
        ),
        (WarningEvent("text"), {"event": "WarningEvent", "message": "text"}),
    ],
    ids=lambda value: type(value).__qualname__ if dataclasses.is_dataclass(value) else "json",
)
def test_event_to_json_has_fields_in_order(event: Any, expected: dict[str, object]) -> None:
    assert list(event_to_json(event).items()) == list(expected.items())
