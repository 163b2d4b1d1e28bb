"""Run a network, or a bag of them, over a mix in memory: upstream's two names, on the engine.

Shapes: B recordings, S stems, C channels, T samples of the track.
"""

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, closing, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from demucs_infer.engine.network import Ensemble, Network, check_weights
from demucs_infer.engine.pipeline import Block, TensorTrack, separate
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.engine.runner import Runner
from demucs_infer.events import BatchSizeReduced, ChunkProcessed, Event, WarningEvent, call_back
from demucs_infer.options import Options

_logger = logging.getLogger(__name__)


class BagOfModels(nn.Module):
    """Networks with the same stems, whose answers are averaged with weights per stem.

    `weights` is one list of S numbers per network; None weighs all alike. `segment` (seconds)
    is that of every member that can run at it: a fixed network keeps its own if that is
    shorter. The networks given are left as they are; a member that runs at another segment
    is a shallow copy, which shares their weights.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[Sequence[float]] | None = None,
        segment: float | None = None,
    ) -> None:
        super().__init__()
        first = Ensemble(tuple(cast(Network, model) for model in models))
        self.sources = list(first.sources)
        self.samplerate = first.samplerate
        self.audio_channels = first.audio_channels
        if weights is None:
            weights = [[1.0] * len(self.sources) for _ in models]
        check_weights(weights, len(models), self.sources)
        self.weights = [list(member) for member in weights]
        self.models = nn.ModuleList([_at_segment(model, segment) for model in models])

    @property
    def max_allowed_segment(self) -> float:
        """The longest segment, in seconds, that all members can run at."""
        fixed = [
            float(cast(Network, model).segment)
            for model in self.models
            if hasattr(model, "use_train_segment")
        ]
        return min(fixed, default=float("inf"))

    def forward(self, mix: Tensor) -> Tensor:
        """Refuse: a bag has no answer for a single window."""
        raise NotImplementedError("a bag runs window by window: call apply_model(bag, mix)")


def _at_segment(model: nn.Module, segment: float | None) -> nn.Module:
    own = cast(Network, model).segment
    is_fixed = hasattr(model, "use_train_segment")
    if segment is None or segment == own or (is_fixed and segment > own):
        return model
    # Such a network pads to its own segment, so upstream's result needs the attribute changed.
    model = copy.copy(model)
    setattr(model, "segment", segment)  # noqa: B010 - assignment is typed as for a submodule
    return model


def apply_model(
    model: nn.Module,
    mix: Tensor,
    shifts: int = 1,
    split: bool = True,
    overlap: float = 0.25,
    transition_power: float = 1.0,
    progress: bool = False,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    segment: float | None = None,
    pool: Executor | None = None,
    lock: AbstractContextManager[object] | None = None,
    callback: Callable[[dict[str, object]], object] | None = None,
    callback_arg: Mapping[str, object] | None = None,
    *,
    seed: int | None = 0,
    batch_size: int = 1,
    model_kwargs: Mapping[str, object] | None = None,
) -> Tensor:
    """The stems of `mix`: (B C T) -> (B S C T), on the device of `mix`.

    As upstream's function of this name, and with its numbers. Shifts are drawn from `seed`, so
    that a result can be had again: `seed=k` gives what upstream gives after `random.seed(k)`,
    and `seed=None` draws from the global generator as upstream does. `device` is where the
    networks run (None: where `mix` is); they are given back as they were. `pool` runs the
    forwards, `lock` is held around `callback`, whose exceptions end the work.
    """
    _check_mix(model, mix)
    options = Options(
        shifts=shifts,
        split=split,
        overlap=overlap,
        transition_power=transition_power,
        segment_seconds=segment,
        seed=seed,
        batch_size=batch_size,
        workers=max(num_workers, 0 if pool is None else 1),
        normalize=False,
    )
    runner = Runner(mix.device if device is None else device)
    ensemble = _with_arguments(Ensemble.of(model), model_kwargs)
    stream: Iterator[Event | Block] = separate(
        TensorTrack(mix),
        ensemble,
        options=options,
        runner=runner,
        announce=callback is not None,
        pool=pool,
    )
    with closing(cast("Generator[Event | Block, None, None]", stream)):
        if callback is not None:
            told = _locked(callback, lock)
            members = len(ensemble.members)
            stream = call_back(stream, told, models=members, extra=callback_arg)
        if progress:
            stream = with_bar(stream)
        return _collect(stream, mix, len(ensemble.sources))


def _check_mix(model: nn.Module, mix: Tensor) -> None:
    channels = Ensemble.of(model).audio_channels
    if mix.ndim != 3 or mix.shape[1] != channels or not mix.shape[2]:
        raise ValueError(
            f"mix is {tuple(mix.shape)}, and must be (batch, {channels} channels, samples) "
            "with at least one sample"
        )


def _with_arguments(ensemble: Ensemble, arguments: Mapping[str, object] | None) -> Ensemble:
    if not arguments:
        return ensemble
    members = [
        QueryAdapter(cast(nn.Module, member), {"": arguments}) for member in ensemble.members
    ]
    return Ensemble(tuple(cast(Network, member) for member in members), ensemble.weights)


def _locked(
    callback: Callable[[dict[str, object]], object], lock: AbstractContextManager[object] | None
) -> Callable[[dict[str, object]], object]:
    def told(state: dict[str, object]) -> None:
        with lock or nullcontext():
            callback(state)

    return told


def with_bar(stream: Iterator[Event | Block]) -> Iterator[Event | Block]:
    """The same stream, shown on the way as seconds of the track."""
    from tqdm import tqdm  # only for those who ask for a bar

    shown = "{l_bar}{bar}| {n:.1f}/{total:.1f} seconds"
    with tqdm(total=0.0, ncols=120, bar_format=shown) as bar:  # the total comes with the events
        for item in stream:
            if isinstance(item, ChunkProcessed):
                bar.total = item.seconds_total
                bar.update(item.seconds_done - bar.n)
            yield item


def _collect(stream: Iterator[Event | Block], mix: Tensor, num_stems: int) -> Tensor:
    batch, channels, length = mix.shape
    out = torch.empty(batch, num_stems, channels, length, device=mix.device)
    for item in stream:
        if isinstance(item, Block):
            out[..., item.start : item.start + item.stems.shape[-1]] = item.stems
        elif isinstance(item, BatchSizeReduced | WarningEvent):
            _logger.warning("%s", item)
    return out
