"""Tiny networks: upstream's architectures, and networks whose output is easy to predict."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Constructor arguments that run in milliseconds; the classes are `HTDemucs`, `HDemucs`, `Demucs`.
TINY: dict[str, dict[str, Any]] = {
    "HTDemucs": {
        "sources": ["drums", "bass", "other", "vocals"],
        "channels": 8,
        "growth": 2,
        "nfft": 512,
        "depth": 3,
        "t_layers": 1,
        "t_hidden_scale": 1.0,
        "t_heads": 2,
        "segment": 1,
        "samplerate": 8000,
        "bottom_channels": 0,
    },
    "HDemucs": {
        "sources": ["drums", "bass", "other", "vocals"],
        "channels": 4,
        "growth": 2,
        "segment": 1,
        "norm_groups": 2,
    },
    "Demucs": {
        "sources": ["drums", "bass", "other", "vocals"],
        "channels": 4,
        "depth": 3,
        "samplerate": 8000,
        "segment": 1,
        "resample": False,
    },
}


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: scales start at 1e-4 in some, and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        fan = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator) / fan**0.5
        center = 0.7 if parameter.ndim == 1 and name.endswith(("weight", "scale")) else 0.0
        parameter.data = center + (0.2 if parameter.ndim == 1 else 1.0) * noise
    return network.eval()


class ScaleModel(nn.Module):
    """Return the mixture times a gain for each stem: an exact overlap-add returns just that."""

    def __init__(
        self,
        sources: Sequence[str] = ("drums", "bass"),
        gains: Sequence[float] = (0.25, 0.75),
        *,
        samplerate: int = 8000,
        audio_channels: int = 2,
        segment: float = 1.0,
    ) -> None:
        super().__init__()
        self.sources = list(sources)
        self.samplerate = samplerate
        self.audio_channels = audio_channels
        self.segment = segment
        self.gains = nn.Parameter(torch.tensor(gains), requires_grad=False)

    def forward(self, mix: Tensor) -> Tensor:
        return self.gains[:, None, None] * mix[:, None]


class RecordingModel(ScaleModel):
    """Record the shape of every input, and whether inference mode was on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[torch.Size] = []
        self.modes: list[bool] = []

    def forward(self, mix: Tensor) -> Tensor:
        self.seen.append(mix.shape)
        self.modes.append(torch.is_inference_mode_enabled())
        return super().forward(mix)


class OomModel(RecordingModel):
    """Run out of memory for every batch above `limit`."""

    def __init__(self, *args: Any, limit: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit
        self.tried: list[int] = []

    def forward(self, mix: Tensor) -> Tensor:
        self.tried.append(len(mix))
        if len(mix) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return super().forward(mix)


class DictModel(ScaleModel):
    """Return a dictionary by stem name, and record the query."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queries: list[object] = []

    def forward(self, mix: Tensor, *, query: object = None) -> dict[str, Tensor]:  # type: ignore[override]
        self.queries.append(query)
        return {name: gain * mix for name, gain in zip(self.sources, self.gains)}
