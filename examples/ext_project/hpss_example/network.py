"""Part ridges along time from ridges along frequency.

Shapes: B batch, C channels, F bins, T frames, K taps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer import ModelMetadata


@dataclass(frozen=True)
class HpssParams:
    """Nothing is inherited; the names are those that demucs-infer looks for, and one of our own."""

    chunk_size: int
    output_stem_names: tuple[str, ...]
    num_taps: int = 17
    """Frames, and bins, over which a ridge is averaged; odd."""

    def __post_init__(self) -> None:
        if self.num_taps % 2 == 0:
            raise ValueError(f"num_taps = {self.num_taps} must be odd")

    @property
    def input_type(self) -> str:
        return "spectrogram"

    @property
    def output_type(self) -> str:
        return "spectrogram_mask"


class Hpss(nn.Module):
    """Two means of the magnitudes, along time and along frequency; the larger has the bin."""

    def __init__(self, params: HpssParams) -> None:
        super().__init__()
        self.names = params.output_stem_names
        self.along_time = nn.Parameter(torch.zeros(params.num_taps))
        self.along_bins = nn.Parameter(torch.zeros(params.num_taps))
        self.sharpness = nn.Parameter(torch.zeros(()))

    def forward(self, magnitude: Tensor) -> dict[str, Tensor]:
        """(B C F T) -> a mask (B C F T) for each stem."""
        half = len(self.along_time) // 2
        flat = magnitude.flatten(0, 1)[:, None]  # (B*C 1 F T)
        steady = F.conv2d(flat, self.along_time[None, None, None, :], padding=(0, half))
        struck = F.conv2d(flat, self.along_bins[None, None, :, None], padding=(half, 0))
        logits = torch.stack([steady, struck]).clamp_min(1e-8).log()
        masks = torch.softmax(self.sharpness * logits, dim=0).view(2, *magnitude.shape)
        return dict(zip(self.names, masks))


METADATA = ModelMetadata(model_type="hpss", params=HpssParams, model=Hpss)
