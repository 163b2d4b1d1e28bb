"""Run a network several times over each window, with other arguments each time.

Shapes: B batch, S stems, C channels, W samples of a window.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from demucs_infer.engine.network import Network, as_tensor


class QueryAdapter(nn.Module):
    """A network asked several things about every window; each answer is a stem or several.

    `queries` are keyword arguments by name: the windows are cut once, and the network runs
    once per query. A network of one stem gives a stem called as the query is; one of several
    gives `query_stem` for each. The single query "" keeps the names, and is how plain keyword
    arguments are passed on.
    """

    def __init__(self, network: nn.Module, queries: Mapping[str, Mapping[str, object]]) -> None:
        super().__init__()
        if not queries:
            raise ValueError("queries is empty: name at least one")
        known = cast(Network, network)
        self.network = network
        self.queries = {name: dict(arguments) for name, arguments in queries.items()}
        self.samplerate = known.samplerate
        self.audio_channels = known.audio_channels
        self.segment = known.segment
        self.sources = [
            "_".join(filter(None, (query, *([] if query and len(known.sources) == 1 else [name]))))
            for query in self.queries
            for name in known.sources
        ]
        for name in ("valid_length", "use_train_segment"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(self, mix: Tensor) -> Tensor:
        """(B C W) -> (B S C W)."""
        names = cast(Network, self.network).sources
        for arguments in self.queries.values():
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    arguments[name] = value.to(mix.device)  # moved once, then found there
        answers = [self.network(mix, **arguments) for arguments in self.queries.values()]
        return torch.cat([as_tensor(answer, names) for answer in answers], dim=1)
