"""The Wiener filter is Open-Unmix's (the copy inside upstream's `demucs` is the oracle)."""

import pytest
import torch
from demucs.wiener import wiener as oracle
from torch import Tensor

from demucs_infer.wiener import wiener

FRAMES = 700  # three windows of 300, the last one short


def spectra(channels: int, loudness: float = 1.0, frames: int = 40) -> tuple[Tensor, Tensor]:
    """Magnitudes (B S C F T) of three sources, and a mix (B C F T) with bins that are zero."""
    generator = torch.Generator().manual_seed(channels)
    magnitudes = torch.rand(2, 3, channels, 9, frames, generator=generator)
    mix = torch.randn(2, channels, 9, frames, generator=generator, dtype=torch.complex64)
    mix[:, :, 0] = 0
    mix[:, 0, 3, ::5] = 0
    mix[:, :, 4] = mix[:, :, 4].real.to(mix.dtype)
    mix[:, :, 5] = 1j * mix[:, :, 5].real
    return loudness * magnitudes, loudness * mix


def reference(magnitudes: Tensor, mix: Tensor, iterations: int, residual: bool) -> Tensor:
    """The oracle on one window, in double precision: (B S C F T)."""
    answers = []
    for item in range(len(mix)):
        target = magnitudes[item].permute(3, 2, 1, 0).double()
        heard = torch.view_as_real(mix[item].permute(2, 1, 0).to(torch.complex128).contiguous())
        answer = oracle(target, heard.clone(), iterations, residual=residual)
        answer = torch.view_as_complex(answer.transpose(-1, -2).contiguous())
        answers.append(answer.permute(3, 2, 1, 0))
    return torch.stack(answers)[:, : magnitudes.shape[1]]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("loudness", [0.5, 50.0])
def test_it_is_open_unmixs(iterations: int, residual: bool, channels: int, loudness: float) -> None:
    magnitudes, mix = spectra(channels, loudness)
    answer = wiener(magnitudes, mix, iterations, residual)
    expected = reference(magnitudes, mix, iterations, residual)
    # Both in double precision, the answer rounded to single; Open-Unmix's own single precision
    # is up to 5e-5 away where a bin is close to mono.
    error = (answer - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5


def test_every_window_of_300_frames_stands_for_itself() -> None:
    magnitudes, mix = spectra(2, frames=FRAMES)
    whole = wiener(magnitudes, mix, 1)
    for start in range(0, FRAMES, 300):
        part = slice(start, start + 300)
        alone = wiener(magnitudes[..., part], mix[..., part], 1)
        # One solver for more or fewer matrices at once.
        torch.testing.assert_close(whole[..., part], alone, rtol=1e-4, atol=1e-6)
    joined = wiener(magnitudes[..., :400], mix[..., :400], 1)
    assert not torch.allclose(joined[..., 300:], whole[..., 300:400], rtol=1e-2)


def test_without_iterations_every_source_has_the_phase_of_the_mix() -> None:
    magnitudes, mix = spectra(2)
    answer = wiener(magnitudes, mix, 0)
    torch.testing.assert_close(answer.abs(), magnitudes)
    aligned = (answer * mix[:, None].conj())[:, :, :, 6:]
    assert (aligned.imag.abs() <= 1e-5 * aligned.abs() + 1e-7).all()
    assert (aligned.real >= 0).all()
    # A silent bin counts as one of phase zero.
    assert torch.equal(answer[:, :, :, 0].real, magnitudes[:, :, :, 0])


def test_with_a_residual_the_shares_leave_the_rest_of_the_mix() -> None:
    """One source that is most of the mix gets most of it, never more than all."""
    _, mix = spectra(1)
    share = wiener(0.9 * mix.abs()[:, None], mix, 1, residual=True)[:, 0]
    loud = mix.abs() > 0.5  # far above the regularisation
    ratio = (share / torch.where(mix == 0, 1, mix))[loud]
    # Powers 0.81 and 0.01 of the mix: the filter gives their ratio at every bin.
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.81 / 0.82), rtol=1e-3, atol=1e-4)


def test_the_callers_tensors_stay_what_they_are() -> None:
    magnitudes, mix = spectra(2)
    before = magnitudes.clone(), mix.clone()
    wiener(magnitudes, mix, 2, residual=True)
    assert torch.equal(magnitudes, before[0])
    assert torch.equal(mix, before[1])
