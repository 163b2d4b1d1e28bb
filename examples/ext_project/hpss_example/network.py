"""Separate ridges along time from ridges along frequency.

Shapes: B batch, C channels, F bins, T frames, K taps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer import ModelMetadata


@dataclass(frozen=True)
class HpssParams:
    """A plain dataclass: the attributes that demucs-infer reads, and one of the network itself."""

    chunk_size: int
    output_stem_names: tuple[str, ...]
    num_taps: int = 17
    """Number of frames, and of bins, over which a ridge is averaged; odd."""

    def __post_init__(self) -> None:
        if self.num_taps % 2 == 0:
            raise ValueError(f"num_taps must be odd, got {self.num_taps}")

    @property
    def input_type(self) -> str:
        """What the network reads."""
        return "spectrogram"

    @property
    def output_type(self) -> str:
        """What the network returns."""
        return "spectrogram_mask"


class Hpss(nn.Module):
    """Compare means of the magnitudes along time and along frequency in each bin."""

    def __init__(self, params: HpssParams) -> None:
        super().__init__()
        self.names = params.output_stem_names
        self.along_time = nn.Parameter(torch.zeros(params.num_taps))
        self.along_bins = nn.Parameter(torch.zeros(params.num_taps))
        self.sharpness = nn.Parameter(torch.zeros(()))

    def forward(self, magnitude: Tensor) -> dict[str, Tensor]:
        """Return a mask (B C F T) for each stem of magnitudes (B C F T)."""
        half = len(self.along_time) // 2
        flat = magnitude.flatten(0, 1)[:, None]  # (B*C 1 F T)
        harmonic = F.conv2d(flat, self.along_time[None, None, None, :], padding=(0, half))
        percussive = F.conv2d(flat, self.along_bins[None, None, :, None], padding=(half, 0))
        logits = torch.stack([harmonic, percussive]).clamp_min(1e-8).log()
        masks = torch.softmax(self.sharpness * logits, dim=0).view(2, *magnitude.shape)
        return dict(zip(self.names, masks))


METADATA = ModelMetadata(model_type="hpss", params=HpssParams, model=Hpss)
