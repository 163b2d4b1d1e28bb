"""Synthesize a deterministic signal with the statistics of music: chords, bass, drums, stereo."""

import torch
from torch import Tensor

RATE = 44_100


def song(seconds: float, seed: int = 0) -> Tensor:
    """Synthesize stereo (C T) between -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    beat = time * 2 % 1
    root = 55 * 2 ** (torch.tensor([0, 5, 7, 3])[(time / 2).long() % 4] / 12)
    phase = 2 * torch.pi * torch.cumsum(root / RATE, 0)
    left, right = torch.zeros_like(time), torch.zeros_like(time)
    for harmonic in range(1, 24):
        wobble = torch.sin(2 * torch.pi * time * (0.1 + 0.05 * harmonic) + harmonic)
        partial = torch.sin(harmonic * phase) / harmonic
        left += (1 + 0.5 * wobble) * partial
        right += (1 - 0.5 * wobble) * partial
    hiss = torch.randn(2, len(time), generator=generator, dtype=torch.float64)
    drums = hiss * torch.exp(-20 * beat) + torch.sin(300 * torch.exp(-8 * beat)) * torch.exp(
        -6 * beat
    )
    mix = torch.stack([left, right]) * 0.12 + 0.2 * drums
    return (mix / mix.abs().max() * 0.9).float()
