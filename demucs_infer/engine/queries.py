"""Run a network several times over each window, with different arguments each time.

Shapes: B batch, S stems, C channels, W samples of a window.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from demucs_infer.engine.network import ATTRIBUTES, as_tensor
from demucs_infer.errors import SeparationError


class QueryAdapter(nn.Module):
    """A network that runs once per query on every window, with the arguments of the query.

    Windows are cut once. `queries` maps the name of each query to its keyword arguments. The stem
    of a network with a single stem is named after the query, other stems are named `query_stem`.
    A query named "" keeps the names of the stems.
    """

    samplerate: int
    audio_channels: int
    segment: float

    def __init__(
        self,
        network: nn.Module,
        queries: Mapping[str, Mapping[str, object]],
        *,
        sources: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not queries:
            raise ValueError("queries is empty: pass at least one query")
        self.network = network
        self.queries = {name: dict(arguments) for name, arguments in queries.items()}
        self._stems: Sequence[str] | None = sources or getattr(network, "sources", None)
        for name in (*ATTRIBUTES, "valid_length", "use_train_segment"):
            if name != "sources" and hasattr(network, name):
                setattr(self, name, getattr(network, name))

    @property
    def sources(self) -> list[str]:
        """Names of the stems; those of a network without `sources` come with its first output."""
        stems = self._stems or ()
        return [
            _stem_name(query, stem, is_only=len(stems) == 1)
            for query in self.queries
            for stem in stems
        ]

    def forward(self, mix: Tensor) -> Tensor:
        """Return the stems of every query: (B, C, W) -> (B, S, C, W)."""
        for arguments in self.queries.values():
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    # Stored, so that it is copied to the device once and not for every batch.
                    arguments[name] = value.to(mix.device)
        outputs = [self.network(mix, **arguments) for arguments in self.queries.values()]
        if self._stems is None:
            if not isinstance(outputs[0], Mapping) or not outputs[0]:
                raise SeparationError(
                    f"{type(self.network).__name__} has no attribute `sources`, and returned "
                    f"{type(outputs[0]).__name__}, which does not name the stems: pass sources, "
                    "or return a dictionary by stem"
                )
            self._stems = tuple(outputs[0])
        stems = self._stems
        return torch.cat([as_tensor(output, stems) for output in outputs], dim=1)


def _stem_name(query: str, stem: str, *, is_only: bool) -> str:
    if not query:
        return stem
    return query if is_only else f"{query}_{stem}"
