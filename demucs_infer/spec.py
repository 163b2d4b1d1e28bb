"""Compute the spectrograms that the networks were trained on, and invert them.

Shapes: F bins, T frames, W samples of a window; `...` any leading axes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

_WITHOUT_COMPLEX = frozenset({"mps", "xpu"})
"""Device types with unreliable complex tensors."""


@lru_cache(maxsize=16)
def hann(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the periodic Hann window of `size` samples: (size,)."""
    # A tensor that is cached in inference mode could not be used with autograd later.
    with torch.inference_mode(False):
        return torch.hann_window(size, device="cpu").to(device, dtype)


def complex_device(device: torch.device) -> torch.device:
    """Return the device for spectrograms: `device`, or the CPU if it lacks complex tensors."""
    return torch.device("cpu") if device.type in _WITHOUT_COMPLEX else device


def spectro(x: Tensor, n_fft: int = 512, hop_length: int | None = None, pad: int = 0) -> Tensor:
    """Compute the centered, orthonormal STFT: (..., W) -> (..., F, T) complex, F = n_fft / 2 + 1.

    `hop_length` is a quarter of `n_fft` if it is not given. With `pad`, each window of `n_fft`
    samples is padded with silence to 1 + `pad` times its length, which gives more bins.
    """
    *other, length = x.shape
    x = x.reshape(-1, length).to(complex_device(x.device))
    z = torch.stft(
        x,
        n_fft * (1 + pad),
        hop_length or n_fft // 4,
        win_length=n_fft,
        window=hann(n_fft, x.dtype, x.device),
        normalized=True,
        return_complex=True,
        pad_mode="reflect",
    )
    return z.view(*other, *z.shape[-2:])


def ispectro(
    z: Tensor, hop_length: int | None = None, length: int | None = None, pad: int = 0
) -> Tensor:
    """Invert `spectro` to `length` samples: (..., F, T) complex -> (..., length)."""
    *other, bins, frames = z.shape
    z = z.reshape(-1, bins, frames)
    n_fft = 2 * bins - 2
    win_length = n_fft // (1 + pad)
    x = torch.istft(
        z,
        n_fft,
        hop_length,
        win_length=win_length,
        window=hann(win_length, z.real.dtype, z.device),
        normalized=True,
        length=length,
    )
    return x.view(*other, x.shape[-1])


def pad_reflect(x: Tensor, left: int, right: int) -> Tensor:
    """Pad both ends by reflection, at any length: (..., W) -> (..., left+W+right).

    Reflection needs a signal longer than the padding, so a short signal is first padded with
    silence, up to `right` samples on the right, then on the left (as upstream does).
    """
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    silent_right = min(right, missing)
    silent_left = missing - silent_right
    if missing:
        x = F.pad(x, (silent_left, silent_right))
    return F.pad(x, (left - silent_left, right - silent_right), mode="reflect")
