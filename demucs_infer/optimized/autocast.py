"""Half the bits where a device does it by itself: spectra and statistics stay in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class AutocastNetwork(nn.Module):
    """A network whose products run in `dtype`; everything one asks it about is the network's.

    Autocast keeps norms and softmax in float32. A hybrid's spectrogram and its inverse stay
    outside: there are no complex numbers in half the bits.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = copy.copy(network)
        self.dtype = dtype
        inner = getattr(network, "estimate", None)
        if inner is not None:
            object.__setattr__(self.network, "estimate", self._reduced(inner))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, mix: Tensor, **kwargs: Any) -> Any:
        if "estimate" in self.network.__dict__:
            return self.network(mix, **kwargs)
        with torch.autocast(mix.device.type, self.dtype):
            return self.network(mix, **kwargs)

    def _reduced(self, estimate: Any) -> Any:
        def run(x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
            with torch.autocast(x.device.type, self.dtype):
                y, yt = estimate(x, xt)
            return y.float(), None if yt is None else yt.float()

        return run
