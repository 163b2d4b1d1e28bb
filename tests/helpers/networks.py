"""What the tests share: tiny networks, networks that misbehave, signals, missing tools.

Shapes: B batch, S stems, C channels, T samples of the track, W samples of a window.
"""

import importlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
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


def peak_kilobytes() -> int:
    """The highest memory of this process; `ru_maxrss` would begin with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def need(tool: str) -> str:
    """The path of a Debian tool; without it the test skips by name, and fails in CI."""
    path = shutil.which(tool)
    if path is None:
        if os.environ.get("DEMUCS_INFER_CI"):
            pytest.fail(f"{tool} is not installed, and CI promises it")
        pytest.skip(f"{tool} is not installed")
    return path


def need_module(name: str) -> Any:
    """A module to compare with; without it the test skips by name, and fails in CI."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("DEMUCS_INFER_CI"):
            pytest.fail(f"{name} cannot be imported, and CI promises it")
        pytest.skip(f"{name} is not installed")


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: scales start at 1e-4 in some, and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        fan = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator) / fan**0.5
        centre = 0.7 if parameter.ndim == 1 and name.endswith(("weight", "scale")) else 0.0
        parameter.data = centre + (0.2 if parameter.ndim == 1 else 1.0) * noise
    return network.eval()


def noise(channels: int, length: int, seed: int = 0) -> Tensor:
    """White noise (C T), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(channels, length, generator=generator)


class ScaleModel(nn.Module):
    """Each stem is the mix times a gain, so any exact overlap-add must return just that."""

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
    """Remembers what it was given, and whether it ran in inference mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[torch.Size] = []
        self.modes: list[bool] = []

    def forward(self, mix: Tensor) -> Tensor:
        self.seen.append(mix.shape)
        self.modes.append(torch.is_inference_mode_enabled())
        return super().forward(mix)


class OomModel(RecordingModel):
    """Runs out of memory for every batch above `limit`."""

    def __init__(self, *args: Any, limit: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit
        self.tried: list[int] = []

    def forward(self, mix: Tensor) -> Tensor:
        self.tried.append(len(mix))
        if len(mix) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return super().forward(mix)


class DictModel(ScaleModel):
    """Answers by stem name, and remembers the query it was asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queries: list[object] = []

    def forward(self, mix: Tensor, *, query: object = None) -> dict[str, Tensor]:  # type: ignore[override]
        self.queries.append(query)
        return {name: gain * mix for name, gain in zip(self.sources, self.gains)}
