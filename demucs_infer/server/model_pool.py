"""The networks in memory: each loaded once, the least recently used leaves when there are many."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from demucs_infer.api import Separator
from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.engine.stems import choose_stems


@dataclass(slots=True, eq=False)
class ModelPool:
    """Separators by model for one device; used from one thread."""

    device: str
    max_bytes: int
    on_load: Callable[[str, tuple[str, ...]], None]
    """Told the name and the stems of every model that comes."""
    _open: "OrderedDict[ModelSpec, Separator]" = field(default_factory=OrderedDict, init=False)

    def separator(self, model: ModelSpec) -> Separator:
        """The separator of `model`, loaded if it is not there."""
        if model not in self._open:
            separator = Separator(
                model.name,
                model.repo,
                device=self.device,
                cache_dir=model.cache_dir,
                offline=model.offline,
            )
            self._open[model] = separator
            self.on_load(model.name, separator.stems)
        self._open.move_to_end(model)
        self._make_room()
        return self._open[model]

    def ready(self, model: ModelSpec, order: SeparationRequest) -> Separator:
        """The same, told what the order asks for; a `ValueError` says what it cannot do."""
        separator = self.separator(model)
        plan = choose_stems(
            separator.model.sources,  # type: ignore[arg-type]  # every network has them
            stems=order.stems,
            derive=order.derive,
            two_stems=order.two_stems,
            other_method=order.other_method,
        )
        separator.update_parameter(
            shifts=order.shifts,
            overlap=order.overlap,
            split=order.split,
            segment=order.segment,
            seed=order.seed,
            precision=order.precision,
            batch_size=order.batch_size,
            stems=plan,
        )
        return separator

    def warm_up(self, model: ModelSpec) -> None:
        """Load a model and let it run once, so that the first request does not wait."""
        separator = self.separator(model)
        separator.run(torch.zeros(separator.audio_channels, separator.samplerate))

    def close(self) -> None:
        """Give all memory back."""
        while self._open:
            self._open.popitem()[1].close()

    @property
    def names(self) -> tuple[str, ...]:
        """The models in memory, the least recently used first."""
        return tuple(model.name for model in self._open)

    def _make_room(self) -> None:
        sizes = {model: _bytes(separator) for model, separator in self._open.items()}
        while len(self._open) > 1 and sum(sizes.values()) > self.max_bytes:
            model, separator = self._open.popitem(last=False)
            del sizes[model]
            separator.close()


def _bytes(separator: Separator) -> int:
    return sum(one.numel() * one.element_size() for one in separator.model.parameters())


def models_of(base: ModelSpec, names: tuple[str, ...]) -> dict[str, ModelSpec]:
    """One model for each name, all from the same place."""
    return {name: replace(base, name=name) for name in names}
