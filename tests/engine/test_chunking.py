"""The building blocks agree with each other, with numpy, and with counting by hand."""

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.engine.chunking import (
    ChunkPlan,
    NormalizationStats,
    StreamingStitcher,
    denormalize_audio,
    generate_chunks,
    make_window,
    normalize_audio,
    overlap_add,
    pad_audio,
    stitch_chunks,
)
from demucs_infer.errors import SeparationError
from demucs_infer.sources import Audio
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import DictModel, OomModel, RecordingModel, ScaleModel

GEOMETRIES = [
    (1000, 256, 128),
    (1000, 256, 100),
    (1001, 256, 64),
    (37, 256, 192),
    (1000, 256, 256),
    (5, 64, 16),
    (129, 256, 128),
    (1, 256, 64),
    (1000, 100, 39),
]


@pytest.mark.parametrize(("length", "chunk", "hop"), GEOMETRIES)
@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_generate_chunks_slices_the_padded_track(
    length: int, chunk: int, hop: int, mode: str, batch_size: int
) -> None:
    track, plan = make_noise(2, length), ChunkPlan(length, chunk, hop)
    batches = list(generate_chunks(track, chunk, hop, batch_size, padding_mode=mode))
    assert len(batches) == plan.num_batches(batch_size)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    chunks = torch.cat(batches)
    assert len(chunks) == plan.num_chunks
    padded = pad_audio(track, chunk - hop, chunk - hop, mode)
    padded = pad_audio(padded, 0, plan.padded_length - padded.shape[-1], "constant")
    for number, got in enumerate(chunks):
        assert torch.equal(got, padded[:, number * hop : number * hop + chunk])


@pytest.mark.parametrize(("length", "chunk", "hop"), GEOMETRIES)
@pytest.mark.parametrize("window", ["hann", "triangle", "linear_fade"])
def test_stitch_chunks_returns_the_track(length: int, chunk: int, hop: int, window: str) -> None:
    track, weights = make_noise(2, length), make_window(window, chunk)
    results = []
    for batch_size in (1, 4):
        batches = [
            torch.stack([batch, -2 * batch], dim=1)
            for batch in generate_chunks(track, chunk, hop, batch_size)
        ]
        results.append(stitch_chunks(batches, 2, chunk, hop, length, window=weights))
    assert torch.equal(*results)
    # Weights are divided out again: a few roundings of float32 at a peak of about 1.
    torch.testing.assert_close(results[0][0], track, rtol=0, atol=1e-6)
    torch.testing.assert_close(results[0][1], -2 * track, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("length", "chunk", "hop"), GEOMETRIES)
def test_stitcher_returns_final_samples_at_once(length: int, chunk: int, hop: int) -> None:
    track, weights = make_noise(2, length), make_window("hann", chunk)
    stitcher = StreamingStitcher(chunk, hop, length, weights)
    assert stitcher.flush() is None
    num_returned = 0
    parts: list[Tensor] = []
    for number, batch in enumerate(generate_chunks(track, chunk, hop, 1), start=1):
        part = stitcher.step(batch)
        if part is not None:
            parts.append(part)
            num_returned += part.shape[-1]
        assert num_returned == min(max(number * hop - (chunk - hop), 0), length)
    assert stitcher.flush() is None
    assert stitcher.step(batch) is None, "nothing is left to return"
    expected = stitch_chunks(
        (batch[None] for batch in generate_chunks(track, chunk, hop, 1)),
        1,
        chunk,
        hop,
        length,
        window=weights,
    )
    assert torch.equal(torch.cat(parts, dim=-1), expected)
    stitcher.reset()
    again = [stitcher.step(batch) for batch in generate_chunks(track, chunk, hop, 1)]
    assert torch.equal(torch.cat([p for p in again if p is not None], dim=-1), expected)


def test_flush_returns_the_tail_of_an_unpadded_track() -> None:
    track = make_noise(2, 1000)
    stitcher = StreamingStitcher(100, 75, 1000, make_window("triangle", 100), samples_to_skip=0)
    parts = [stitcher.step(track[None, :, at : at + 100]) for at in range(0, 901, 75)]
    parts.append(stitcher.flush())
    assert parts[-1] is not None
    assert stitcher.flush() is None
    whole = torch.cat([part for part in parts if part is not None], dim=-1)
    torch.testing.assert_close(whole[0], track, rtol=0, atol=1e-6)  # weights divided out


def test_stitcher_state_is_public_and_bounded() -> None:
    stitcher = StreamingStitcher(100, 25, 10**9, make_window("hann", 100))
    assert stitcher.buffers is None
    assert (stitcher.chunk_size, stitcher.hop_size, stitcher.tail_size) == (100, 25, 75)
    assert (stitcher.samples_to_skip, stitcher.samples_to_keep) == (75, 10**9)
    held = []
    for number in range(3000):
        stitcher.step(torch.ones(4, 2, 100))
        if number in (10, 2999):
            assert stitcher.buffers is not None
            assert stitcher.buffers.buffer.shape == (4, 2, len(stitcher.buffers.norm_buffer))
            held.append(sum(t.numel() * t.element_size() for t in stitcher.buffers))
    assert held[0] == held[1] <= 2 * (4 * 2 + 1) * 100 * 4


def test_invalid_chunks_are_rejected() -> None:
    window = make_window("hann", 100)
    good = torch.ones(1, 2, 2, 100)

    def stitch(*batches: Tensor, target: int = 25) -> Tensor:
        return stitch_chunks(batches, 2, 100, 50, target, window=window)

    with pytest.raises(ValueError, match="is empty"):
        stitch()
    with pytest.raises(ValueError, match="2 stems, channels, 100"):
        stitch(torch.ones(1, 3, 2, 100))
    with pytest.raises(ValueError, match="stems, channels, 100"):
        stitch(torch.ones(1, 2, 2, 99))
    with pytest.raises(ValueError, match="earlier chunks have"):
        stitch(good, torch.ones(1, 2, 1, 100))
    with pytest.raises(ValueError, match="float64, but earlier batches are torch.float32"):
        stitch(good, good.double())
    with pytest.raises(ValueError, match="cover 50 of 51"):
        stitch(good, good, target=51)
    with pytest.raises(ValueError, match=r"window must have the shape \(100,\), got \(99,\)"):
        StreamingStitcher(100, 50, 10, make_window("hann", 99))
    with pytest.raises(ValueError, match="stride"):
        StreamingStitcher(100, 101, 10, window)
    with pytest.raises(ValueError, match="batch_size"):
        generate_chunks(make_noise(2, 10), 100, 50, 0)
    with pytest.raises(ValueError, match="padding"):
        generate_chunks(make_noise(2, 10), 100, 50, 1, padding_mode="wrap")


def test_chunk_plan_from_seconds() -> None:
    plan = ChunkPlan.from_seconds(1_323_000, 6.0, 3.0, 44_100)
    assert (plan.chunk_size, plan.hop_size, plan.overlap) == (264_600, 132_300, 132_300)
    assert ChunkPlan.from_seconds(10, 0.29, 0.29, 100).chunk_size == 29  # int() would say 28
    assert ChunkPlan.from_overlap(10, 100, 0.25).hop_size == 75
    assert plan.padded_length == (plan.num_chunks - 1) * 132_300 + 264_600
    assert ChunkPlan(0, 10, 5).num_chunks == ChunkPlan(0, 10, 5).padded_length == 0
    for chunk, hop in [(6.0, 0.0), (6.0, 7.0), (6.0, -1.0), (0.0, 0.0)]:
        with pytest.raises(ValueError, match="samples"):
            ChunkPlan.from_seconds(10, chunk, hop, 44_100)
    with pytest.raises(ValueError, match="num_samples = -1"):
        ChunkPlan(-1, 10, 5)


def test_normalized_audio_has_mean_0_and_deviation_1() -> None:
    track = 0.2 + make_noise(2, 5000)
    audio, stats = normalize_audio(track)
    mono = audio.double().mean(0)
    assert abs(float(mono.mean())) < 1e-6
    assert float(mono.std()) == pytest.approx(1, abs=1e-6)
    # Two roundings each way of samples near 0.5.
    torch.testing.assert_close(denormalize_audio(audio, stats), track, rtol=0, atol=1e-6)
    empty = normalize_audio(torch.zeros(2, 0))
    assert empty.audio.shape == (2, 0)


def test_audio_is_normalized_with_its_sample_rate() -> None:
    track = 0.2 + make_noise(2, 500)
    audio, stats = normalize_audio(Audio(track, 16_000))
    assert (type(audio), audio.sample_rate) == (Audio, 16_000)
    assert torch.equal(audio.data, normalize_audio(track).audio)
    restored = denormalize_audio(audio, stats)
    assert restored.sample_rate == 16_000
    torch.testing.assert_close(restored.data, track, rtol=0, atol=1e-6)


def test_recording_below_eps_keeps_its_level() -> None:
    quiet = 1e-5 * make_noise(2, 500)
    assert normalize_audio(quiet).stats.std < 1e-4
    audio, stats = normalize_audio(quiet, eps=1e-3)
    assert torch.equal(audio, quiet)
    assert stats == NormalizationStats(length=500)
    with pytest.raises(ValueError, match="eps = -1 must be 0 or more"):
        normalize_audio(quiet, eps=-1)
    with pytest.raises(ValueError, match="std = 0 must be above 0"):
        NormalizationStats(0.0, 0)


def test_mean_goes_to_every_stem_or_to_the_last() -> None:
    track = 0.25 + make_noise(2, 500)
    audio, stats = normalize_audio(track)
    stems = torch.stack([0.5 * audio, 0.125 * audio, 0.375 * audio])
    whole = denormalize_audio(stems, stats, mean_to="residual").sum(0)
    torch.testing.assert_close(whole, track, rtol=0, atol=1e-6)
    off = denormalize_audio(stems, stats).sum(0) - track
    torch.testing.assert_close(off, torch.full_like(off, 2 * stats.mean), rtol=0, atol=1e-6)
    # One recording is not a set of stems.
    one = denormalize_audio(audio, stats, mean_to="residual")
    torch.testing.assert_close(one, track, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="mean_to = 'none' must be 'all' or 'residual'"):
        denormalize_audio(audio, stats, mean_to="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 1009])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("hop", [64, 32, 27, 16])
def test_overlap_add_returns_stems_by_name(length: int, batch_size: int, hop: int) -> None:
    track = make_noise(2, length)
    network = DictModel(["vocals", "bass"], [0.5, 2.0], segment=64 / 8000)
    network.train()
    stems = overlap_add(network, track, ChunkPlan(length, 64, hop), batch_size=batch_size)
    assert list(stems) == ["vocals", "bass"]
    # Weights are divided out again.
    torch.testing.assert_close(stems["vocals"], 0.5 * track, rtol=0, atol=1e-6)
    torch.testing.assert_close(stems["bass"], 2 * track, rtol=0, atol=2e-6)
    assert network.training, "restored"
    assert len(network.queries) == ChunkPlan(length, 64, hop).num_batches(batch_size)


def test_model_kwargs_are_passed_unchanged_also_after_a_retry() -> None:
    class QueryRecorder(OomModel):
        def forward(self, mix: Tensor, *, query: object = None) -> Tensor:  # type: ignore[override]
            answer = super().forward(mix)
            received.append(query)
            return answer

    received: list[object] = []
    query = object()
    network = QueryRecorder(limit=2, segment=0.01)
    overlap_add(network, make_noise(2, 1000), ChunkPlan(1000, 80, 40), batch_size=8, query=query)
    assert network.tried[:3] == [8, 4, 2]
    assert len(received) > 3
    assert all(one is query for one in received)
    with pytest.raises(TypeError, match="nonsense"):
        overlap_add(ScaleModel(), make_noise(2, 100), ChunkPlan(100, 80, 40), nonsense=1)


class PlainDictModel(nn.Module):
    """A network that names its stems in its output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, mix: Tensor, *, gain: float = 1.0) -> dict[str, Tensor]:
        self.calls += 1
        return {"vocals": gain * 0.5 * mix, "bass": gain * 2 * mix}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_network_without_attributes_names_its_stems_by_its_output(batch_size: int) -> None:
    track, plan, network = make_noise(3, 1009), ChunkPlan(1009, 64, 27), PlainDictModel()
    stems = overlap_add(network, track, plan, batch_size=batch_size, gain=0.5)
    assert list(stems) == ["vocals", "bass"]
    torch.testing.assert_close(stems["bass"], track, rtol=0, atol=1e-6)
    assert network.calls == plan.num_batches(batch_size)
    assert network.training, "restored"
    queries = {"soft": {"gain": 0.5}, "loud": {"gain": 2.0}}
    by_query = overlap_add(network, track, plan, queries=queries)
    assert list(by_query) == ["soft_vocals", "soft_bass", "loud_vocals", "loud_bass"]
    torch.testing.assert_close(by_query["soft_bass"], stems["bass"], rtol=0, atol=1e-6)


def test_list_and_tensor_need_names_of_stems() -> None:
    class ListModel(PlainDictModel):
        def forward(self, mix: Tensor) -> list[Tensor]:  # type: ignore[override]
            return list(super().forward(mix).values())

    track, plan = make_noise(2, 300), ChunkPlan(300, 64, 32)
    stems = overlap_add(ListModel(), track, plan, sources=["a", "b"])
    torch.testing.assert_close(stems["b"], 2 * track, rtol=0, atol=2e-6)
    with pytest.raises(SeparationError, match="ListModel has no .*list, which does not name"):
        overlap_add(ListModel(), track, plan)
    with pytest.raises(SeparationError, match="returned 2, expected .* with 3 stems: a, b, c"):
        overlap_add(ListModel(), track, plan, sources=["a", "b", "c"])


def test_stems_of_later_batches_must_be_those_of_the_first() -> None:
    class ChangingModel(PlainDictModel):
        def forward(self, mix: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            stems = super().forward(mix)
            return stems if self.calls < 3 else {"vocals": mix, "piano": mix}

    message = r"\['piano', 'vocals'\], expected \['bass', 'vocals'\]"
    with pytest.raises(SeparationError, match=message):
        overlap_add(ChangingModel(), make_noise(2, 1000), ChunkPlan(1000, 64, 32))


def test_reduced_batch_size_is_kept_for_the_next_windows() -> None:
    network = OomModel(limit=3)
    plan = ChunkPlan(16 * 40 - 40, 80, 40)
    stems = overlap_add(network, make_noise(2, plan.num_samples), plan, batch_size=8)
    assert network.tried == [8, 4, 2, 2, 2, 2] + [2] * ((plan.num_chunks - 8 + 1) // 2)
    without = overlap_add(OomModel(limit=9), make_noise(2, plan.num_samples), plan, batch_size=8)
    assert all(torch.equal(stems[name], without[name]) for name in without)
    with pytest.raises(torch.OutOfMemoryError):
        overlap_add(
            OomModel(limit=3), make_noise(2, plan.num_samples), plan, batch_size=8, oom="raise"
        )


def test_queries_equal_separate_runs() -> None:
    class GainModel(RecordingModel):
        def forward(self, mix: Tensor, *, gain: Tensor) -> list[Tensor]:  # type: ignore[override]
            return list((super().forward(mix) * gain).unbind(1))

    track, plan = make_noise(2, 1000), ChunkPlan(1000, 80, 40)
    one = GainModel(["it"], [1.0], segment=0.01)
    queries = {"soft": {"gain": torch.tensor(0.5)}, "loud": {"gain": torch.tensor(2.0)}}
    both = overlap_add(one, track, plan, queries=queries)
    assert list(both) == ["soft", "loud"]
    for name, arguments in queries.items():
        alone = overlap_add(one, track, plan, **arguments)
        assert torch.equal(both[name], alone["it"])
    several = GainModel(["a", "b"], [1.0, 3.0], segment=0.01)
    assert list(overlap_add(several, track, plan, queries=queries)) == [
        "soft_a",
        "soft_b",
        "loud_a",
        "loud_b",
    ]


def test_unexpected_stem_names_are_rejected() -> None:
    class WrongStemsModel(ScaleModel):
        def forward(self, mix: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"drums": mix, "piano": mix}

    words = r"\['drums', 'piano'\], expected \['bass', 'drums'\]"
    with pytest.raises(SeparationError, match=words):
        overlap_add(WrongStemsModel(), make_noise(2, 100), ChunkPlan(100, 80, 40))
    with pytest.raises(ValueError, match="plan is for 99"):
        overlap_add(ScaleModel(), make_noise(2, 100), ChunkPlan(99, 80, 40))
