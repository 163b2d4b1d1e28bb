"""A gate silences what is inaudible, leaves everything else as it is, and fades between."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from demucs_infer.engine.gate import Gate, find_first, frame_size
from demucs_infer.engine.pipeline import Block, TensorTrack, separate
from demucs_infer.options import SeparationOptions
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import ScaleModel

RATE = 8000
FRAME = frame_size(RATE)
LENGTH = 6 * RATE + 77
MIX = 0.3 * make_noise(2, LENGTH)


def make_stems() -> Tensor:
    """Return three stems: with a long pause, with a short one, and with silence at both ends."""
    stems = torch.stack([0.2 * make_noise(2, LENGTH, seed) for seed in (1, 2, 3)])
    stems[0, :, RATE : 3 * RATE] *= 1e-5
    stems[1, :, RATE : RATE + 20 * FRAME] *= 1e-5
    stems[2, :, : 2 * RATE] *= 1e-6
    stems[2, :, 5 * RATE :] = 0.001  # the mean of a track, which every stem gets
    return stems


STEMS = make_stems()


def gate(cuts: Iterable[int], start: int = 0) -> Tensor:
    """Return what a gate returns for blocks that end at `cuts`."""
    made = Gate(RATE, len(STEMS), start)
    parts: list[Tensor | None] = []
    for stop in [*cuts, LENGTH]:
        parts.append(made.push(STEMS[..., start:stop], MIX[:, start:stop]))
        start = stop
    parts.append(made.finish())
    return torch.cat([part for part in parts if part is not None], dim=-1)


def test_long_pause_becomes_exactly_zero_with_fades_inside() -> None:
    stem, before = gate([])[0], STEMS[0]
    assert torch.equal(stem[:, :RATE], before[:, :RATE])
    assert torch.equal(stem[:, 3 * RATE :], before[:, 3 * RATE :])
    assert not stem[:, RATE + FRAME : 3 * RATE - FRAME].any()
    ratio = (stem / before)[0, RATE : RATE + FRAME]
    assert 0.95 < float(ratio[0]) < 1 and 0 < float(ratio[-1]) < 0.05
    assert bool((ratio.diff() < 0).all()), "it fades out"
    assert bool(((stem / before)[0, 3 * RATE - FRAME : 3 * RATE].diff() > 0).all()), "and in"


def test_short_pause_stays() -> None:
    assert torch.equal(gate([])[1], STEMS[1])


def test_silence_at_the_ends_has_no_fade_and_a_mean_is_no_sound() -> None:
    stem = gate([])[2]
    assert not stem[:, : 2 * RATE - FRAME].any()
    assert not stem[:, 5 * RATE + FRAME :].any()
    assert torch.equal(stem[:, 2 * RATE : 5 * RATE], STEMS[2, :, 2 * RATE : 5 * RATE])


@pytest.mark.parametrize("size", [1000, 333, FRAME, LENGTH])
def test_result_does_not_depend_on_the_blocks(size: int) -> None:
    assert torch.equal(gate(range(size, LENGTH, size)), gate([]))


@pytest.mark.parametrize(
    "first", [0, 100, RATE, RATE + 100, 12_345, 3 * RATE - 1, 3 * RATE, 47_000]
)
def test_result_from_a_later_sample_on_is_the_same(first: int) -> None:
    start = find_first(RATE, first)
    assert start % FRAME == 0 and start <= first
    assert torch.equal(gate([], start)[..., first - start :], gate([])[..., first:])


def test_silent_mixture_has_silent_stems() -> None:
    made = Gate(RATE, 1)
    noise = 1e-4 * make_noise(2, RATE)[None]
    parts = [made.push(noise, torch.zeros(2, RATE)), made.finish()]
    assert not torch.cat([part for part in parts if part is not None], dim=-1).any()


class LateTrack(TensorTrack):
    """A track of which an interrupted run had separated the beginning."""

    first = 12_345


@pytest.mark.parametrize("track", [TensorTrack, LateTrack])
def test_engine_gates_the_requested_stems(track: type[TensorTrack]) -> None:
    mix = 0.1 + make_noise(2, 5 * RATE)
    network = ScaleModel(["loud", "soft"], [1.0, 1e-5])
    plain, gated = (
        [
            item
            for item in separate(
                track(mix), network, options=SeparationOptions(shifts=0, gate=is_gated)
            )
            if isinstance(item, Block)
        ]
        for is_gated in (False, True)
    )
    first = getattr(track, "first", 0)
    assert (plain[0].start, gated[0].start) == (first, first)
    whole, silenced = (torch.cat([b.stems for b in blocks], dim=-1) for blocks in (plain, gated))
    assert torch.equal(silenced[0], whole[0]), "class A for what is heard"
    assert silenced.shape == whole.shape == (2, 2, 5 * RATE - first)
    assert whole[1].any() and not silenced[1].any()
    starts = [block.start for block in gated]
    ends = [block.start + block.stems.shape[-1] for block in gated]
    assert starts[1:] == ends[:-1]
