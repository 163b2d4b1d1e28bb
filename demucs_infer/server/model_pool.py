"""The loaded models of one device; the least recently used is closed when memory runs short."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from demucs_infer.api import Separator
from demucs_infer.batch.request import ModelSpec
from demucs_infer.options import Request


@dataclass(slots=True, eq=False)
class ModelPool:
    """Separators by model, each loaded once; used from one thread."""

    device: str
    max_bytes: int
    on_load: Callable[[str, tuple[str, ...]], None]
    """Called with the name and the stems of every model that is loaded."""
    on_unload: Callable[[str], None]
    """Called with the name of every model that is closed."""

    _used_at: dict[ModelSpec, float] = field(default_factory=dict, init=False)
    _separators: "OrderedDict[ModelSpec, Separator]" = field(
        default_factory=OrderedDict, init=False
    )

    def get_separator(self, model: ModelSpec) -> Separator:
        """Return the separator of `model`; load it if necessary."""
        if model not in self._separators:
            separator = Separator(
                model.name,
                model.repo,
                device=self.device,
                cache_dir=model.cache_dir,
                offline=model.offline,
            )
            self._separators[model] = separator
            self.on_load(model.name, separator.stems)
        self._separators.move_to_end(model)
        self._used_at[model] = time.monotonic()
        self._evict()
        return self._separators[model]

    def configure(self, model: ModelSpec, request: Request) -> Separator:
        """Return the separator of `model`, set up for `request`.

        Raises `ValueError` if the model does not support the request.
        """
        separator = self.get_separator(model)
        separator.update_parameter(
            device=self.device, options=request.separation, stem_options=request.stems
        )
        return separator

    def warm_up(self, model: ModelSpec) -> None:
        """Load a model and run it once, so that the first request does not have to wait."""
        separator = self.get_separator(model)
        separator.run(torch.zeros(separator.audio_channels, separator.samplerate))

    def unload(self, model: ModelSpec) -> None:
        """Close a model, if it is loaded, and free its memory."""
        separator = self._separators.pop(model, None)
        if separator is None:
            return
        del self._used_at[model]
        separator.close()
        self.on_unload(model.name)

    def unload_idle(self, seconds: float) -> None:
        """Close the models that have not been used for the given time."""
        oldest = time.monotonic() - seconds
        for model in [model for model, used in self._used_at.items() if used <= oldest]:
            self.unload(model)

    def close(self) -> None:
        """Close every model."""
        for model in list(self._separators):
            self.unload(model)

    def _evict(self) -> None:
        sizes = {model: _count_bytes(opened) for model, opened in self._separators.items()}
        while len(self._separators) > 1 and sum(sizes.values()) > self.max_bytes:
            model = next(iter(self._separators))
            del sizes[model]
            self.unload(model)


def _count_bytes(separator: Separator) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in separator.model.parameters())
