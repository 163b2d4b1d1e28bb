"""The level of any track is removed and restored."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from demucs_infer.engine.level import PIECE, Level, measure
from demucs_infer.errors import SeparationError
from tests.helpers.audio_signals import make_noise


def split_cyclically(track: Tensor, *sizes: int) -> Iterator[Tensor]:
    at = 0
    while at < track.shape[-1]:
        for size in sizes:
            yield track[..., at : at + size]
            at += size


SIGNALS = {
    "noise": make_noise(2, 5000),
    "silence": torch.zeros(2, 5000),
    "constant": torch.full((2, 5000), 0.5),
    "constant that is no binary fraction": torch.full((2, 4999), 0.1),
    "antiphase": torch.cat([make_noise(1, 5000), -make_noise(1, 5000)]),
    "noise on a constant": 0.3 + make_noise(2, 5000),
    "one sample": torch.tensor([[0.3], [0.2]]),
    "mono": make_noise(1, 5000),
    "six channels": make_noise(6, 5000),
    "loud": 30 * make_noise(2, 5000),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_restore_inverts_remove(name: str) -> None:
    track = SIGNALS[name]
    before = track.clone()
    level = measure([track])
    there = level.remove(track)
    assert torch.isfinite(there).all()
    assert level.std > 0
    assert level.length == track.shape[-1]
    # Two roundings of a float32 on the way out, two on the way back, of the largest sample.
    tolerance = 4 * 6e-8 * max(1.0, float(track.abs().max()))
    torch.testing.assert_close(level.restore(there), track, rtol=0, atol=tolerance)
    assert torch.equal(track, before)


@pytest.mark.parametrize("name", ["silence", "constant", "antiphase", "one sample"])
def test_track_with_a_silent_mono_mix_is_unchanged(name: str) -> None:
    track = SIGNALS[name]
    level = measure([track])
    assert (level.mean, level.std) == (0.0, 1.0)
    assert torch.equal(level.remove(track), track)
    assert torch.equal(level.restore(track), track)


def test_cancelling_channels_with_dither_do_not_blow_up() -> None:
    music = make_noise(1, 50_000)
    track = torch.cat([music, -music]) + 1e-5 * make_noise(2, 50_000, seed=1)
    # (x - mean) / (std + 1e-8) would reach six digits here.
    assert float(measure([track]).remove(track).abs().max()) < 100


@pytest.mark.parametrize("name", ["noise", "noise on a constant", "mono", "six channels", "loud"])
def test_level_equals_upstream(name: str) -> None:
    track = SIGNALS[name]
    mono = track.mean(0)
    level = measure([track])
    expected = (track - mono.mean()) / (mono.std() + 1e-8)
    # Upstream takes both numbers in float32; their rounding is relative to what they scale.
    torch.testing.assert_close(level.remove(track), expected, rtol=1e-5, atol=1e-5)


def test_quiet_music_is_raised_like_upstream() -> None:
    track = 1e-5 * make_noise(2, 5000)
    level = measure([track])
    assert level.std == pytest.approx(float(track.double().mean(0).std()) + 1e-8, rel=1e-12)


@pytest.mark.parametrize("sizes", [(1,), (7, 1, 300), (PIECE,), (PIECE - 1, 2), (10**6,)])
def test_block_sizes_and_threads_do_not_change_bits(sizes: tuple[int, ...]) -> None:
    length = 3 * PIECE + 17 if sizes != (1,) else 3000
    track = make_noise(2, length)
    threads = torch.get_num_threads()
    try:
        expected = measure([track])
        for count in (1, 2):
            torch.set_num_threads(count)
            assert measure(split_cyclically(track, *sizes)) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_track_is_rejected_with_the_position(value: float) -> None:
    track = make_noise(2, PIECE + 100)
    track[1, PIECE + 3] = value
    with pytest.raises(SeparationError, match=f"sample {PIECE + 3}:"):
        measure([track])


def test_empty_track_has_the_default_level_without_a_warning() -> None:
    assert measure([torch.zeros(2, 0)]) == Level()
    assert measure([]) == Level()
