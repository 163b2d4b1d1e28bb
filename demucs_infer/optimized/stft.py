"""Turn samples into the input planes of a hybrid network, without the frames that it leaves out.

Shapes: B batch, C channels, P planes (two per channel), W samples, F bins, T frames.
"""

import torch
from torch import Tensor

from demucs_infer.hdemucs import Hybrid
from demucs_infer.spec import hann, pad_reflect
from demucs_infer.system.arena import empty


class ForwardStft:
    """Optimized `Hybrid.analyze` and `to_planes`, for networks that `istft.supports` accepts."""

    def __init__(self, network: Hybrid) -> None:
        self._size = network.nfft
        self._hop = network.hop_length
        self._margin = network.margin
        self._window = hann(network.nfft, torch.float32, torch.device("cpu"))

    def analyze(self, mix: Tensor) -> Tensor:
        """Return the spectrum: (B, C, W) -> (B, C, F, T) complex, without the Nyquist bin."""
        length = mix.shape[-1]
        right = self._margin - length % -self._hop  # up to a whole number of hops
        frames = pad_reflect(mix, self._margin, right).unfold(-1, self._size, self._hop)
        windows = torch.mul(frames, self._window, out=empty(*frames.shape))
        spectra = empty(*frames.shape[:-1], self._size // 2 + 1, dtype=torch.complex64)
        torch.fft.rfft(windows, norm="ortho", out=spectra)
        return spectra[..., :-1].transpose(-1, -2)

    def to_planes(self, z: Tensor) -> Tensor:
        """Turn a spectrum into planes: (B, C, F, T) complex -> (B, P, F, T)."""
        parts = torch.view_as_real(z).permute(0, 1, 4, 2, 3)
        planes = empty(*parts.shape).copy_(parts)
        return planes.flatten(1, 2)
