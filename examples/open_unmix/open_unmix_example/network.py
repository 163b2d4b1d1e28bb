"""Estimate, with one recurrent network per stem, the share of the stem in every bin.

Attribute names are those of the published weights.
Shapes: B batch, C channels, F bins, T frames, H hidden units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demucs_infer import ModelMetadata


@dataclass(frozen=True)
class OpenUnmixParams:
    """Sizes; the defaults are those of `umxhq`."""

    chunk_size: int
    output_stem_names: tuple[str, ...]
    num_bins: int = 2049
    max_bin: int = 1487
    """Number of bins that are read; higher bins are only written."""
    hidden_size: int = 512
    num_layers: int = 3
    is_causal: bool = False
    input_channels: int = 2

    @property
    def input_type(self) -> str:
        """What the network reads."""
        return "spectrogram"

    @property
    def output_type(self) -> str:
        """What the network returns."""
        return "spectrogram_mask"


class Target(nn.Module):
    """The network of one stem."""

    def __init__(self, params: OpenUnmixParams) -> None:
        super().__init__()
        hidden, channels = params.hidden_size, params.input_channels
        self.max_bin = params.max_bin
        self.input_mean = nn.Parameter(torch.zeros(params.max_bin))
        self.input_scale = nn.Parameter(torch.ones(params.max_bin))
        self.fc1 = nn.Linear(params.max_bin * channels, hidden, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.lstm = nn.LSTM(
            hidden,
            hidden if params.is_causal else hidden // 2,
            params.num_layers,
            bidirectional=not params.is_causal,
        )
        self.fc2 = nn.Linear(2 * hidden, hidden, bias=False)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.fc3 = nn.Linear(hidden, params.num_bins * channels, bias=False)
        self.bn3 = nn.BatchNorm1d(params.num_bins * channels)
        self.output_scale = nn.Parameter(torch.ones(params.num_bins))
        self.output_mean = nn.Parameter(torch.ones(params.num_bins))

    def forward(self, mix: Tensor) -> Tensor:
        """Return the mask (B C F T) of magnitudes (B C F T)."""
        batch, channels, bins, frames = mix.shape
        x = mix[:, :, : self.max_bin].permute(3, 0, 1, 2)  # (T B C F)
        x = (x + self.input_mean) * self.input_scale
        rows = torch.tanh(self.bn1(self.fc1(x.reshape(frames * batch, -1))))  # (T*B H)
        context, _ = self.lstm(rows.view(frames, batch, -1))
        rows = torch.cat([rows, context.flatten(0, 1)], dim=-1)  # (T*B 2H)
        rows = self.bn3(self.fc3(torch.relu(self.bn2(self.fc2(rows)))))
        mask = rows.view(frames, batch, channels, bins) * self.output_scale + self.output_mean
        return torch.relu(mask).permute(1, 2, 3, 0)


class OpenUnmix(nn.Module):
    """One independent network per stem."""

    def __init__(self, params: OpenUnmixParams) -> None:
        super().__init__()
        self.targets = nn.ModuleDict({name: Target(params) for name in params.output_stem_names})

    def forward(self, mix: Tensor) -> dict[str, Tensor]:
        """Return a mask (B C F T) for each stem of magnitudes (B C F T)."""
        return {name: target(mix) for name, target in self.targets.items()}


METADATA = ModelMetadata(model_type="open-unmix", params=OpenUnmixParams, model=OpenUnmix)
