"""The loaded models of one device; the least recently used is closed when memory runs short."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch

from demucs_infer.api import Separator, share_networks
from demucs_infer.batch.custom_model import CustomModelSpec
from demucs_infer.batch.request import ModelSpec
from demucs_infer.engine.window_pool import WindowPool
from demucs_infer.options import Request, StemOptions


@dataclass(slots=True, eq=False)
class _Entry:
    """A model that is loaded, or being loaded."""

    loading: Lock = field(default_factory=Lock)
    """Held while the model is being loaded."""
    separator: Separator | None = None
    users: int = 0
    used_at: float = 0.0
    is_unwanted: bool = False
    """Whether it is to be closed once nothing uses it."""


@dataclass(slots=True, eq=False)
class ModelPool:
    """Separators by model, each loaded once, for any number of threads."""

    device: str
    max_bytes: int
    on_load: Callable[[str, tuple[str, ...]], None]
    """Called with the name of every model that is loaded, and the stems that it computes."""
    on_unload: Callable[[str], None]
    """Called with the name of every model that is closed."""

    windows: WindowPool = field(default_factory=WindowPool)
    """Runs the windows of all tracks."""

    _entries: "OrderedDict[ModelSpec, _Entry]" = field(default_factory=OrderedDict, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    @contextmanager
    def open(self, model: ModelSpec, request: Request, client: str) -> Iterator[Separator]:
        """Yield a separator for a track of `client`; load the model if necessary.

        Raises `ValueError` if the model does not support the request.
        """
        with self._use(model) as separator, self.windows.open_queue(client) as queue:
            yield share_networks(separator, queue, request.separation, request.stems)

    def load(self, model: ModelSpec) -> None:
        """Load a model, if it is not loaded."""
        with self._use(model):
            pass

    def warm_up(self, model: ModelSpec) -> None:
        """Load a model and run it once, so that the first request does not have to wait."""
        with self._use(model) as separator:
            separator.run(torch.zeros(separator.audio_channels, separator.samplerate))

    def unload(self, model: ModelSpec) -> None:
        """Close a model, once no track uses it; a track that needs it first keeps it loaded."""
        with self._lock:
            if model in self._entries:
                self._entries[model].is_unwanted = True
        self._close_unwanted()

    def is_unloading(self, model: ModelSpec) -> bool:
        """Whether a model is still used, and is closed after that."""
        with self._lock:
            return model in self._entries and self._entries[model].is_unwanted

    def unload_idle(self, seconds: float) -> None:
        """Close the models that have not been used for the given time."""
        oldest = time.monotonic() - seconds
        with self._lock:
            for entry in self._entries.values():
                entry.is_unwanted |= not entry.users and entry.used_at <= oldest
        self._close_unwanted()

    def close(self) -> None:
        """End the threads, and close every model."""
        self.windows.close()
        for model in list(self._entries):
            self.unload(model)

    @contextmanager
    def _use(self, model: ModelSpec) -> Iterator[Separator]:
        with self._lock:
            entry = self._entries.setdefault(model, _Entry())
            entry.users += 1
            entry.is_unwanted = False
            self._entries.move_to_end(model)
        try:
            with entry.loading:  # other models can be used meanwhile
                if entry.separator is None:
                    entry.separator = self._load(model)
            self._evict()
            yield entry.separator
        finally:
            with self._lock:
                entry.users -= 1
                entry.used_at = time.monotonic()
                entry.is_unwanted |= entry.separator is None
            self._close_unwanted()

    def _load(self, model: ModelSpec) -> Separator:
        if isinstance(model, CustomModelSpec):
            separator = Separator.from_pretrained(
                config=model.config,
                checkpoint=model.checkpoint,
                stem_options=StemOptions(),  # those of the file are in each request
                device=self.device,
            )
        else:
            separator = Separator(
                model.name,
                model.repo,
                device=self.device,
                cache_dir=model.cache_dir,
                offline=model.offline,
            )
        self.on_load(model.name, separator.stems)
        return separator

    def _evict(self) -> None:
        """Close the models that were not used for longest, if all take too much memory."""
        with self._lock:
            sizes = {model: _count_bytes(entry.separator) for model, entry in self._entries.items()}
            for model, entry in list(self._entries.items())[:-1]:
                if sum(sizes.values()) <= self.max_bytes:
                    break
                if not entry.users:
                    del sizes[model]
                    entry.is_unwanted = True
        self._close_unwanted()

    def _close_unwanted(self) -> None:
        with self._lock:
            unwanted = [
                model
                for model, entry in self._entries.items()
                if entry.is_unwanted and not entry.users
            ]
            entries = [(model, self._entries.pop(model)) for model in unwanted]
        for model, entry in entries:
            if entry.separator is not None:
                entry.separator.close()
                self.on_unload(model.name)


def _count_bytes(separator: Separator | None) -> int:
    if separator is None:
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in separator.model.parameters())
