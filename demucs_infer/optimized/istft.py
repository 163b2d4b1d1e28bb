"""Turn the output planes of a hybrid network into samples with two copies instead of six.

Shapes: B batch, S sources, C channels, P planes (two per channel), F bins, T frames.
"""

import torch
from torch import Tensor

from demucs_infer.hdemucs import Hybrid, Normalizer
from demucs_infer.optimized.layout import tiles
from demucs_infer.spec import hann
from demucs_infer.system.arena import empty

_PADDING_FRAMES = 2
"""Silent frames on each side, which the networks never see."""

_HOPS_PER_FRAME = 4
"""Length of a frame in hops, and so the number of frames that overlap at every sample."""

_STEMS_AT_A_TIME = 2
"""The spectra of more would take more memory; for each alone, the planes would be read more often
than the cache can help with, as those of all stems are next to each other."""


def supports(network: Hybrid) -> bool:
    """Tell whether `InverseStft` can replace `to_wave` of a hybrid network.

    Its planes must be real and imaginary parts, in frames aligned with the waveform branch.
    """
    config = network.config
    return (
        config.cac
        and config.hybrid
        and not config.hybrid_old
        and config.nfft % _HOPS_PER_FRAME == 0
    )


class InverseStft:
    """Optimized `Hybrid.to_wave`, for the networks that `supports` accepts."""

    def __init__(self, network: Hybrid) -> None:
        self._original = network.to_wave
        self._bins = network.nfft // 2
        self._planes = network.config.planes
        self._hop = network.hop_length
        self._start = _HOPS_PER_FRAME // 2 * self._hop + network.margin
        window = hann(network.nfft, torch.float32, torch.device("cpu"))
        # The squared windows of four overlapping frames add up to 1.5: 4 times the mean of sin⁴.
        self._window = (window / 1.5).view(_HOPS_PER_FRAME, self._hop)

    def __call__(self, x: Tensor, normalizer: Normalizer, z: Tensor, length: int) -> Tensor:
        """Turn planes (B, S*P, F, T) into samples (B, S, C, length)."""
        if x.shape[2] != self._bins:  # some are missing: the stride does not divide them
            return self._original(x, normalizer, z, length)
        batch, planes, _, frames = x.shape
        stems, channels = planes // self._planes, self._planes // 2
        waves = empty(batch, stems, channels, length)
        windows = empty(batch, channels, frames + 2 * _PADDING_FRAMES, 4 * self._hop)
        for start in range(0, stems, _STEMS_AT_A_TIME):
            stop = min(start + _STEMS_AT_A_TIME, stems)
            selected = x[:, start * self._planes : stop * self._planes]
            spectra = self._make_spectra(selected, normalizer)
            for stem in range(start, stop):
                torch.fft.irfft(spectra[:, stem - start], norm="ortho", out=windows)
                waves[:, stem] = self._overlap_add(windows, length)
        return waves

    def _make_spectra(self, x: Tensor, normalizer: Normalizer) -> Tensor:
        """Denormalize and pad the planes into spectra: (B, S*P, F, T) -> (B, S, C, T, F)."""
        batch, planes, bins, frames = x.shape
        channels = self._planes // 2
        size = (batch, planes // self._planes, channels)
        spectra = empty(*size, frames + 2 * _PADDING_FRAMES, bins + 1, dtype=torch.complex64)
        for silent in (
            spectra[..., bins:],
            spectra[..., :_PADDING_FRAMES, :],
            spectra[..., -_PADDING_FRAMES:, :],
        ):
            silent.zero_()
        inside = spectra[..., _PADDING_FRAMES:-_PADDING_FRAMES, :bins].permute(0, 4, 3, 1, 2)
        planes_last = x.permute(0, 2, 3, 1)  # (B, F, T, S*P)
        # Adjacent bins of `x` are far apart in the result, so copy a few bins at a time.
        for start, stop in tiles(bins, 16 * planes * frames):
            tile = planes_last[:, start:stop]
            parts = tile.new_empty(tile.shape)
            torch.addcmul(normalizer.mean, tile, normalizer.std, out=parts)
            # Both parts of a complex number move at once.
            inside[:, start:stop] = torch.view_as_complex(parts.unflatten(-1, (-1, channels, 2)))
        return spectra

    def _overlap_add(self, frames: Tensor, length: int) -> Tensor:
        """Apply the window and overlap-add: (B, C, T, nfft) -> (B, C, length)."""
        frames = frames.unflatten(-1, (_HOPS_PER_FRAME, self._hop))
        *other, count, _, _ = frames.shape
        sums = empty(*other, count + _HOPS_PER_FRAME - 1, self._hop).zero_()
        for index, window in enumerate(self._window):
            sums[..., index : index + count, :].addcmul_(frames[..., index, :], window)
        return sums.flatten(-2)[..., self._start : self._start + length]
