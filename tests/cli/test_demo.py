"""The demo song is deterministic, the sum of its stems, and music rather than noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demucs_infer import demo


def test_same_seed_gives_the_same_song() -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = demo.song(6, seed=3), demo.song(6, seed=3), demo.song(6, seed=4)
    assert torch.equal(first.stems, again.stems)
    # Songs of different seeds are nearly uncorrelated.
    cosine = torch.nn.functional.cosine_similarity(first.mix.flatten(), other.mix.flatten(), 0)
    assert abs(float(cosine)) < 0.3
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


@pytest.mark.parametrize(("seconds", "seed"), [(0.01, 0), (7.3, 1), (20, 0)])
def test_mix_is_the_sum_of_stereo_stems_below_full_scale(seconds: float, seed: int) -> None:
    mix, stems, sample_rate = demo.song(seconds, seed)
    assert sample_rate == 44100
    assert stems.shape == (4, 2, round(seconds * 44100))
    assert mix.dtype == stems.dtype == torch.float32
    assert torch.equal(mix, stems.sum(0))
    assert 0.5 < float(mix.abs().max()) < 1
    assert bool(stems.isfinite().all())


def test_every_stem_has_the_spectrum_of_its_instrument() -> None:
    stems = demo.song(20, 0).stems
    power = torch.fft.rfft(stems.mean(1)).abs().square()
    hertz = torch.fft.rfftfreq(stems.shape[-1], 1 / 44100)

    def share(stem: int, low: float, high: float) -> float:
        band = (hertz >= low) & (hertz < high)
        return float(power[stem, band].sum() / power[stem].sum())

    drums, bass, other, vocals = range(4)
    assert share(bass, 20, 400) > 0.9
    assert share(drums, 20, 150) > 0.3  # kick
    assert share(drums, 2000, 20000) > 100 * share(bass, 2000, 20000)  # hats
    assert share(other, 150, 5000) > 0.9
    assert share(vocals, 80, 4000) > 0.9
    level = stems.square().mean((1, 2)).sqrt()
    assert float(level.max() / level.min()) < 2  # a mix in which each can be heard


def test_song_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds"):
        demo.song(0)
    with pytest.raises(ValueError, match="seconds"):
        demo.song(float("nan"))


def test_default_song_does_not_change() -> None:
    """Its scores are documented, and other tests separate it."""
    stems = demo.song(2, 0).stems.double()
    # Five decimals: sines differ in their last bits from one processor to the next.
    level = stems.square().mean((1, 2)).sqrt().tolist()
    assert level == pytest.approx([0.09492, 0.08629, 0.06904, 0.08629], abs=2e-5)
    first_second = stems[:, 0, :44101].abs().sum(-1) / 44100
    assert first_second.tolist() == pytest.approx([0.04415, 0.07227, 0.05131, 0.08482], abs=2e-5)
