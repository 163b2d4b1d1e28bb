"""Run a network several times over each window, with different arguments each time.

Shapes: B batch, S stems, C channels, W samples of a window.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from demucs_infer.engine.network import Network, as_tensor


class QueryAdapter(nn.Module):
    """A network that runs once per query on every window, with the arguments of the query.

    Windows are cut once. `queries` maps the name of each query to its keyword arguments. The stem
    of a network with a single stem is named after the query, other stems are named `query_stem`.
    A query named "" keeps the names of the stems.
    """

    def __init__(self, network: nn.Module, queries: Mapping[str, Mapping[str, object]]) -> None:
        super().__init__()
        if not queries:
            raise ValueError("queries is empty: pass at least one query")
        adapted = cast(Network, network)
        self.network = network
        self.queries = {name: dict(arguments) for name, arguments in queries.items()}
        self.samplerate = adapted.samplerate
        self.audio_channels = adapted.audio_channels
        self.segment = adapted.segment
        self.sources = [
            _stem_name(query, stem, is_only=len(adapted.sources) == 1)
            for query in self.queries
            for stem in adapted.sources
        ]
        for name in ("valid_length", "use_train_segment"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(self, mix: Tensor) -> Tensor:
        """Return the stems of every query: (B, C, W) -> (B, S, C, W)."""
        stems = cast(Network, self.network).sources
        for arguments in self.queries.values():
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    # Stored, so that it is copied to the device once and not for every batch.
                    arguments[name] = value.to(mix.device)
        outputs = [self.network(mix, **arguments) for arguments in self.queries.values()]
        return torch.cat([as_tensor(output, stems) for output in outputs], dim=1)


def _stem_name(query: str, stem: str, *, is_only: bool) -> str:
    if not query:
        return stem
    return query if is_only else f"{query}_{stem}"
