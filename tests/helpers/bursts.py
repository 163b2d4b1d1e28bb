"""Windows that half precision finds difficult: bursts in silence, and other extremes."""

import torch
from torch import Tensor

CRESTS = (14, 24, 34, 60)
"""Peak over root mean square of the bursts. Music has 4 to 10."""


def make_burst(crest: float, samples: int, channels: int = 2) -> Tensor:
    """Make a decaying burst of noise in silence with this crest factor: (C W)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(channels, samples, generator=generator).clamp(-3, 3) / 3
    noise[:, 0] = 1.0
    shortest, longest = 1, samples
    while True:
        length = (shortest + longest) // 2
        burst = noise[:, :length] * torch.exp(-torch.linspace(0, 6, length))
        rms = float((burst.double().square().sum() / (channels * samples)).sqrt())
        if longest - shortest <= 1:
            break
        shortest, longest = (length, longest) if 1 / rms > crest else (shortest, length)
    window = torch.zeros(channels, samples)
    start = min(samples // 3, samples - length)
    window[:, start : start + length] = burst
    return window * 0.9


def make_corpus(samples: int, channels: int = 2) -> dict[str, Tensor]:
    """Make the windows by name: (C W)."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(channels, samples, generator=generator)
    click = torch.zeros(channels, samples)
    click[:, samples // 2] = 1.0
    return {
        **{f"burst of crest {crest}": make_burst(crest, samples, channels) for crest in CRESTS},
        "click": click,
        "noise": 0.1 * noise,
        "full scale": noise.sign(),
        "very quiet": 1e-5 * noise,
        "DC": torch.full((channels, samples), 0.5),
        "silence": torch.zeros(channels, samples),
    }


def decibels(reference: Tensor, other: Tensor) -> float:
    """Return the ratio of `reference` to the error; 200 for equal tensors."""
    error = (reference - other).double().square().sum()
    if not error:
        return 200.0
    return float(10 * torch.log10(reference.double().square().sum().clamp_min(1e-30) / error))
