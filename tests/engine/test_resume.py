"""A track that is resumed in the middle has the same bits as when it runs from the start."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.engine.level import Level, measure
from demucs_infer.engine.pipeline import Block, separate
from demucs_infer.engine.stems import choose_stems
from demucs_infer.engine.stitch import TrackBuffer
from demucs_infer.events import ChunkProcessed
from demucs_infer.options import SeparationOptions
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import RecordingModel


class RampModel(RecordingModel):
    """A network whose output depends on the position in the window, and so on the grid."""

    def forward(self, mix: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, mix.shape[-1])
        return super().forward(mix * ramp)


class TwoNetworkBag(nn.Module):
    """Two networks with different weights in every stem."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([RampModel(segment=1.0), RampModel(segment=0.7)])
        self.weights = [[1.0, 0.25], [0.5, 1.0]]


@dataclass(frozen=True)
class PartialTrack:
    """A track of which only the samples from `first` on are wanted."""

    samples: Tensor
    first: int = 0
    level: Level | None = None
    channels: int = 2

    def blocks(self) -> Iterator[Tensor]:
        yield from self.samples.split(777, dim=-1)


def separate_from(
    track: PartialTrack, model: object, options: SeparationOptions, rule: str
) -> tuple[int, Tensor, list[float]]:
    stems = choose_stems(["drums", "bass"], derive=[rule])
    items = list(separate(track, model, options=options, stems=stems))
    blocks = [item for item in items if isinstance(item, Block)]
    fractions = [item.fraction for item in items if isinstance(item, ChunkProcessed)]
    return blocks[0].start, torch.cat([block.stems for block in blocks], dim=-1), fractions


@pytest.mark.parametrize("first", [1, 6000, 7999, 8000, 20_000, 40_001, 43_999])
@pytest.mark.parametrize(
    "options",
    [
        SeparationOptions(),
        SeparationOptions(shifts=2, overlap=0.6),
        SeparationOptions(shifts=0, batch_size=3),
        SeparationOptions(profile="padded", padding="reflect", window="hann", overlap=0.5),
        SeparationOptions(split=False),
    ],
    ids=["default", "shifts", "batches", "padded", "no split"],
)
def test_rest_of_a_track_is_bit_identical(first: int, options: SeparationOptions) -> None:
    track = make_noise(2, 44_000)
    # A single member is enough for the grid; the bag adds passes that end at different samples.
    for model in (RampModel(segment=1.0), TwoNetworkBag()):
        start, whole, _ = separate_from(PartialTrack(track), model, options, "rest=mixture-drums")
        assert start == 0
        start, rest, fractions = separate_from(
            PartialTrack(track, first), model, options, "rest=mixture-drums"
        )
        assert start == first
        assert torch.equal(rest, whole[..., first:])
        assert fractions == sorted(fractions) and fractions[-1] == 1


def test_only_needed_windows_run() -> None:
    model, track = RampModel(segment=1.0), make_noise(2, 80_000)
    separate_from(PartialTrack(track), model, SeparationOptions(shifts=0), "rest=mixture-drums")
    num_all = len(model.seen)
    _, _, fractions = separate_from(
        PartialTrack(track, 60_000), model, SeparationOptions(shifts=0), "rest=mixture-drums"
    )
    # Windows of 8000 every 6000 samples: those that end beyond 60 000 begin at 54 000 or later.
    assert (num_all, len(model.seen) - num_all) == (14, 5)
    # The first of them is the tenth: nine and itself are done when it is.
    assert fractions[0] == pytest.approx(10 * 8000 / (13 * 8000 + 2000), abs=1e-12)


def test_given_level_is_not_measured_again() -> None:
    track = make_noise(2, 9000)
    options, rule = SeparationOptions(), "rest=mixture-drums"
    _, expected, _ = separate_from(PartialTrack(track), RampModel(), options, rule)
    _, actual, _ = separate_from(
        PartialTrack(track, level=measure([track])), RampModel(), options, rule
    )
    assert torch.equal(actual, expected)
    _, other, _ = separate_from(
        PartialTrack(track, level=Level(0.0, 2.0, 9000)), rounding_model(), options, rule
    )
    assert not torch.equal(other, expected)


def rounding_model() -> RampModel:
    """Create a network whose output depends on the level of its input."""

    class RoundingModel(RampModel):
        def forward(self, mix: Tensor) -> Tensor:
            return super().forward(mix.round())

    return RoundingModel()


def test_samples_before_the_start_are_not_kept() -> None:
    blocks = (torch.zeros(1, 1000) for _ in range(1000))
    buffer = TrackBuffer(blocks, 1_000_000, start=900_000)
    buffer.read(900_000, 900_001)
    assert sum(piece.shape[-1] for piece in buffer._pieces) <= 2 * 65_536
