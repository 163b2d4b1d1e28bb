"""From the planes that a hybrid answers to samples, with one copy where there would be six.

Shapes: B batch, S sources, C channels, P planes (two a channel), F bins, T frames.
"""

import torch
from torch import Tensor

from demucs_infer.hdemucs import Hybrid, Scale
from demucs_infer.optimized.layout import tiles
from demucs_infer.spec import hann

_SILENT_FRAMES = 2
"""Frames on each side that the networks never see."""

_HOPS = 4
"""Frames that every sample is in, of those that are kept."""


def supports(network: Hybrid) -> bool:
    """Whether the planes are real and imaginary parts, in the frames of both branches."""
    config = network.config
    return config.cac and config.hybrid and not config.hybrid_old and config.nfft % _HOPS == 0


class InverseStft:
    """`Hybrid.to_wave`."""

    def __init__(self, network: Hybrid) -> None:
        self._plain = network.to_wave
        self._bins = network.nfft // 2
        self._planes = network.config.planes
        self._hop = network.hop_length
        self._first = _HOPS // 2 * self._hop + network.margin
        window = hann(network.nfft, torch.float32, torch.device("cpu"))
        # The squares of what overlaps there add up to three halves: 4 times the mean of sin⁴.
        self._window = (window / 1.5).view(_HOPS, self._hop)

    def __call__(self, x: Tensor, scale: Scale, z: Tensor, length: int) -> Tensor:
        """(B S*P F T) -> (B S C length); `z` only says where spectra live."""
        if x.shape[2] != self._bins:  # strides that do not divide them leave some out
            return self._plain(x, scale, z, length)
        spectra = self._spectra(x, scale, z.device)
        # One source after the other, because results above 32 MB are fresh pages each time.
        return torch.stack([self._wave(each, length) for each in spectra.unbind(1)], dim=1)

    def _spectra(self, x: Tensor, scale: Scale, device: torch.device) -> Tensor:
        """(B S*P F T) -> (B S C T F), with the last bin and the silent frames again."""
        batch, _, bins, frames = x.shape
        parts = x.unflatten(1, (-1, self._planes // 2, 2)).permute(0, 1, 2, 5, 4, 3)
        size = (*parts.shape[:3], frames + 2 * _SILENT_FRAMES, bins + 1)
        spectra = torch.empty(size, dtype=torch.complex64, device=device)
        for silent in (
            spectra[..., bins:],
            spectra[..., :_SILENT_FRAMES, :],
            spectra[..., -_SILENT_FRAMES:, :],
        ):
            silent.zero_()
        inside = torch.view_as_real(spectra)[..., _SILENT_FRAMES:-_SILENT_FRAMES, :bins, :]
        mean, std = scale.mean[..., None, None], scale.std[..., None, None]
        # Planes lie side by side in `x` and far apart in the result: a few bins at a time.
        for start, stop in tiles(bins, 16 * x.shape[1] * frames):
            some = slice(start, stop)
            torch.addcmul(mean, parts[..., some, :], std, out=inside[..., some, :])
        return spectra

    def _wave(self, spectra: Tensor, length: int) -> Tensor:
        """(B C T F) -> (B C length)."""
        frames = torch.fft.irfft(spectra, norm="ortho").unflatten(-1, (_HOPS, self._hop))
        *other, count, _, _ = frames.shape
        sums: Tensor = frames.new_zeros(*other, count + _HOPS - 1, self._hop)
        for index, window in enumerate(self._window):
            sums[..., index : index + count, :].addcmul_(frames[..., index, :], window)
        return sums.flatten(-2)[..., self._first : self._first + length]
