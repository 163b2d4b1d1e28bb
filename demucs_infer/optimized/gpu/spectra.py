"""Compute spectra and their inverse on the device of the network, with or without complex numbers.

GPUs of Apple have complex numbers only in part, and no float64. There, a transform of n = a*b
samples is computed as two products with tables of a and of b points, and a rotation between them,
with real and imaginary parts as separate planes. A network in this form can also be exported.

Shapes: B batch, S stems, C channels, P planes (two per channel), F bins, T frames, W samples of a
window, N samples of a frame.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.hdemucs import Hybrid, Normalizer
from demucs_infer.optimized import istft
from demucs_infer.spec import hann, pad_reflect

supports = istft.supports

_HOPS_PER_FRAME = 4
"""Length of a frame in hops, and so the number of frames that overlap at every sample."""


class PlaneTransform:
    """Fourier transform of frames of `size` samples, without the last bin, as real planes."""

    def __init__(self, size: int) -> None:
        self.size = size
        outer = max(divisor for divisor in range(1, math.isqrt(size) + 1) if not size % divisor)
        if size // outer % 2:
            outer = size // outer  # the inner factor is halved
        inner = size // outer
        if inner % 2:
            raise ValueError(f"a frame of {size} samples is odd: expected an even number")
        self._outer = outer
        scale = size**-0.5  # orthonormal
        steps, bins = torch.arange(outer), torch.arange(inner // 2)
        columns = torch.arange(inner)
        self._tables: dict[str, Tensor] = {}
        self._add_table("outer", torch.outer(steps, steps), outer, 1.0)
        self._add_table("turn", torch.outer(steps, columns), size, scale)
        self._add_table("inner", torch.outer(columns, bins), inner, 1.0)
        # Of a real signal, each bin but the first stands for its mirror image, too.
        self._weight = torch.full((outer, inner // 2), 2.0)
        self._weight[0, 0] = 1.0

    def _add_table(self, name: str, product: Tensor, period: int, scale: float) -> None:
        angles = (product % period).double() * (2 * math.pi / period)  # on the CPU, once
        self._tables[f"{name} cos"] = (angles.cos() * scale).float()
        self._tables[f"{name} sin"] = (angles.sin() * scale).float()

    def to(self, device: torch.device) -> "PlaneTransform":
        """Move the tables to `device`, and return this transform."""
        self._tables = {name: table.to(device) for name, table in self._tables.items()}
        self._weight = self._weight.to(device)
        return self

    def transform(self, frames: Tensor) -> Tensor:
        """Transform frames (..., N) into real and imaginary parts (..., N/2, 2)."""
        t = self._tables
        x = frames.unflatten(-1, (self._outer, -1))  # (..., a, b)
        real, imag = t["outer cos"] @ x, -(t["outer sin"] @ x)
        cos, sin = t["turn cos"], t["turn sin"]
        real, imag = real * cos + imag * sin, imag * cos - real * sin
        cos, sin = t["inner cos"], t["inner sin"]
        planes = real @ cos + imag @ sin, imag @ cos - real @ sin  # (..., a, b/2)
        return torch.stack([plane.mT.flatten(-2) for plane in planes], dim=-1)

    def invert(self, spectrum: Tensor) -> Tensor:
        """Transform real and imaginary parts (..., N/2, 2) back into frames (..., N)."""
        t = self._tables
        planes = spectrum.unflatten(-2, (-1, self._outer)).transpose(-2, -3)  # (..., a, b/2, 2)
        real, imag = (planes[..., part] * self._weight for part in (0, 1))
        cos, sin = t["inner cos"].mT, t["inner sin"].mT
        real, imag = real @ cos - imag @ sin, real @ sin + imag @ cos  # (..., a, b)
        cos, sin = t["turn cos"], t["turn sin"]
        real, imag = real * cos - imag * sin, real * sin + imag * cos
        samples: Tensor = (t["outer cos"] @ real - t["outer sin"] @ imag).flatten(-2)
        return samples


class DeviceSpectra:
    """Replaces `analyze`, `to_planes` and `to_wave` of a hybrid network.

    `supports` must accept the network. `analyze` already returns planes, so `to_planes` returns
    them unchanged.
    """

    def __init__(self, network: Hybrid, device: torch.device, *, complex_numbers: bool) -> None:
        self._size, self._hop = network.nfft, network.hop_length
        self._margin, self._planes = network.margin, network.config.planes
        self._transform = None if complex_numbers else PlaneTransform(self._size).to(device)
        self._window = hann(self._size, torch.float32, torch.device("cpu")).to(device)
        # The squared windows of four overlapping frames add up to 1.5: 4 times the mean of sin⁴.
        self._inverse_window = (self._window / 1.5).view(_HOPS_PER_FRAME, self._hop)

    def install(self, network: Hybrid) -> None:
        """Make `network` compute its spectra with these methods."""
        for name in ("analyze", "to_planes", "to_wave"):
            object.__setattr__(network, name, getattr(self, name))

    def analyze(self, mix: Tensor) -> Tensor:
        """Return the planes of the spectrum: (B, C, W) -> (B, P, F, T)."""
        hops = -(-mix.shape[-1] // self._hop)
        right = self._margin + hops * self._hop - mix.shape[-1]
        x = pad_reflect(mix, self._margin, right)
        # A centered transform has two more frames on each side, which the networks never see.
        missing = (hops + _HOPS_PER_FRAME - 1) * self._hop - x.shape[-1]
        x = F.pad(x, (0, missing), mode="reflect") if missing > 0 else x
        frames = x.unfold(-1, self._size, self._hop)[..., :hops, :] * self._window
        if self._transform is None:
            spectrum = torch.view_as_real(torch.fft.rfft(frames, norm="ortho"))[..., :-1, :]
        else:
            spectrum = self._transform.transform(frames)
        return spectrum.permute(0, 1, 4, 3, 2).flatten(1, 2)  # (B, C, T, F, 2) -> (B, P, F, T)

    @staticmethod
    def to_planes(planes: Tensor) -> Tensor:
        """Return the planes as they are."""
        return planes

    def to_wave(self, x: Tensor, normalizer: Normalizer, z: Any, length: int) -> Tensor:
        """Turn normalized planes (B, S*P, F, T) into samples (B, S, C, length); `z` is not used."""
        del z
        x = normalizer.denormalize(x.float().unflatten(1, (-1, self._planes)))
        spectrum = x.unflatten(2, (-1, 2)).permute(0, 1, 2, 5, 4, 3)  # (B, S, C, T, F, 2)
        if self._transform is None:
            frames = torch.fft.irfft(
                F.pad(torch.view_as_complex(spectrum.contiguous()), (0, 1)), norm="ortho"
            )
        else:
            frames = self._transform.invert(spectrum)
        return self._overlap_add(frames, length)

    def _overlap_add(self, frames: Tensor, length: int) -> Tensor:
        """Window the frames (..., T, N) and add them up where they overlap: (..., length)."""
        frames = frames.unflatten(-1, (_HOPS_PER_FRAME, self._hop))
        *other, count, _, _ = frames.shape
        sums = frames.new_zeros(*other, count + _HOPS_PER_FRAME - 1, self._hop)
        for index, window in enumerate(self._inverse_window):
            sums[..., index : index + count, :].addcmul_(frames[..., index, :], window)
        return sums.flatten(-2)[..., self._margin : self._margin + length]


def compute_without_complex(network: Hybrid, device: torch.device) -> Hybrid:
    """Return a copy of `network` that computes spectra on `device` without complex numbers.

    Returns `network` itself if `supports` does not accept it.
    """
    if not supports(network):
        return network
    fast = copy.copy(network)
    DeviceSpectra(fast, device, complex_numbers=False).install(fast)
    return fast
