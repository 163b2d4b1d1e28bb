"""From the planes that a hybrid answers to samples, with one copy where there would be five.

Shapes: B batch, S sources, C channels, P planes (two a channel), F bins, T frames.
"""

import torch
from torch import Tensor

from demucs_infer.fast.memory import tiles
from demucs_infer.hdemucs import Hybrid, Scale

_SILENT_FRAMES = 2
"""Frames on each side that the networks never see."""


def fits(network: Hybrid) -> bool:
    """Whether the planes are real and imaginary parts, in the frames of both branches."""
    config = network.config
    return config.cac and config.hybrid and not config.hybrid_old


class ToWave:
    """`Hybrid.to_wave`."""

    def __init__(self, network: Hybrid) -> None:
        self._overlap = network.overlap
        self._planes = network.config.planes

    def __call__(self, x: Tensor, scale: Scale, z: Tensor, length: int) -> Tensor:
        """(B S*P F T) -> (B S C length); `z` only says where spectra live."""
        batch, _, bins, frames = x.shape
        parts = x.unflatten(1, (-1, self._planes // 2, 2)).permute(0, 1, 2, 4, 5, 3)
        sources, channels = parts.shape[1:3]
        size = (batch, sources, channels, bins + 1, frames + 2 * _SILENT_FRAMES)
        spectra = torch.empty(size, dtype=torch.complex64, device=z.device)
        for silent in (
            spectra[..., bins:, :],
            spectra[..., :_SILENT_FRAMES],
            spectra[..., -_SILENT_FRAMES:],
        ):
            silent.zero_()
        inside = torch.view_as_real(spectra)[..., :bins, _SILENT_FRAMES:-_SILENT_FRAMES, :]
        mean, std = scale.mean[..., None, None], scale.std[..., None, None]
        # Channels lie side by side in `x` and far apart in the result: a few bins at a time.
        for start, stop in tiles(bins, 4 * x.shape[1] * frames):
            rows = slice(start, stop)
            torch.addcmul(mean, parts[..., rows, :, :], std, out=inside[..., rows, :, :])
        # One source after the other, because results above 32 MB are fresh pages each time.
        waves = [self._overlap(spectra[:, [source]], length) for source in range(sources)]
        return torch.cat(waves, dim=1)
