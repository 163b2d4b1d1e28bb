"""Run a network, or a bag of networks, on a mix in memory, with upstream's API.

Shapes: B recordings, S stems, C channels, T samples of the track.
"""

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.audio.channels import require_tensor
from demucs_infer.demucs import Demucs
from demucs_infer.devices import choose_device
from demucs_infer.engine.network import Ensemble, Network, check_weights
from demucs_infer.engine.pipeline import Block, TensorTrack, separate
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.engine.runner import Runner
from demucs_infer.events import BatchSizeReduced, ChunkProcessed, Event, WarningEvent, call_back
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.options import SeparationOptions
from demucs_infer.system.lazy import make_getattr
from demucs_infer.system.progress_bars import choose_bar_class
from demucs_infer.utils import DummyPoolExecutor

_logger = logging.getLogger(__name__)

Model: TypeAlias = Demucs | HDemucs | HTDemucs

__getattr__ = make_getattr(
    __name__,
    {"ThreadPoolExecutor": "concurrent.futures", "center_trim": "demucs_infer.utils"},
    aliases={"th": "torch", "tqdm": "tqdm"},
)


class BagOfModels(nn.Module):
    """A bag of networks with the same stems, whose outputs are averaged with weights per stem.

    `weights` has one list of S numbers per network; None gives all networks the same weight.
    `segment` (seconds) replaces the segment of every network, except that an HTDemucs keeps its own
    segment if that is shorter. The networks passed are not changed: one that gets another segment
    is copied, and shares its weights with the copy.

    `stems` are the stems of the bag, if its networks have different ones. Each network must then
    have the weight 0 for the stems that it lacks, and runs with its own settings. `combine` is
    "mean" or "median" of samples, or "min" or "max" of the magnitudes of their spectra.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[Sequence[float]] | None = None,
        segment: float | None = None,
        *,
        stems: Sequence[str] | None = None,
        combine: str = "mean",
    ) -> None:
        super().__init__()
        by_name = None if stems is None else tuple(stems)
        members = tuple(cast(Network, model) for model in models)
        first = Ensemble(members, stems=by_name, combine=combine)
        self.sources = list(first.sources)
        self.stems_by_name = by_name
        self.combine = combine
        self.samplerate = first.samplerate
        self.audio_channels = first.audio_channels
        if weights is None:
            weights = [[float(stem in m.sources) for stem in self.sources] for m in members]
        check_weights(weights, len(models), self.sources)
        for member, row in zip(members, weights):
            for stem, weight in zip(self.sources, row):
                if weight and stem not in member.sources:
                    raise ValueError(
                        f"a network has the weight {weight} for {stem!r}, which it does not "
                        f"separate (its stems: {', '.join(member.sources)}): use 0"
                    )
        self.weights = [list(member) for member in weights]
        self.models = nn.ModuleList([_at_segment(model, segment) for model in models])

    @property
    def max_allowed_segment(self) -> float:
        """Longest segment, in seconds, that all members can run at."""
        fixed = [
            float(cast(Network, model).segment)
            for model in self.models
            if hasattr(model, "use_train_segment")
        ]
        return min(fixed, default=float("inf"))

    def forward(self, mix: Tensor) -> Tensor:
        """Raise `NotImplementedError`: a bag has no output for a single window."""
        raise NotImplementedError("a bag runs window by window: call apply_model(bag, mix)")


AnyModel: TypeAlias = Model | BagOfModels


def _at_segment(model: nn.Module, segment: float | None) -> nn.Module:
    current = cast(Network, model).segment
    is_fixed = hasattr(model, "use_train_segment")
    if segment is None or segment == current or (is_fixed and segment > current):
        return model
    # An HTDemucs pads its input to its own segment, so the engine cannot change it by an option.
    model = copy.copy(model)
    setattr(model, "segment", segment)  # noqa: B010 - assignment is typed as for a submodule
    return model


class TensorChunk:
    """A range of the last axis of a tensor, with access to the samples around it."""

    def __init__(
        self, tensor: "Tensor | TensorChunk", offset: int = 0, length: int | None = None
    ) -> None:
        available = tensor.shape[-1] - offset
        if offset < 0 or available <= 0:
            raise ValueError(f"{offset = } must be one of the {tensor.shape[-1]} samples")
        self.tensor: Tensor = tensor.tensor if isinstance(tensor, TensorChunk) else tensor
        self.offset: int = offset + (tensor.offset if isinstance(tensor, TensorChunk) else 0)
        self.length = available if length is None else min(available, length)
        self.device: torch.device = tensor.device

    @property
    def shape(self) -> list[int]:
        """Shape of the chunk."""
        return [*self.tensor.shape[:-1], self.length]

    def padded(self, target_length: int) -> Tensor:
        """Return `target_length` samples with the chunk in the middle.

        The samples around it are those of the whole tensor, and zeros beyond its ends.
        """
        if target_length < self.length:
            raise ValueError(f"{target_length = } must be at least {self.length}")
        start = self.offset - (target_length - self.length) // 2
        stop = start + target_length
        left, right = max(0, -start), max(0, stop - self.tensor.shape[-1])
        return F.pad(self.tensor[..., start + left : stop - right], (left, right))

    def around(self, reach: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the samples before and after the chunk, at most `reach` on each side."""
        stop = self.offset + self.length
        first = 0 if reach is None else max(0, self.offset - reach)
        last = self.tensor.shape[-1] if reach is None else stop + reach
        return self.tensor[..., first : self.offset], self.tensor[..., stop:last]


def tensor_chunk(tensor_or_chunk: Tensor | TensorChunk) -> TensorChunk:
    """Return a chunk unchanged, or a tensor as one chunk."""
    if isinstance(tensor_or_chunk, TensorChunk):
        return tensor_or_chunk
    return TensorChunk(tensor_or_chunk)


def apply_model(
    model: nn.Module,
    mix: Tensor | TensorChunk,
    shifts: int = 1,
    split: bool = True,
    overlap: float = 0.25,
    transition_power: float = 1.0,
    progress: bool = False,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    segment: float | None = None,
    pool: Executor | DummyPoolExecutor | None = None,
    lock: AbstractContextManager[object] | None = None,
    callback: Callable[[dict[str, object]], object] | None = None,
    callback_arg: Mapping[str, object] | None = None,
    *,
    seed: int | None = 0,
    batch_size: int = 1,
    model_kwargs: Mapping[str, object] | None = None,
) -> Tensor:
    """Separate `mix`: (B, C, T) -> (B, S, C, T), on the device of `mix`.

    The signature and the results are those of upstream's function. Shifts are drawn from `seed`:
    `seed=k` gives the same as upstream after `random.seed(k)`, and `seed=None` draws from the
    global generator, as upstream does. The networks run on `device` (None: that of `mix`), and are
    moved back afterwards. `pool` runs their forward passes. `lock` is held while `callback` is
    called; an exception in it stops the separation. If `mix` is a `TensorChunk`, windows at its
    ends read the samples around it: half a second with `shifts`, as with upstream.

    Raises `ValueError` for a mix of another shape or an unknown device, and `ConfigError` for a
    device that is not available.
    """
    around = None
    if isinstance(mix, TensorChunk):
        reach = int(0.5 * Ensemble.from_model(model).samplerate) if shifts else None
        around = mix.around(reach)
        mix = mix.padded(mix.length)
    require_tensor(mix)
    if isinstance(pool, DummyPoolExecutor):
        pool = None
    _check_mix(model, mix)
    options = SeparationOptions(
        shifts=shifts,
        split=split,
        overlap=overlap,
        transition_power=transition_power,
        segment=segment,
        seed=seed,
        batch_size=batch_size,
        jobs=max(num_workers, 0 if pool is None else 1),
        normalize=False,
    )
    runner = Runner(mix.device if device is None else choose_device(device))
    ensemble = _with_arguments(Ensemble.from_model(model), model_kwargs)
    stream: Iterator[Event | Block] = separate(
        TensorTrack(mix, around),
        ensemble,
        options=options,
        runner=runner,
        announce=callback is not None,
        pool=pool,
    )
    with closing(cast("Generator[Event | Block, None, None]", stream)):
        if callback is not None:
            call_locked = _with_lock(callback, lock)
            members = len(ensemble.members)
            stream = call_back(stream, call_locked, models=members, extra=callback_arg)
        if progress:
            stream = with_bar(stream)
        return _collect(stream, mix, len(ensemble.sources))


def _check_mix(model: nn.Module, mix: Tensor) -> None:
    channels = Ensemble.from_model(model).audio_channels
    if mix.ndim != 3 or mix.shape[1] != channels or not mix.shape[2]:
        raise ValueError(
            f"mix must be (batch, {channels} channels, samples) with at least one sample, "
            f"got {tuple(mix.shape)}"
        )


def _with_arguments(ensemble: Ensemble, arguments: Mapping[str, object] | None) -> Ensemble:
    if not arguments:
        return ensemble
    members = [
        QueryAdapter(cast(nn.Module, member), {"": arguments}) for member in ensemble.members
    ]
    return replace(ensemble, members=tuple(cast(Network, member) for member in members))


def _with_lock(
    callback: Callable[[dict[str, object]], object], lock: AbstractContextManager[object] | None
) -> Callable[[dict[str, object]], object]:
    def call_locked(state: dict[str, object]) -> None:
        with lock or nullcontext():
            callback(state)

    return call_locked


def with_bar(stream: Iterator[Event | Block]) -> Iterator[Event | Block]:
    """Yield the items of `stream`, and show a progress bar in seconds on the error stream.

    Some programs replace `tqdm.tqdm`, or `tqdm` in this module, to observe progress. As with
    upstream, it is therefore looked up for every track, and iterates over the windows. In a
    notebook, the bar is a widget if ipywidgets is installed.
    """
    from demucs_infer.apply import tqdm  # this module's, which is imported if a bar is shown

    bar: Generator[None, float, None] | None = None
    try:
        for item in stream:
            if isinstance(item, ChunkProcessed):
                if bar is None:
                    bar_class = choose_bar_class(tqdm)
                    is_widget = bar_class is not tqdm.tqdm
                    bar = _move_widget(bar_class, item) if is_widget else _move_bar(bar_class, item)
                    next(bar)
                bar.send(item.seconds_done)
            yield item
    finally:
        if bar is not None:  # leaves it as it stands
            bar.close()


def _move_bar(bar_class: Any, first: ChunkProcessed) -> Generator[None, float, None]:
    """Move a bar by a window whenever the seconds that are done are sent."""
    seconds = first.seconds_total / first.total_batches
    bar = bar_class(range(first.total_batches), unit_scale=seconds, unit="seconds", ncols=120)
    windows = iter(bar)
    next(windows, None)
    try:
        while True:
            yield
            next(windows, None)  # the bar counts a window when the next one is asked for
    finally:
        if isinstance(windows, Generator):
            windows.close()


def _move_widget(bar_class: Any, first: ChunkProcessed) -> Generator[None, float, None]:
    """Move a widget to the seconds that are sent: it would scale its total only, not its value."""
    style = "{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} seconds [{elapsed}<{remaining}]"
    with bar_class(total=first.seconds_total, bar_format=style) as bar:
        while True:
            bar.n = yield  # `update` adds, and the sum of differences may miss the total
            bar.refresh()


def _collect(stream: Iterator[Event | Block], mix: Tensor, num_stems: int) -> Tensor:
    batch, channels, length = mix.shape
    out = torch.empty(batch, num_stems, channels, length, device=mix.device)
    for item in stream:
        if isinstance(item, Block):
            out[..., item.start : item.start + item.stems.shape[-1]] = item.stems
        elif isinstance(item, BatchSizeReduced | WarningEvent):
            _logger.warning("%s", item)
    return out
