"""Divide a stereo spectrogram among sources with a multichannel Wiener filter.

Used by the networks that estimate magnitudes instead of complex spectrograms. The filter is the
weighted expectation-maximization of Uhlich et al. (ICASSP 2017), in the variant of Nugraha et al.
(TASLP 2016) that Open-Unmix uses and those networks were trained with.

Shapes: B batch, S sources, C channels (c, d in sums), F bins, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demucs_infer.system.lazy import make_getattr

LEFT_OUT = dict.fromkeys(
    ("atan2", "expectation_maximization"),
    "it is a part of Open-Unmix (package openunmix); `wiener` here is the whole filter",
)
"""Names of upstream's module that this module leaves out, and why."""

__getattr__ = make_getattr(__name__, {}, LEFT_OUT)

_WINDOW_FRAMES = 300
"""Frames that share one estimate of a source's spatial covariance."""

_EPS = 1e-10
"""Power that is added to denominators, so that they are not 0."""
_MAX_MODULUS = 10.0
"""A mix with larger values is scaled down to this modulus, so that `_EPS` suits its level."""


def wiener(magnitudes: Tensor, mix: Tensor, iterations: int, residual: bool = False) -> Tensor:
    """Estimate complex sources from magnitudes (B, S, C, F, T) and complex mix (B, C, F, T).

    With `iterations` 0 every source gets the phase of the mix. With `residual`, the mix minus the
    sources takes part in the iterations as one more source, which is not returned.
    """
    sources = magnitudes.shape[1]
    windows = zip(
        magnitudes.split(_WINDOW_FRAMES, dim=-1), mix.split(_WINDOW_FRAMES, dim=-1), strict=True
    )
    filtered = [
        torch.stack(
            [_filter_window(*item, iterations, residual) for item in zip(*window, strict=True)]
        )
        for window in windows
    ]
    return torch.cat(filtered, dim=-1)[:, :sources]


def _filter_window(magnitudes: Tensor, mix: Tensor, iterations: int, residual: bool) -> Tensor:
    """Filter a window of one item: magnitudes (S, C, F, T) and mix (C, F, T) -> complex sources.

    The result is (S, C, F, T), or (S+1, C, F, T) if the residual takes part, as the last source.
    """
    # As in Open-Unmix and in the training, a bin that is exactly zero counts as 1 + 0j.
    mix = torch.where(mix == 0, torch.ones_like(mix), mix)
    if iterations == 0:  # the residual has no effect
        return magnitudes * torch.sgn(mix)
    dtype, mix = mix.dtype, mix.to(torch.complex128)  # a covariance is often close to singular
    sources = magnitudes * torch.sgn(mix)
    if residual:
        sources = torch.cat([sources, (mix - sources.sum(0))[None]])
    scale = (mix.abs().max() / _MAX_MODULUS).clamp(min=1.0)
    sources = _iterate_em(sources / scale, mix / scale, iterations) * scale
    return sources.to(dtype)


def _iterate_em(sources: Tensor, mix: Tensor, iterations: int) -> Tensor:
    """Alternate between estimating the spatial covariances and filtering the mix with them."""
    noise = _EPS**0.5 * torch.eye(mix.shape[0], dtype=mix.dtype, device=mix.device)
    target = mix.permute(1, 2, 0)[..., None]  # (F, T, C, 1)
    for _ in range(iterations):
        power = (sources.real**2 + sources.imag**2).mean(1)  # (S, F, T)
        spatial_covariance = torch.einsum("scft,sdft->sfcd", sources, sources.conj())
        spatial_covariance = spatial_covariance / (_EPS + power.sum(-1))[..., None, None]
        covariance = torch.einsum("sft,sfcd->ftcd", power.to(mix.dtype), spatial_covariance) + noise
        whitened = torch.linalg.solve(covariance, target)[..., 0]  # (F, T, C)
        sources = torch.einsum("sfcd,ftd->scft", spatial_covariance, whitened) * power[:, None]
    return sources
