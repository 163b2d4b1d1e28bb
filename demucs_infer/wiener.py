"""Share a stereo spectrogram among sources by a multichannel Wiener filter.

Needed by the few networks that estimate magnitudes instead of complex spectrograms. The filter
is the weighted expectation-maximisation of Uhlich et al. (ICASSP 2017), in the variant of
Nugraha et al. (TASLP 2016) that Open-Unmix made popular and those networks were trained with.

Shapes: B batch, S sources, C channels (c, d in sums), F bins, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW_FRAMES = 300
"""Frames that share one estimate of where a source stands in the stereo image."""

_EPS = 1e-10
"""Power that is added wherever one divides by a power."""
_LOUDEST = 10.0
"""Largest modulus of a mix that goes into the iterations, which tells how much `_EPS` is."""


def wiener(magnitudes: Tensor, mix: Tensor, iterations: int, residual: bool = False) -> Tensor:
    """Complex sources: magnitudes (B S C F T), complex mix (B C F T) -> (B S C F T).

    `iterations` 0 gives every source the phase of the mix. With `residual`, what the sources
    leave of the mix takes part in the iterations as one more source (and is not returned).
    """
    sources = magnitudes.shape[1]
    windows = zip(
        magnitudes.split(_WINDOW_FRAMES, dim=-1), mix.split(_WINDOW_FRAMES, dim=-1), strict=True
    )
    shared = [
        torch.stack([_share(*item, iterations, residual) for item in zip(*window, strict=True)])
        for window in windows
    ]
    return torch.cat(shared, dim=-1)[:, :sources]


def _share(magnitudes: Tensor, mix: Tensor, iterations: int, residual: bool) -> Tensor:
    """One item, one window: magnitudes (S C F T), mix (C F T) -> (S C F T), S + 1 if iterated."""
    # Open-Unmix reads a bin that is exactly zero as 1 + 0j, and so did the training.
    mix = torch.where(mix == 0, torch.ones_like(mix), mix)
    if iterations == 0:  # the residual would have no say
        return magnitudes * torch.sgn(mix)
    single, mix = mix.dtype, mix.to(torch.complex128)  # a covariance is often close to singular
    sources = magnitudes * torch.sgn(mix)
    if residual:
        sources = torch.cat([sources, (mix - sources.sum(0))[None]])
    loudness = (mix.abs().max() / _LOUDEST).clamp(min=1.0)
    sources = _maximise_expectation(sources / loudness, mix / loudness, iterations) * loudness
    return sources.to(single)


def _maximise_expectation(sources: Tensor, mix: Tensor, iterations: int) -> Tensor:
    """Alternate between what the sources look like and what they then get of the mix."""
    noise = _EPS**0.5 * torch.eye(mix.shape[0], dtype=mix.dtype, device=mix.device)
    target = mix.permute(1, 2, 0)[..., None]  # (F T C 1)
    for _ in range(iterations):
        power = (sources.real**2 + sources.imag**2).mean(1)  # (S F T)
        image = torch.einsum("scft,sdft->sfcd", sources, sources.conj())
        image = image / (_EPS + power.sum(-1))[..., None, None]
        covariance = torch.einsum("sft,sfcd->ftcd", power.to(mix.dtype), image) + noise
        whitened = torch.linalg.solve(covariance, target)[..., 0]  # (F T C)
        sources = torch.einsum("sfcd,ftd->scft", image, whitened) * power[:, None]
    return sources
