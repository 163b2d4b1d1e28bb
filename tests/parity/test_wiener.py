"""The Wiener filter equals Open-Unmix's; the oracle is the copy inside upstream's `demucs`."""

import pytest
import torch
from demucs.wiener import wiener as oracle
from torch import Tensor

from demucs_infer.wiener import wiener

FRAMES = 700  # three windows of 300, the last one short


def spectra(channels: int, scale: float = 1.0, frames: int = 40) -> tuple[Tensor, Tensor]:
    """Make magnitudes (B S C F T) of three sources, and a mix (B C F T) with bins that are zero."""
    generator = torch.Generator().manual_seed(channels)
    magnitudes = torch.rand(2, 3, channels, 9, frames, generator=generator)
    mix = torch.randn(2, channels, 9, frames, generator=generator, dtype=torch.complex64)
    mix[:, :, 0] = 0
    mix[:, 0, 3, ::5] = 0
    mix[:, :, 4] = mix[:, :, 4].real.to(mix.dtype)
    mix[:, :, 5] = 1j * mix[:, :, 5].real
    return scale * magnitudes, scale * mix


def reference(magnitudes: Tensor, mix: Tensor, iterations: int, residual: bool) -> Tensor:
    """Run the oracle on one window, in double precision: (B S C F T)."""
    windows = []
    for item in range(len(mix)):
        target = magnitudes[item].permute(3, 2, 1, 0).double()
        parts = torch.view_as_real(mix[item].permute(2, 1, 0).to(torch.complex128).contiguous())
        estimate = oracle(target, parts.clone(), iterations, residual=residual)
        estimate = torch.view_as_complex(estimate.transpose(-1, -2).contiguous())
        windows.append(estimate.permute(3, 2, 1, 0))
    return torch.stack(windows)[:, : magnitudes.shape[1]]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("scale", [0.5, 50.0])
def test_wiener_equals_open_unmix(
    iterations: int, residual: bool, channels: int, scale: float
) -> None:
    magnitudes, mix = spectra(channels, scale)
    estimate = wiener(magnitudes, mix, iterations, residual)
    expected = reference(magnitudes, mix, iterations, residual)
    # Both in double precision, the estimate rounded to single. Open-Unmix in single precision is
    # up to 5e-5 away where a bin is close to mono.
    error = (estimate - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5


def test_windows_of_300_frames_are_independent() -> None:
    magnitudes, mix = spectra(2, frames=FRAMES)
    whole = wiener(magnitudes, mix, 1)
    for start in range(0, FRAMES, 300):
        part = slice(start, start + 300)
        alone = wiener(magnitudes[..., part], mix[..., part], 1)
        # The solver rounds differently for another number of matrices.
        torch.testing.assert_close(whole[..., part], alone, rtol=1e-4, atol=1e-6)
    joined = wiener(magnitudes[..., :400], mix[..., :400], 1)
    assert not torch.allclose(joined[..., 300:], whole[..., 300:400], rtol=1e-2)


def test_zero_iterations_give_the_phase_of_the_mix() -> None:
    magnitudes, mix = spectra(2)
    estimate = wiener(magnitudes, mix, 0)
    torch.testing.assert_close(estimate.abs(), magnitudes)
    aligned = (estimate * mix[:, None].conj())[:, :, :, 6:]
    assert (aligned.imag.abs() <= 1e-5 * aligned.abs() + 1e-7).all()
    assert (aligned.real >= 0).all()
    # A silent bin counts as one of phase zero.
    assert torch.equal(estimate[:, :, :, 0].real, magnitudes[:, :, :, 0])


def test_residual_takes_its_share_of_the_mix() -> None:
    """A source that is most of the mix gets most of it, never more than all."""
    _, mix = spectra(1)
    share = wiener(0.9 * mix.abs()[:, None], mix, 1, residual=True)[:, 0]
    loud = mix.abs() > 0.5  # far above the regularisation
    ratio = (share / torch.where(mix == 0, 1, mix))[loud]
    # Powers 0.81 and 0.01 of the mix: the filter returns their ratio at every bin.
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.81 / 0.82), rtol=1e-3, atol=1e-4)


def test_inputs_are_not_modified() -> None:
    magnitudes, mix = spectra(2)
    before = magnitudes.clone(), mix.clone()
    wiener(magnitudes, mix, 2, residual=True)
    assert torch.equal(magnitudes, before[0])
    assert torch.equal(mix, before[1])
