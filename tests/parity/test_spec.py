"""Spectrograms equal upstream's bit for bit, and their inverse restores the samples."""

import math

import pytest
import torch
from demucs.hdemucs import pad1d
from demucs.spec import ispectro as upstream_ispectro
from demucs.spec import spectro as upstream_spectro

from demucs_infer.spec import hann, ispectro, pad_reflect, spectro
from tests.helpers.audio_signals import make_noise


@pytest.mark.parametrize("length", [1000, 1024, 4099])
@pytest.mark.parametrize(("n_fft", "hop"), [(256, 64), (512, 128), (64, 16)])
def test_spectro_and_ispectro_equal_upstream(n_fft: int, hop: int, length: int) -> None:
    wave = make_noise(6, length).view(3, 2, length)
    z = spectro(wave, n_fft, hop)
    assert z.shape == (3, 2, n_fft // 2 + 1, length // hop + 1)
    assert torch.equal(z, upstream_spectro(wave, n_fft, hop))
    back = ispectro(z, hop, length)
    assert torch.equal(back, upstream_ispectro(z, hop, length))
    # A float32 transform and its inverse.
    torch.testing.assert_close(back, wave, rtol=0, atol=1e-6)


def test_spectro_keeps_energy() -> None:
    """Orthonormal: white noise of power p has p times the mean of the squared window in a bin."""
    z = spectro(make_noise(1, 400_000), 512, 128)
    expected = 0.01 * hann(512, torch.float32, torch.device("cpu")).square().mean().item()
    # 400 000 samples: the mean of a quarter of a million squares is accurate to about 1 %.
    assert math.isclose(z.abs().square().mean().item(), expected, rel_tol=0.02)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 10, 11, 50])
@pytest.mark.parametrize(("left", "right"), [(10, 10), (10, 3), (3, 10), (0, 7), (7, 0)])
def test_pad_reflect_equals_upstream_at_any_length(length: int, left: int, right: int) -> None:
    wave = make_noise(4, length).view(2, 2, length)
    assert torch.equal(pad_reflect(wave, left, right), pad1d(wave, (left, right), mode="reflect"))


def test_window_cached_in_inference_mode_works_under_autograd() -> None:
    with torch.inference_mode():
        spectro(make_noise(1, 600), 78, 20)
    wave = make_noise(1, 600).requires_grad_()
    spectro(wave, 78, 20).abs().sum().backward()
    assert wave.grad is not None


def test_hann_window_is_cached() -> None:
    cpu = torch.device("cpu")
    assert hann(96, torch.float32, cpu) is hann(96, torch.float32, cpu)
    assert hann(96, torch.float64, cpu).dtype == torch.float64
