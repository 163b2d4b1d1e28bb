"""Run a network in half precision through autocast, with spectra and statistics in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class AutocastNetwork(nn.Module):
    """A network that multiplies in `dtype`, with all attributes of the original network.

    Autocast keeps norms and softmax in float32. The spectrogram of a hybrid network and its inverse
    stay outside autocast, because half precision has no complex numbers.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = copy.copy(network)
        self.dtype = dtype
        estimate = getattr(network, "estimate", None)
        if estimate is not None:
            object.__setattr__(self.network, "estimate", self._wrap_estimate(estimate))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, mix: Tensor, **kwargs: Any) -> Any:
        """Run the network under autocast."""
        if "estimate" in self.network.__dict__:
            return self.network(mix, **kwargs)
        with torch.autocast(mix.device.type, self.dtype):
            return self.network(mix, **kwargs)

    def _wrap_estimate(self, estimate: Any) -> Any:
        def run(x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
            with torch.autocast(x.device.type, self.dtype):
                y, yt = estimate(x, xt)
            return y.float(), None if yt is None else yt.float()

        return run
