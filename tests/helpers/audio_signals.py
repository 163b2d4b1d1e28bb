"""Signals to separate: C channels, T samples."""

import torch
from torch import Tensor


def make_noise(channels: int, length: int, seed: int = 0) -> Tensor:
    """Return white noise (C T), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(channels, length, generator=generator)
