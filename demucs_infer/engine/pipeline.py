"""From a track to its stems: level, plan, run, stitch, level, as one stream of blocks.

Shapes: S stems, C channels, T samples of the track, t of a block; `...` are recordings that
are separated side by side.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from demucs_infer.audio.channels import convert_channels
from demucs_infer.engine.blend import Blend
from demucs_infer.engine.level import Level, measure
from demucs_infer.engine.network import Ensemble
from demucs_infer.engine.plan import ChunkBatch
from demucs_infer.engine.run_config import RunConfig
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.stems import StemPlan, choose_stems
from demucs_infer.engine.stitch import TrackBuffer
from demucs_infer.events import (
    ChunkProcessed,
    ChunkStarted,
    Event,
    Position,
    Stage,
    TrackFailed,
    TrackFinished,
)
from demucs_infer.options import Options
from demucs_infer.system.malloc import keep_large_allocations


class Track(Protocol):
    """A recording at the rate of the networks, read from its beginning as often as asked.

    It may also have `length`, its number of samples; otherwise one pass counts them. With
    `level`, what `measure` said of it before, it is not read for that again. With `first`, the
    first sample that is wanted, only what that one and later ones depend on is run: the blocks
    begin there, and hold what they would without it.
    """

    @property
    def channels(self) -> int: ...
    def blocks(self) -> Iterator[Tensor]:
        """The samples in order, (C t) each, in blocks of any size."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorTrack:
    """A track that is in memory already: (C T), or (... C T) where several are to run as one."""

    samples: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.samples.ndim < 2 or not self.samples.is_floating_point():
            raise ValueError(
                "a track is a floating-point tensor (channels, samples), not "
                f"{self.samples.dtype} {tuple(self.samples.shape)}"
            )

    @property
    def channels(self) -> int:
        """C."""
        return self.samples.shape[-2]

    @property
    def length(self) -> int:
        """T."""
        return self.samples.shape[-1]

    def blocks(self) -> Iterator[Tensor]:
        """All of it, as one block."""
        yield self.samples.detach()


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Final samples: nothing will change them, and the next block begins where they end."""

    start: int
    stems: Tensor
    """(... S C t), in the order of the outputs that were asked for."""


TrackEvent: TypeAlias = Event | Block | TrackFailed | TrackFinished


_DEFAULT = Options()


def separate(
    track: Track,
    model: object,
    *,
    options: Options = _DEFAULT,
    stems: StemPlan | None = None,
    runner: Runner | None = None,
    announce: bool = False,
    pool: Executor | None = None,
) -> Generator[Event | Block, None, None]:
    """The stems of `track` as blocks in order, and what happens meanwhile as events.

    `model` is a network, or a bag of them (`models` and `weights`). Closing the generator ends
    the work within a batch, and gives the networks back as they were. `announce` adds a
    `ChunkStarted` before each batch. `pool` runs forwards when `options.workers` is not 0.
    """
    stream = separate_many(
        [track],
        model,
        options=options,
        stems=stems,
        runner=runner,
        announce=announce,
        pool=pool,
        max_tracks_per_batch=1,
    )
    with closing(stream):
        for _, item in stream:
            if isinstance(item, TrackFailed):
                raise item.error
            if not isinstance(item, TrackFinished):
                yield item


def separate_many(
    tracks: Iterable[Track | Exception],
    model: object,
    *,
    options: Options = _DEFAULT,
    stems: StemPlan | None = None,
    runner: Runner | None = None,
    announce: bool = False,
    pool: Executor | None = None,
    max_tracks_per_batch: int = 16,
) -> Generator[tuple[int, TrackEvent], None, None]:
    """As `separate` for one track after the other: (index of the track, item).

    What does not fill a batch waits for windows of the next tracks, so that many short ones fill
    batches; then the last blocks of a track may come after the first events of others. No more
    than `max_tracks_per_batch` tracks are open at any time; with 1, none waits for another. A track
    that cannot be read, or separated, ends with `TrackFailed`, and those that shared a batch with
    it go on; all others end with `TrackFinished`. An exception in place of a track is said in its
    turn.
    """
    if max_tracks_per_batch < 1:
        raise ValueError(
            f"together = {max_tracks_per_batch} must be at least 1: a track is with itself"
        )
    ensemble = Ensemble.of(model)
    stems = stems or choose_stems(ensemble.sources)
    runner = runner or Runner()
    setup = RunConfig(ensemble, options, stems, runner, announce)
    with ExitStack() as stack:
        if options.workers and pool is None:
            pool = stack.enter_context(ThreadPoolExecutor(options.workers))
        members = [ensemble.members[index] for index in setup.members]
        stack.enter_context(runner.lease(members))
        if runner.reuses_blocks(members, options):
            stack.enter_context(keep_large_allocations())
        orders = stack.enter_context(closing(_orders(tracks, setup)))
        has_packed_kernels = stack.enter_context(closing(_pack(orders, max_tracks_per_batch)))
        for item in stack.enter_context(closing(_run(has_packed_kernels, setup, pool))):
            if isinstance(item, tuple):
                yield item
                continue
            for answered in item:
                order = answered.order
                for event in [*answered.events, *order.job.accept(order, answered.answers)]:
                    yield order.job.index, event


@dataclass(frozen=True, slots=True, eq=False)
class _WindowRequest:
    """Windows that are cut and wait for their answers."""

    job: "_TrackState"
    number: int
    """Of the batches of its track, from 1."""
    batch: ChunkBatch
    windows: Tensor
    limit: int
    """Windows that may run together."""

    @property
    def key(self) -> tuple[int, torch.Size]:
        """Orders with the same key can run as one."""
        return self.batch.member, self.windows.shape[1:]


@dataclass(frozen=True, slots=True, eq=False)
class _WindowResponse:
    """An order that ran, what came back for it, and what happened meanwhile."""

    order: _WindowRequest
    answers: Tensor | Exception
    events: list[Event]


_Said = tuple[int, TrackEvent]


def _orders(
    tracks: Iterable[Track | Exception], setup: RunConfig
) -> Generator[_Said | _WindowRequest, None, None]:
    """Every window of every track, in the order in which they are to run."""
    for index, track in enumerate(tracks):
        if isinstance(track, Exception):
            yield index, TrackFailed(track)
            continue
        job = _TrackState(index, track, setup)
        try:
            for event in job.begin():
                yield index, event
            for order in job.orders():
                if setup.announce:
                    yield index, job.announcement(order)
                yield order
        except Exception as error:  # noqa: BLE001 (a track's trouble is its own)
            job.is_over = True
            yield index, TrackFailed(error)


def _pack(
    items: Iterable[_Said | _WindowRequest], max_tracks_per_batch: int
) -> Generator[_Said | list[_WindowRequest], None, None]:
    """Orders that fill a batch, from up to `max_tracks_per_batch` tracks in a row."""
    waiting: dict[tuple[int, torch.Size], list[_WindowRequest]] = {}
    for item in items:
        index = item[0] if isinstance(item, tuple) else item.job.index
        for key, pack in list(waiting.items()):
            if pack[0].job.index <= index - max_tracks_per_batch:
                yield waiting.pop(key)
        if isinstance(item, tuple):
            yield item
        elif max_tracks_per_batch == 1:
            yield [item]
        else:
            yield from _packed(waiting, item)
    yield from waiting.values()


def _packed(
    waiting: dict[tuple[int, torch.Size], list[_WindowRequest]], item: _WindowRequest
) -> Iterator[list[_WindowRequest]]:
    """Put `item` to what waits, and give out what may wait no longer for its sake."""
    # The chunks of a pass are stitched in order, so what comes before goes first.
    for key, pack in list(waiting.items()):
        same_pass = any(order.job is item.job for order in pack)
        too_many = sum(len(order.windows) for order in pack) + len(item.windows) > item.limit
        if key[0] == item.batch.member and (same_pass if key != item.key else too_many):
            yield waiting.pop(key)
    pack = waiting.setdefault(item.key, [])
    pack.append(item)
    if sum(len(order.windows) for order in pack) >= item.limit:
        yield waiting.pop(item.key)


def _run(
    has_packed_kernels: Iterable[_Said | list[_WindowRequest]],
    setup: RunConfig,
    pool: Executor | None,
) -> Generator[_Said | list[_WindowResponse], None, None]:
    """Answers to every pack in order, with up to `options.workers` of them in flight."""
    flying: deque[Future[list[_WindowResponse]]] = deque()
    try:
        for item in has_packed_kernels:
            if isinstance(item, tuple):
                yield item
            elif pool is None or not setup.options.workers:
                yield _asked(item, setup)
            else:
                flying.append(pool.submit(_asked, item, setup))
                if len(flying) > setup.options.workers:
                    yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        for future in flying:
            future.cancel()
        wait(flying)


def _asked(pack: list[_WindowRequest], setup: RunConfig) -> list[_WindowResponse]:
    """What the network says to each order; where it fails, the tracks are asked about apart."""
    member = pack[0].batch.member
    network, select = setup.ensemble.members[member], setup.select[member]
    windows = torch.cat([order.windows for order in pack])
    try:
        answers, events = setup.runner.answer(network, windows, select, setup.options)
    except Exception as error:  # noqa: BLE001 (a track's trouble is its own)
        if len(pack) == 1:
            return [_WindowResponse(pack[0], error, [])]
    else:
        parts = torch.split(answers, [len(order.windows) for order in pack])
        said = [events, *([] for _ in pack[1:])]  # what happened goes with the first
        return [_WindowResponse(*each) for each in zip(pack, parts, said, strict=True)]
    # Only here, where the frames of the failure are gone, is their memory free again.
    return [answered for order in pack for answered in _asked([order], setup)]


class _TrackState:
    """One track on its way: what is read of it, what is planned, what is stitched."""

    def __init__(self, index: int, track: Track, setup: RunConfig) -> None:
        self.index = index
        self.is_over = False
        self._track = track
        self._setup = setup
        self._level: Level | None = None  # as it is

    def begin(self) -> Iterator[Event]:
        """Take the level, and plan the work."""
        setup, track = self._setup, self._track
        if setup.options.normalize:
            yield Stage.Started("normalize")
            self._level = getattr(track, "level", None) or measure(track.blocks())
            length = self._level.length
            yield Stage.Completed("normalize")
        else:
            length = _length(track)
        if not length:
            raise ValueError("the track has no samples: there is nothing to separate")
        channels = setup.ensemble.audio_channels
        if channels == 1 and track.channels > 1:
            yield Stage.Started("downmix_to_mono")
            yield Stage.Completed("downmix_to_mono")
        blocks = (_with_channels(block, channels) for block in track.blocks())
        self._plan = setup.plan(length)
        first: int = getattr(track, "first", 0)
        self._num_done = self._plan.num_before(first)
        done = self._plan.batches[: self._num_done]
        self._samples_done = sum(len(chunk) for batch in done for _, chunk in batch.steps)
        self._tape = TrackBuffer(
            blocks, length, level=self._level, start=self._plan.reads_from(first)
        )
        self._mean = Blend(self._plan, setup, first)

    def orders(self) -> Iterator[_WindowRequest]:
        """The windows of this track, cut when they are asked for."""
        setup, plan = self._setup, self._plan
        batches, first = plan.batches[self._num_done :], self._num_done + 1
        reads = [min(chunk.read for _, chunk in batch.steps) for batch in batches]
        # A short chunk at the end reads further back than the one before it.
        keep = [*accumulate(reversed(reads), min)][::-1] + [plan.length]
        for number, (batch, needed) in enumerate(zip(batches, keep[1:]), start=first):
            if self.is_over:  # an earlier window failed
                return
            segment, stride = setup.segments[batch.member]
            pad = segment - stride
            windows = torch.stack(
                [self._tape.cut(chunk, setup.options.padding, pad) for _, chunk in batch.steps]
            )
            network = setup.ensemble.members[batch.member]
            limit = setup.runner.batch_size(network, batch.window, setup.options)
            if setup.stems.needs_mixture:
                needed = min(needed, self._mean.start)
            # Reflected samples lie up to one padding, and one sample, further back.
            self._tape.drop(needed - (0 if setup.options.padding == "constant" else pad + 1))
            yield _WindowRequest(self, number, batch, windows, limit)

    def announcement(self, order: _WindowRequest) -> ChunkStarted:
        """That `order` is about to run."""
        total = len(self._plan.batches)
        return ChunkStarted(order.number, total, self._positions(order.batch))

    def accept(self, order: _WindowRequest, answers: Tensor | Exception) -> Iterator[TrackEvent]:
        """Stitch `answers` (N ... S C W); what is final now, and what happened."""
        if self.is_over:
            return
        if isinstance(answers, Exception):
            self.is_over = True
            yield TrackFailed(answers)
            return
        for (index, chunk), answer in zip(order.batch.steps, answers, strict=True):
            self._mean.add(index, chunk, answer)
        self._num_done += 1
        self._samples_done += sum(len(chunk) for _, chunk in order.batch.steps)
        yield ChunkProcessed(
            self._num_done,
            len(self._plan.batches),
            self._positions(order.batch),
            self._samples_done / self._plan.num_samples,
            self._plan.length / self._setup.ensemble.samplerate,
        )
        is_last = self._num_done == len(self._plan.batches)
        if is_last:
            yield Stage.Started("stitch")
        yield from self._blocks()
        if is_last:
            self.is_over = True
            yield Stage.Completed("stitch")
            stages = ["collect_outputs", *(["derive_stems"] if self._setup.stems.rules else [])]
            for stage in stages:
                yield Stage.Started(stage)
                yield Stage.Completed(stage)
            yield TrackFinished()

    def _blocks(self) -> Iterator[Block]:
        start = self._mean.start
        stems = self._mean.take()
        if stems is None:
            return
        mixture = None
        if self._setup.stems.needs_mixture:
            mixture = self._tape.read(start, self._mean.start)
        stems = stems if self._level is None else self._level.restore(stems)
        stems = stems.to(self._tape.device)
        yield Block(start, self._setup.stems.derive(stems, mixture))

    def _positions(self, batch: ChunkBatch) -> tuple[Position, ...]:
        passes = self._plan.passes
        return tuple(passes[index].position(chunk) for index, chunk in batch.steps)


def _with_channels(block: Tensor, channels: int) -> Tensor:
    """Convert `block` (... C t) to as many channels as the networks take; drop none silently."""
    track_channels = block.shape[-2]
    if track_channels not in (1, channels) and channels != 1:
        raise ValueError(
            f"the track has {track_channels} channels and the networks take {channels}: "
            "convert it first"
        )
    return convert_channels(block, channels)


def _length(track: Track) -> int:
    length: int | None = getattr(track, "length", None)
    if length is None:
        return sum(block.shape[-1] for block in track.blocks())
    return length
