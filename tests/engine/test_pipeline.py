"""The pipeline yields final blocks in order, independent of reading, batching and sharing."""

import dataclasses
import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.demucs import Demucs
from demucs_infer.engine import run_config
from demucs_infer.engine.pipeline import (
    Block,
    TensorTrack,
    separate,
    separate_many,
)
from demucs_infer.engine.plan import Chunk, plan_chunks
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.stems import choose_stems
from demucs_infer.errors import AudioReadError, SeparationError
from demucs_infer.events import ChunkProcessed, ChunkStarted, Stage, TrackFailed, TrackFinished
from demucs_infer.options import SeparationOptions
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, OomModel, RecordingModel, ScaleModel, randomize

RATE = 8000
IDENTITY = {"sources": ["mix"], "gains": [1.0]}


class BlockTrack:
    """A track without a length, in blocks of given sizes, that counts how often it is read."""

    def __init__(self, samples: Tensor, *sizes: int) -> None:
        self.samples = samples
        self.sizes = sizes
        self.channels = samples.shape[-2]
        self.reads = 0

    def blocks(self) -> Iterator[Tensor]:
        self.reads += 1
        at = 0
        while at < self.samples.shape[-1]:
            for size in self.sizes:
                yield self.samples[..., at : at + size]
                at += size


def join_blocks(items: Any) -> Tensor:
    """Join the stems, and check that each block begins where the last one ended."""
    parts, at = [], 0
    for item in items:
        if isinstance(item, Block):
            assert item.start == at
            assert item.stems.shape[-1] > 0
            at += item.stems.shape[-1]
            parts.append(item.stems)
    return torch.cat(parts, dim=-1)


def digest(samples: Tensor) -> str:
    return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()


def tiny(seed: int = 0) -> Demucs:
    network = Demucs(**TINY["Demucs"])
    randomize(network, seed)
    return network


@pytest.mark.parametrize("profile", ["demucs", "padded"])
@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("length", [1, 2, 999, 1000, 1001, 3007])
def test_identity_network_returns_the_track(profile: Any, overlap: float, length: int) -> None:
    track = make_noise(2, length)
    network = ScaleModel(**IDENTITY, segment=1000 / RATE)
    shapes = [("triangle", "constant")]
    if profile == "padded":
        shapes += [("hann", "reflect"), ("linear_fade", "replicate"), ("hamming", "constant")]
    for window, padding in shapes:
        for shifts in (0, 2):
            options = SeparationOptions(
                shifts=shifts,
                overlap=overlap,
                profile=profile,
                window=window,
                padding=padding,
                normalize=False,
                batch_size=7,
            )
            stems = join_blocks(separate(TensorTrack(track), network, options=options))
            # Weights are divided out again: a sum of products over the sum of the weights.
            torch.testing.assert_close(stems[0], track, rtol=0, atol=1e-6)


def test_huge_segment_is_one_window_of_the_track() -> None:
    track = TensorTrack(make_noise(2, 5000))
    options = SeparationOptions(segment=1e9, shifts=0)
    stems = join_blocks(separate(track, tiny(), options=options))
    # The weights of the only window are divided out again.
    whole = join_blocks(separate(track, tiny(), options=SeparationOptions(split=False, shifts=0)))
    torch.testing.assert_close(stems, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_level_is_removed_and_restored(normalize: bool) -> None:
    track = 0.3 + make_noise(2, 20_000)
    network = ScaleModel(["half"], [0.5])
    stems = join_blocks(
        separate(TensorTrack(track), network, options=SeparationOptions(normalize=normalize))
    )
    # Upstream gives the mean to every stem whole, whatever share of the track it is.
    mean = float(track.mean()) if normalize else 0.0
    torch.testing.assert_close(stems[0], 0.5 * (track - mean) + mean, rtol=0, atol=1e-6)


def drop_first_sample(chunks: list[Chunk]) -> None:
    chunks[0] = dataclasses.replace(chunks[0], start=chunks[0].start + 1)


def drop_last_sample(chunks: list[Chunk]) -> None:
    chunks[-1] = dataclasses.replace(chunks[-1], stop=chunks[-1].stop - 1)


def leave_a_gap(chunks: list[Chunk]) -> None:
    chunks[2] = dataclasses.replace(chunks[2], start=chunks[2].start + 1)


def shift_owned_range(chunks: list[Chunk]) -> None:
    # An invalid chunk of its window: it would own the output for the sample before it.
    object.__setattr__(chunks[2], "read", chunks[2].read - 1)


@pytest.mark.parametrize(
    "wrong", [drop_first_sample, drop_last_sample, leave_a_gap, shift_owned_range]
)
def test_plan_off_by_one_sample_breaks_identity(
    wrong: Callable[[list[Chunk]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity test is only worth something if errors of one sample fail it."""
    track = TensorTrack(make_noise(2, 5000))
    network = ScaleModel(**IDENTITY, segment=1000 / RATE)
    options = SeparationOptions(shifts=0, overlap=0, normalize=False)

    def wrong_plan(*args: Any, **kwargs: Any) -> tuple[Chunk, ...]:
        chunks = list(plan_chunks(*args, **kwargs))
        wrong(chunks)
        return tuple(chunks)

    monkeypatch.setattr(run_config, "plan_chunks", wrong_plan)
    try:
        stems = join_blocks(separate(track, network, options=options))
    except (ValueError, RuntimeError, SeparationError, AssertionError):
        return  # detected before samples are compared
    assert stems.shape[-1] != 5000 or not torch.allclose(stems[0], track.samples, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 4000),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    segment=st.integers(40, 1500),
    overlap=st.sampled_from([0.0, 0.25, 0.49]),
    shifts=st.integers(0, 3),
    batch_size=st.integers(1, 9),
    workers=st.sampled_from([0, 0, 2]),
)
def test_block_sizes_batches_and_workers_do_not_change_bits(
    length: int,
    sizes: list[int],
    segment: int,
    overlap: float,
    shifts: int,
    batch_size: int,
    workers: int,
) -> None:
    track = 0.1 + make_noise(2, length)
    network = BagOfModels(
        [ScaleModel(segment=segment / RATE), ScaleModel(gains=[0.5, 2.0], segment=900 / RATE)],
        [[1.0, 0.3], [0.7, 1.0]],
    )
    plain = SeparationOptions(shifts=shifts, overlap=overlap)
    fancy = SeparationOptions(shifts=shifts, overlap=overlap, batch_size=batch_size, jobs=workers)
    expected = join_blocks(separate(TensorTrack(track), network, options=plain))
    stream = BlockTrack(track, *sizes)
    assert torch.equal(join_blocks(separate(stream, network, options=fancy)), expected)
    assert stream.reads == 2
    assert expected.shape == (2, 2, length)


def event_names(items: Any) -> list[str]:
    return [
        f"{item.stage} {type(item).__name__}"
        if isinstance(item, Stage.Started | Stage.Completed)
        else type(item).__name__
        for item in items
        if not isinstance(item, Block)
    ]


def stage_names(*stages: str) -> list[str]:
    return [f"{stage} {event}" for stage in stages for event in ("Started", "Completed")]


def test_order_of_events() -> None:
    track, network = TensorTrack(make_noise(2, 20_000)), ScaleModel()
    options = SeparationOptions(shifts=0)
    chunks = ["ChunkProcessed"] * 4
    end = stage_names("stitch", "collect_outputs")
    items = list(separate(track, network, options=options))
    assert event_names(items) == stage_names("normalize") + chunks + end
    ruled = choose_stems(network.sources, derive=["rest=mixture-bass"])
    items = list(separate(track, network, options=options, stems=ruled))
    assert event_names(items) == stage_names("normalize") + chunks + end + stage_names(
        "derive_stems"
    )
    items = list(separate(track, network, options=SeparationOptions(shifts=0, normalize=False)))
    assert event_names(items) == chunks + end
    mono = ScaleModel(audio_channels=1)
    items = list(separate(track, mono, options=options))
    assert event_names(items) == stage_names("normalize", "downmix_to_mono") + chunks + end
    items = list(separate(track, network, options=options, announce=True))
    assert event_names(items)[2:10] == ["ChunkStarted", "ChunkProcessed"] * 4


def test_channels_are_converted_to_those_of_the_network() -> None:
    track = make_noise(2, 9000)
    stems = join_blocks(separate(TensorTrack(track), ScaleModel(**IDENTITY, audio_channels=1)))
    assert stems.shape == (1, 1, 9000)
    torch.testing.assert_close(stems[0], track.mean(0, keepdim=True), rtol=0, atol=1e-6)
    stems = join_blocks(separate(TensorTrack(track[:1]), ScaleModel(**IDENTITY)))
    assert torch.equal(stems[0, 0], stems[0, 1])
    torch.testing.assert_close(stems[0, :1], track[:1], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="has 3 channels, but the networks need 2"):
        list(separate(TensorTrack(make_noise(3, 100)), ScaleModel()))


@pytest.mark.parametrize("shifts", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("members", [1, 3])
def test_total_is_constant_and_fraction_ends_at_one(
    shifts: int, batch_size: int, members: int
) -> None:
    length, network = 30_000, BagOfModels([RecordingModel() for _ in range(members)])
    options = SeparationOptions(shifts=shifts, batch_size=batch_size, seed=3)
    items = list(separate(TensorTrack(make_noise(2, length)), network, options=options))
    events = [item for item in items if isinstance(item, ChunkProcessed)]
    total = events[0].total_batches
    assert [event.batch_index for event in events] == list(range(1, total + 1))
    assert {event.total_batches for event in events} == {total}
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert events[-1].seconds_done == length / RATE
    forwards = sum(len(model.seen) for model in network.models)
    windows = sum(shape[0] for model in network.models for shape in model.seen)
    assert forwards == total
    positions = [position for event in events for position in event.positions]
    assert len(positions) == len(set(positions)) == windows
    if not shifts:
        assert windows == members * -(-length // 6000)
    if batch_size == 1:
        assert total == windows


def one_hot_bag() -> BagOfModels:
    """Create a bag of four networks with one stem each, like htdemucs_ft."""
    stems = ["drums", "bass", "other", "vocals"]
    members = [RecordingModel(stems, [1.0, 2.0, 3.0, 4.0 + seed]) for seed in range(4)]
    return BagOfModels(members, [[float(i == j) for j in range(4)] for i in range(4)])


@pytest.mark.parametrize("stem", ["drums", "vocals"])
@pytest.mark.parametrize("shifts", [1, 2])
def test_one_stem_of_a_one_hot_bag_runs_one_member(stem: str, shifts: int) -> None:
    track, options = TensorTrack(make_noise(2, 50_000)), SeparationOptions(shifts=shifts, seed=9)
    bag = one_hot_bag()
    everything = join_blocks(separate(track, bag, options=options))
    forwards = [len(model.seen) for model in bag.models]
    alone = one_hot_bag()
    plan = choose_stems(alone.sources, stems=[stem])
    only = join_blocks(separate(track, alone, options=options, stems=plan))
    at = bag.sources.index(stem)
    assert [len(model.seen) for model in alone.models] == [
        count if i == at else 0 for i, count in enumerate(forwards)
    ]
    assert torch.equal(only[0], everything[at])
    # The complement by subtraction needs no other network either.
    minus = choose_stems(alone.sources, two_stems=stem, other_method="minus")
    both = join_blocks(separate(track, alone, options=options, stems=minus))
    assert sum(len(model.seen) for model in alone.models) == 2 * forwards[at]
    assert torch.equal(both[0], only[0])
    torch.testing.assert_close(both[1], track.samples - only[0], rtol=0, atol=0)


def test_one_stem_of_a_bag_is_bit_identical() -> None:
    bag = BagOfModels([tiny(0), tiny(1)], [[1, 0, 0.5, 1], [0, 1, 0.5, 1]])
    track, options = TensorTrack(make_noise(2, 20_000)), SeparationOptions(shifts=2)
    everything = join_blocks(separate(track, bag, options=options))
    for at, stem in enumerate(bag.sources):
        plan = choose_stems(bag.sources, stems=[stem])
        only = join_blocks(separate(track, bag, options=options, stems=plan))
        assert torch.equal(only[0], everything[at])


def test_rules_are_applied_to_final_samples() -> None:
    track, network = TensorTrack(0.2 + make_noise(2, 20_000)), ScaleModel()
    rules = ["rest=mixture-bass", "both=drums+bass", "twice=2*rest"]
    plan = choose_stems(network.sources, derive=rules)
    stems = dict(zip(plan.outputs, join_blocks(separate(track, network, stems=plan))))
    assert torch.equal(stems["rest"], track.samples - stems["bass"])
    assert torch.equal(stems["both"], stems["drums"] + stems["bass"])
    assert torch.equal(stems["twice"], 2 * stems["rest"])
    with pytest.raises(ValueError, match="chosen from a, but the model has drums, bass"):
        list(separate(track, network, stems=choose_stems(["a"])))


@pytest.mark.usefixtures("one_thread")
def test_closing_stops_within_a_batch_and_restores_the_network() -> None:
    network = RecordingModel()
    network.train()
    threads = threading.active_count()
    for workers in (0, 2):
        network.seen.clear()
        stream = separate(
            TensorTrack(make_noise(2, 200_000)), network, options=SeparationOptions(jobs=workers)
        )
        for item in stream:
            if isinstance(item, ChunkProcessed):
                break
        stream.close()
        assert len(network.seen) <= 1 + workers
        assert network.training
        assert threading.active_count() == threads
        assert not torch.is_inference_mode_enabled()
    stream = separate(TensorTrack(make_noise(2, 200_000)), network)
    next(stream)
    assert not network.training
    del stream  # garbage collected, not closed
    gc.collect()
    assert network.training


def test_error_restores_the_network() -> None:
    network = OomModel(limit=0)
    network.train()
    with pytest.raises(torch.OutOfMemoryError):
        list(separate(TensorTrack(make_noise(2, 9000)), network, options=SeparationOptions(jobs=2)))
    assert network.training


def test_stems_can_be_used_in_autograd() -> None:
    for item in separate(TensorTrack(make_noise(2, 9000)), ScaleModel()):
        if isinstance(item, Block):
            scale = torch.ones((), requires_grad=True)
            (item.stems * scale).sum().backward()
            assert scale.grad is not None


def test_input_tensor_is_not_modified() -> None:
    track = make_noise(1, 9000).expand(2, 9000)  # writing to this would raise
    before = track.clone()
    plan = choose_stems(["drums", "bass"], derive=["all=mixture"])
    stems = join_blocks(separate(TensorTrack(track), ScaleModel(), stems=plan))
    stems += 1
    assert torch.equal(track, before)


def test_bytes_do_not_depend_on_order_or_jobs() -> None:
    bag = BagOfModels([tiny(0), tiny(1)])
    tracks = [TensorTrack(make_noise(2, 9000 + 1000 * seed, seed)) for seed in range(4)]

    def run(order: list[int], **options: Any) -> dict[int, str]:
        runner = Runner()
        return {
            i: digest(
                join_blocks(
                    separate(tracks[i], bag, options=SeparationOptions(**options), runner=runner)
                )
            )
            for i in order
        }

    first = run([0, 1, 2, 3])
    assert run([3, 1, 0, 2]) == first
    assert run([0, 1, 2, 3], jobs=1) == first
    assert run([0, 1, 2, 3], jobs=3) == first
    assert run([0, 1, 2, 3], seed=1) != first


def test_threads_share_a_model_and_a_runner() -> None:
    bag, runner = BagOfModels([tiny(0), tiny(1)]), Runner()
    bag.train()
    tracks = [TensorTrack(make_noise(2, 4000 + 701 * seed, seed)) for seed in range(16)]

    def run(track: TensorTrack) -> str:
        return digest(
            join_blocks(
                separate(track, bag, runner=runner, options=SeparationOptions(batch_size=2))
            )
        )

    serial = [run(track) for track in tracks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, tracks)) == serial
    assert bag.training


def collect_many(items: Any, count: int) -> list[Tensor]:
    per_track: list[list[Any]] = [[] for _ in range(count)]
    for index, item in items:
        per_track[index].append(item)
    return [join_blocks(items) for items in per_track]


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_short_tracks_share_batches(members: int, batch_size: int) -> None:
    models = [RecordingModel(gains=[1.0, seed + 1.0]) for seed in range(members)]
    for model in models:
        model.valid_length = lambda length: 8000  # type: ignore[assignment]
    bag = BagOfModels(models)
    tracks = [TensorTrack(make_noise(2, 3000 + 2000 * (i % 4), i)) for i in range(10)]
    options = SeparationOptions(shifts=0, batch_size=batch_size)
    got = collect_many(separate_many(tracks, bag, options=options), len(tracks))
    windows = sum(-(-track.length // 6000) for track in tracks)
    for model in models:
        assert sum(shape[0] for shape in model.seen) == windows
        if members == 1 and batch_size > 1:
            # Fewer forwards than one for each track, though a track of two windows that finds
            # a single place left in a batch begins another.
            assert len(model.seen) <= -(-windows // (batch_size - 1))
            assert len(model.seen) < len(tracks)
    for track, stems in zip(tracks, got):
        assert torch.equal(stems, join_blocks(separate(track, bag, options=options)))


def test_tracks_run_one_after_another_if_none_may_be_shared() -> None:
    tracks = [TensorTrack(make_noise(2, 3000, i)) for i in range(3)]
    order = [index for index, _ in separate_many(tracks, ScaleModel(), max_tracks_per_batch=1)]
    assert order == sorted(order)


@pytest.mark.parametrize("workers", [0, 2])
def test_failure_on_one_track_does_not_affect_others_in_its_batch(workers: int) -> None:
    class FailsOnLoud(RecordingModel):
        def forward(self, mix: Tensor) -> Tensor:
            answer = super().forward(mix)
            if mix.abs().max() > 50:
                raise RuntimeError("too loud")
            return answer

    tracks = [TensorTrack(make_noise(2, 6000, i)) for i in range(5)]
    tracks[2].samples[0, 100] = 1e9  # a peak that no level takes away
    model = FailsOnLoud()
    model.valid_length = lambda length: 8000  # type: ignore[assignment]
    options = SeparationOptions(shifts=0, batch_size=16, jobs=workers)
    items: list[list[Any]] = [[] for _ in tracks]
    for index, item in separate_many(tracks, model, options=options):
        items[index].append(item)
    assert [shape[0] for shape in model.seen] == [5, 1, 1, 1, 1, 1]
    assert isinstance(items[2][-1], TrackFailed) and "too loud" in str(items[2][-1].error)
    for index in (0, 1, 3, 4):
        assert isinstance(items[index][-1], TrackFinished)
        alone = join_blocks(separate(tracks[index], model, options=options))
        assert torch.equal(join_blocks(items[index]), alone)


@pytest.mark.parametrize("max_tracks_per_batch", [1, 2, 5])
def test_number_of_open_tracks_is_limited(max_tracks_per_batch: int) -> None:
    """A window of a unique size would otherwise wait for another one forever."""
    opened: list[int] = []

    def tracks() -> Iterator[TensorTrack | Exception]:
        for index in range(40):
            opened.append(index)
            # Without `valid_length`, a network reads the rest of a track as it is.
            yield (
                AudioReadError("")
                if index % 7 == 3
                else TensorTrack(make_noise(2, 1000 + index, index))
            )

    finished: list[int] = []
    most = 0
    for index, item in separate_many(
        tracks(),
        ScaleModel(),
        options=SeparationOptions(shifts=0, batch_size=16),
        max_tracks_per_batch=max_tracks_per_batch,
    ):
        if isinstance(item, TrackFinished | TrackFailed):
            finished.append(index)
        else:
            most = max(most, len(opened) - len(finished))
    assert sorted(finished) == list(range(40))
    # Plus the one that is being opened.
    assert most == min(max_tracks_per_batch + 1, 40) or max_tracks_per_batch == 1


def test_unreadable_track_does_not_stop_the_others() -> None:
    class BrokenTrack(BlockTrack):
        def blocks(self) -> Iterator[Tensor]:
            for number, block in enumerate(super().blocks()):
                if self.reads == self.fails and number == 2:
                    raise AudioReadError("broken")
                yield block

        fails = 1

    early, late = BrokenTrack(make_noise(2, 40_000), 9000), BrokenTrack(make_noise(2, 40_000), 9000)
    late.fails = 2
    bad = make_noise(2, 100)
    bad[0, 3] = float("nan")
    tracks = [
        TensorTrack(make_noise(2, 9000, 1)),
        early,
        TensorTrack(bad),
        late,
        TensorTrack(torch.zeros(2, 0)),
        TensorTrack(make_noise(2, 9000, 2)),
    ]
    failed: dict[int, Exception] = {}
    good: dict[int, list[Any]] = {0: [], 5: []}
    for index, item in separate_many(tracks, ScaleModel(), options=SeparationOptions(batch_size=3)):
        if isinstance(item, TrackFailed):
            failed[index] = item.error
        elif index in good:
            good[index].append(item)
    assert {index: type(error) for index, error in failed.items()} == {
        1: AudioReadError,
        2: SeparationError,
        3: AudioReadError,
        4: ValueError,
    }
    for index, items in good.items():
        alone = join_blocks(separate(tracks[index], ScaleModel()))
        assert torch.equal(join_blocks(items), alone)
    with pytest.raises(AudioReadError, match="broken"):
        list(separate(BrokenTrack(make_noise(2, 40_000), 9000), ScaleModel()))


@pytest.mark.parametrize("samples", [torch.zeros(9), torch.zeros(2, 9, dtype=torch.int16)])
def test_tensor_track_rejects_other_tensors(samples: Tensor) -> None:
    with pytest.raises(ValueError, match="floating-point tensor"):
        TensorTrack(samples)


def test_empty_track_is_rejected() -> None:
    for options in (SeparationOptions(), SeparationOptions(normalize=False)):
        with pytest.raises(ValueError, match="no samples"):
            list(separate(TensorTrack(torch.zeros(2, 0)), ScaleModel(), options=options))


@pytest.mark.parametrize("signal", ["silence", "constant", "antiphase", "one sample"])
def test_track_without_level_is_returned(signal: str) -> None:
    track = {
        "silence": torch.zeros(2, 9000),
        "constant": torch.full((2, 9000), 0.5),
        "antiphase": torch.cat([make_noise(1, 9000), -make_noise(1, 9000)]),
        "one sample": torch.full((2, 1), 0.25),
    }[signal]
    stems = join_blocks(separate(TensorTrack(track), ScaleModel(**IDENTITY)))
    torch.testing.assert_close(stems[0], track, rtol=0, atol=1e-6)


def test_apply_model_equals_the_pipeline() -> None:
    network, mix = tiny(), make_noise(2, 20_000)
    options = SeparationOptions(shifts=2, normalize=False, seed=4)
    stems = join_blocks(separate(TensorTrack(mix), network, options=options))
    assert torch.equal(apply_model(network, mix[None], 2, seed=4)[0], stems)


def test_chunk_started_announces_the_next_batch() -> None:
    items = list(separate(TensorTrack(make_noise(2, 30_000)), ScaleModel(), announce=True))
    started = [item for item in items if isinstance(item, ChunkStarted)]
    done = [item for item in items if isinstance(item, ChunkProcessed)]
    assert [e.positions for e in started] == [e.positions for e in done]
    assert [e.batch_index for e in started] == [e.batch_index for e in done]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("overlap", 1.5, r"overlap = 1\.5 must be a number in \[0, 1\)"),
        ("overlap", float("nan"), r"overlap = nan must be a number in"),
        ("overlap", "0.25", r"overlap = '0\.25' must be"),
        ("shifts", -1, r"shifts = -1 must be an integer, 0 or more"),
        ("shifts", 1.0, r"shifts = 1\.0 must be an integer"),
        ("shifts", True, r"shifts = True must be an integer"),
        ("batch_size", 0, r"batch_size = 0 must be 'auto' or an integer, 1 or more"),
        ("batch_size", "many", r"batch_size = 'many' must be 'auto' or"),
        ("segment", 0, r"segment = 0 must be a number above 0"),
        ("segment", float("inf"), r"segment = inf must be a number above 0"),
        ("transition_power", 0.5, r"transition_power = 0\.5 must be a number, 1 or more"),
        ("seed", 1.5, r"seed = 1\.5 must be an integer"),
        ("oom", "pray", r"oom = 'pray' must be one of retry, raise"),
        ("precision", "fp8", r"precision = 'fp8' must be one of fp32, bf16, fp16"),
        ("profile", "x", r"profile = 'x' must be one of demucs, padded"),
        ("window", "x", r"window = 'x' must be one of triangle, hann"),
        ("padding", "x", r"padding = 'x' must be one of constant, reflect, replicate"),
        ("split", 1, r"split = 1 must be True or False"),
        ("jobs", -1, r"jobs = -1 must be an integer, 0 or more"),
    ],
)
def test_options_reject_invalid_values(name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SeparationOptions(**{name: value})  # type: ignore[arg-type]


class PartialTrack(BlockTrack):
    """A track of which only the samples from `first` on are wanted."""

    def __init__(self, samples: Tensor, *sizes: int, first: int) -> None:
        super().__init__(samples, *sizes)
        self.first = first


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 6000),
    share=st.floats(0, 0.999),
    overlap=st.sampled_from([0.0, 0.25, 0.6]),
    shifts=st.integers(0, 2),
    batch_size=st.integers(1, 4),
    profile=st.sampled_from(["demucs", "padded"]),
    padding=st.sampled_from(["constant", "reflect"]),
)
def test_start_in_the_middle_gives_the_same_bits(
    length: int,
    share: float,
    overlap: float,
    shifts: int,
    batch_size: int,
    profile: Any,
    padding: Any,
) -> None:
    first = int(share * length)
    network = BagOfModels([ScaleModel(segment=0.1), ScaleModel(gains=[0.5, 2.0], segment=0.17)])
    options = SeparationOptions(
        shifts=shifts, overlap=overlap, batch_size=batch_size, profile=profile, padding=padding
    )
    track = 0.1 + make_noise(2, length)
    expected = join_blocks(separate(TensorTrack(track), network, options=options))
    items = list(separate(PartialTrack(track, 700, first=first), network, options=options))
    blocks = [item for item in items if isinstance(item, Block)]
    assert blocks[0].start == first
    assert torch.equal(torch.cat([b.stems for b in blocks], -1), expected[..., first:])
    last = [item for item in items if isinstance(item, ChunkProcessed)][-1]
    assert (last.fraction, last.batch_index) == (1.0, last.total_batches)
