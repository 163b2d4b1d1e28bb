"""Events are values, their words are fixed, and progress never runs backwards."""

import dataclasses

import pytest

from demucs_infer.events import (
    BatchSizeReduced,
    ChunkProcessed,
    ChunkStarted,
    Position,
    Progress,
    Stage,
    WarningEvent,
    call_back,
)


def test_the_words_of_an_event() -> None:
    assert repr(Stage.Started("normalize")) == (
        "Stage.Started(stage='normalize', total_batches=None)"
    )
    assert repr(Stage.Completed("normalize")) == "Stage.Completed(stage='normalize')"
    rich = ChunkProcessed(1, 9, (Position(0, 0, 0),), fraction=0.5, seconds_total=3.0)
    assert repr(rich) == "ChunkProcessed(batch_index=1, total_batches=9)"
    assert repr(ChunkProcessed(1, 9)) == repr(rich)
    assert rich.seconds_done == 1.5
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


def test_progress_over_tracks_never_falls_and_ends_at_exactly_one() -> None:
    progress = Progress(7)  # sevenths do not add up to 1 in floating point
    seen = [progress.fraction]
    for track in (3, 0, 1, 2, 4, 5):
        for step in (0.3, 0.2, 1.0):
            seen.append(progress.update(track, ChunkProcessed(1, 1, fraction=step)))
        seen.append(progress.update(track, Stage.Started("stitch")))
    assert seen[-1] < 1
    seen.append(progress.finish(6))  # given up: it is done all the same
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="num_tracks"):
        Progress(0)


def test_a_callback_gets_one_dictionary_of_its_own_per_window_and_state() -> None:
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
