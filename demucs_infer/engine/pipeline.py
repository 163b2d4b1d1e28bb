"""Separate tracks: level, plan, run, stitch and restore the level, as one stream of blocks.

Every stage is a generator that pulls from the one before it: `_requests` cuts windows,
`_batch_across_tracks` groups them, `_run_groups` runs the network, and `_TrackState.accept`
stitches. So memory is bounded by the batches that run, and closing the last generator stops all.

Shapes: S stems, C channels, T samples of the track, t of a block, W of a window; `...` any
leading axes, for recordings that are separated together.
"""

from collections import deque
from collections.abc import Generator, Hashable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from demucs_infer.audio.channels import convert_channels
from demucs_infer.engine.blend import Blend
from demucs_infer.engine.device_track import (
    DeviceTrack,
    download,
    runs_beside_cpu,
    share_queue,
)
from demucs_infer.engine.gate import Gate, find_first
from demucs_infer.engine.level import Level, measure
from demucs_infer.engine.network import Ensemble
from demucs_infer.engine.plan import ChunkBatch
from demucs_infer.engine.run_config import RunConfig
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.stems import StemPlan, choose_stems
from demucs_infer.engine.stitch import TrackBuffer
from demucs_infer.engine.window_pool import WindowQueue, WindowTask
from demucs_infer.events import (
    ChunkProcessed,
    ChunkStarted,
    Event,
    Position,
    Stage,
    TrackFailed,
    TrackFinished,
)
from demucs_infer.options import SeparationOptions
from demucs_infer.system.arena import use_arenas
from demucs_infer.system.malloc import keep_large_allocations, return_free_memory
from demucs_infer.system.threads import compute_in_one_thread, limit_threads, use_threads


class Track(Protocol):
    """A recording at the sample rate of the networks, which can be read more than once.

    Optional attributes: `length`, the number of samples, otherwise counted by reading the track
    once; `level`, an earlier result of `measure`, which saves that reading too; `first`, the first
    sample to separate: the stems begin there, are the same as in a full run, and only the windows
    that they depend on are run; `around`, the samples before and after the track that windows read
    instead of silence.
    """

    @property
    def channels(self) -> int:
        """Number of channels."""

    def blocks(self) -> Iterator[Tensor]:
        """Return the samples in order, as blocks (C, t) of any length."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorTrack:
    """A track in memory: (C, T), or (..., C, T) to separate several recordings together."""

    samples: Tensor = field(repr=False)
    around: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.samples.ndim < 2 or not self.samples.is_floating_point():
            raise ValueError(
                "a track must be a floating-point tensor (channels, samples), got "
                f"{self.samples.dtype} {tuple(self.samples.shape)}"
            )

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.samples.shape[-2]

    @property
    def length(self) -> int:
        """Number of samples."""
        return self.samples.shape[-1]

    def blocks(self) -> Iterator[Tensor]:
        """Yield all samples as one block."""
        yield self.samples.detach()


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Final samples of all stems from sample `start` on; the next block follows directly."""

    start: int
    stems: Tensor
    """(..., S, C, t), in the order of the requested outputs."""


TrackEvent: TypeAlias = Event | Block | TrackFailed | TrackFinished


_DEFAULT = SeparationOptions()

_BATCHES_PER_TRIM = 4
"""Batches that run side by side before free memory is returned to the system: their allocations
interleave, and leave more holes with every batch. More often would clear too many pages anew."""


def separate(
    track: Track,
    model: object,
    *,
    options: SeparationOptions = _DEFAULT,
    stems: StemPlan | None = None,
    runner: Runner | None = None,
    announce: bool = False,
    pool: Executor | None = None,
) -> Generator[Event | Block, None, None]:
    """Separate `track`: yield the stems as blocks in order, and progress as events.

    `model` is a network, or a bag of networks (`models` and `weights`). Closing the generator stops
    within a batch and restores the networks. With `announce`, a `ChunkStarted` precedes each batch.
    If `options.jobs` is not 0, the networks run in the threads of `pool`, or without it in threads
    that end with the stream; `choose_parallelism` decides how many.
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
    options: SeparationOptions = _DEFAULT,
    stems: StemPlan | None = None,
    runner: Runner | None = None,
    announce: bool = False,
    pool: Executor | None = None,
    windows: WindowQueue | None = None,
    max_tracks_per_batch: int = 16,
) -> Generator[tuple[int, TrackEvent], None, None]:
    """Separate several tracks like `separate`: yield (index of the track, item).

    Short tracks share batches: windows that do not fill a batch wait for windows of the next
    tracks, so the last blocks of a track may come after the first events of others. A batch has
    windows of at most `max_tracks_per_batch` consecutive tracks; with 1, no track waits.

    Every track ends with `TrackFinished`, or with `TrackFailed` if it cannot be read or
    separated; tracks that shared a batch with a failed one go on. An exception in `tracks` is
    reported as `TrackFailed` at its position.

    With `windows`, the networks run in the threads of its pool, in turn with other streams.
    """
    if max_tracks_per_batch < 1:
        raise ValueError(f"{max_tracks_per_batch = } must be 1 or more")
    ensemble = Ensemble.from_model(model)
    stems = stems or choose_stems(ensemble.sources)
    runner = runner or Runner()
    config = RunConfig(ensemble, options, stems, runner, announce)
    # Closed in reverse order, also when the consumer closes or drops this generator: running
    # batches end first, then the networks are restored, then the pool is shut down.
    with ExitStack() as stack:
        run_on: Executor | WindowQueue | None = windows or pool
        if windows is None and (not options.jobs or pool is None):
            run_on = stack.enter_context(_open_pool(config))
        members = [ensemble.members[index] for index in config.members]
        stack.enter_context(runner.lease(members))
        keeps_allocations = runner.should_keep_allocations(members, options)
        if keeps_allocations:
            stack.enter_context(keep_large_allocations())
            stack.enter_context(use_arenas())
        requests = stack.enter_context(closing(_requests(tracks, config)))
        groups = stack.enter_context(closing(_batch_across_tracks(requests, max_tracks_per_batch)))
        background = config.parallelism.windows
        if max_tracks_per_batch > 1 and _keeps_track_on_device(config):
            background = _count_in_flight(config)
        if runner.num_devices > 1:
            background = max(background, runner.num_devices)
        max_tracks = max_tracks_per_batch + background
        items = stack.enter_context(closing(_run_groups(groups, config, run_on, max_tracks)))
        leaves_holes = keeps_allocations and config.parallelism.windows > 1
        events = _stitch(_return_holes(items) if leaves_holes else items)
        if config.device.type == "cpu" and run_on is not None:
            # The cores belong to the windows. A second thread would wait actively after each step.
            events = compute_in_one_thread(events)
        yield from stack.enter_context(closing(events))


@dataclass(frozen=True, slots=True, eq=False)
class _WindowRequest:
    """Windows of one track that form a batch for one network."""

    track: "_TrackState"
    number: int
    """Number of the batch within its track, from 1."""
    batch: ChunkBatch
    windows: Tensor
    limit: int
    """Largest number of windows that may run together."""

    @property
    def key(self) -> tuple[int, torch.Size]:
        """Network and shape of the windows: requests with equal keys can run as one batch."""
        return self.batch.member, self.windows.shape[1:]


@dataclass(frozen=True, slots=True, eq=False)
class _WindowResponse:
    """Output of the network for a request, or its error, and the events of the run."""

    request: _WindowRequest
    output: Tensor | Exception
    events: list[Event]


_Indexed = tuple[int, TrackEvent]


def _requests(
    tracks: Iterable[Track | Exception], config: RunConfig
) -> Generator[_Indexed | _WindowRequest, None, None]:
    """Yield the windows of all tracks in the order in which they are to run."""
    for index, track in enumerate(tracks):
        if isinstance(track, Exception):
            yield index, TrackFailed(track)
            continue
        state = _TrackState(index, track, config)
        try:
            for event in state.begin():
                yield index, event
            for request in state.requests():
                if config.announce:
                    yield index, state.announce(request)
                yield request
        except Exception as error:  # noqa: BLE001 (a bad track must not stop the others)
            # Windows of this track may still be running: their results are dropped.
            state.is_over = True
            yield index, TrackFailed(error)


def _batch_across_tracks(
    items: Iterable[_Indexed | _WindowRequest], max_tracks_per_batch: int
) -> Generator[_Indexed | list[_WindowRequest], None, None]:
    """Group requests into full batches, from up to `max_tracks_per_batch` consecutive tracks.

    Events are passed on at once, so they may overtake windows that wait for a full batch.
    """
    waiting: dict[tuple[int, torch.Size], list[_WindowRequest]] = {}
    for item in items:
        index = item[0] if isinstance(item, tuple) else item.track.index
        # A window of an unusual size may never fill a batch: run it before too many tracks wait.
        for key, group in list(waiting.items()):
            if group[0].track.index <= index - max_tracks_per_batch:
                yield waiting.pop(key)
        if isinstance(item, tuple):
            yield item
        elif max_tracks_per_batch == 1:
            yield [item]
        else:
            yield from _add_to_group(waiting, item)
    yield from waiting.values()


def _add_to_group(
    waiting: dict[tuple[int, torch.Size], list[_WindowRequest]], request: _WindowRequest
) -> Iterator[list[_WindowRequest]]:
    """Add `request` to the waiting groups, and yield the groups that must run now."""
    # The chunks of a pass are stitched in order: a group with earlier windows of the same track
    # and network, but of another size, must run first.
    for key, group in list(waiting.items()):
        has_track = any(other.track is request.track for other in group)
        is_full = sum(len(other.windows) for other in group) + len(request.windows) > request.limit
        if key[0] == request.batch.member and (has_track if key != request.key else is_full):
            yield waiting.pop(key)
    group = waiting.setdefault(request.key, [])
    group.append(request)
    if sum(len(other.windows) for other in group) >= request.limit:
        yield waiting.pop(request.key)


def _keeps_track_on_device(config: RunConfig) -> bool:
    """Return whether the track is on one GPU, whose work is queued from one thread."""
    return runs_beside_cpu(config.device) and config.runner.num_devices == 1


def _is_whole_track(group: list[_WindowRequest], config: RunConfig) -> bool:
    """Tell whether a batch on a CPU is all of a track, so that all threads should share it."""
    return config.device.type == "cpu" and group[0].track.num_batches == 1


def _count_in_flight(config: RunConfig) -> int:
    """Return how many batches may run, or wait for a thread, while earlier ones are stitched."""
    windows = config.parallelism.windows
    # A GPU should have the next batch in its queue while the CPU stitches the one before.
    return max(windows, 2) if _keeps_track_on_device(config) else windows


@contextmanager
def _open_pool(config: RunConfig) -> Iterator[Executor | None]:
    """Open a pool of threads that run the windows; yield None to run them in the calling thread."""
    if _keeps_track_on_device(config):
        # One thread, because batches are queued in turn, and graphs run one at a time.
        with ThreadPoolExecutor(1, "demucs-gpu", share_queue(config.device)) as pool:
            yield pool
        return
    windows, threads = config.parallelism.windows, config.parallelism.threads
    if not windows or (windows == torch.get_num_threads() == 1 and not config.options.jobs):
        yield None
        return
    is_limited = config.device.type == "cpu" and threads != torch.get_num_threads()
    begin = partial(limit_threads, threads) if is_limited else None
    with ThreadPoolExecutor(windows, "demucs-window", begin) as pool:
        yield pool


@dataclass(frozen=True, slots=True, eq=False)
class _InFlight:
    """A batch that is running, and the `ChunkStarted` events to yield before its results."""

    announced: list[_Indexed]
    future: Future[list[_WindowResponse]]
    index: int


def _run_groups(
    groups: Iterable[_Indexed | list[_WindowRequest]],
    config: RunConfig,
    pool: Executor | WindowQueue | None,
    max_tracks: int,
) -> Generator[_Indexed | list[_WindowResponse], None, None]:
    """Run the groups, as many at a time as `config.parallelism` allows; yield results in order.

    With a pool, the `ChunkStarted` events of a batch are held back until the results of the batch
    before it have been yielded. At most `max_tracks` consecutive tracks are in work at a time.
    """
    in_flight: deque[_InFlight] = deque()
    announced: list[_Indexed] = []

    def finish_first() -> Iterator[_Indexed | list[_WindowResponse]]:
        # In the order in which batches were submitted, not in which they complete: sums, and thus
        # the bytes, must not depend on the timing of the threads.
        yield from in_flight[0].announced
        responses = in_flight[0].future.result()
        in_flight.popleft()
        yield responses

    try:
        for item in groups:
            index = item[0] if isinstance(item, tuple) else item[0].track.index
            while in_flight and in_flight[0].index <= index - max_tracks:
                yield from finish_first()
            if isinstance(item, tuple):
                if pool is not None and isinstance(item[1], ChunkStarted):
                    announced.append(item)
                else:
                    yield item
            elif (future := _submit(item, config, pool)) is None:
                yield from announced
                announced = []
                with use_threads(torch.get_num_threads() if pool is None else config.num_threads):
                    responses = _run_batch(item, config)
                yield responses
            else:
                in_flight.append(_InFlight(announced, future, index))
                announced = []
                if len(in_flight) > _count_in_flight(config):
                    yield from finish_first()
        while in_flight:
            yield from finish_first()
    finally:
        # The caller may go on using the pool, so it stays open: cancel the batches that have not
        # begun, and wait for the others, which still use the networks.
        wait([batch.future for batch in in_flight if not batch.future.cancel()])


def _submit(
    group: list[_WindowRequest], config: RunConfig, pool: Executor | WindowQueue | None
) -> Future[list[_WindowResponse]] | None:
    """Submit a batch; return None if the calling thread is to run it."""
    needs_all_threads = not config.options.jobs and _is_whole_track(group, config)
    if isinstance(pool, WindowQueue):
        is_alone = needs_all_threads or not config.parallelism.windows
        return pool.submit(_make_task(group, config, pool.num_threads if is_alone else None))
    if pool is None or needs_all_threads:
        return None
    return pool.submit(_run_batch, group, config)


def _make_task(
    group: list[_WindowRequest], config: RunConfig, all_threads: int | None
) -> WindowTask:
    """Return a batch for a shared pool; it runs on as many threads as if the track were alone.

    `all_threads` is their number, if nothing may run beside the batch.
    """
    parallelism = config.parallelism
    key: Hashable = None
    if config.device.type != "cpu":  # there, the bytes of a stem may not depend on other tracks
        member = group[0].batch.member
        network, stems = config.ensemble.members[member], tuple(config.own_stems[member])
        key = (id(network), group[0].key, stems, config.options)
    return WindowTask(
        items=group,
        run=partial(_run_batch, config=config),
        size=sum(len(request.windows) for request in group),
        limit=group[0].limit,
        key=key,
        threads=all_threads or parallelism.threads,
        at_a_time=1 if all_threads else parallelism.windows,
    )


def _return_holes(
    items: Iterable[_Indexed | list[_WindowResponse]],
) -> Iterator[_Indexed | list[_WindowResponse]]:
    """Pass `items` on, and return free memory to the system after some of the batches."""
    num_batches = 0
    for item in items:
        yield item
        num_batches += isinstance(item, list)
        if isinstance(item, list) and num_batches % _BATCHES_PER_TRIM == 0:
            return_free_memory()


def _stitch(
    items: Iterable[_Indexed | list[_WindowResponse]],
) -> Generator[_Indexed, None, None]:
    """Yield the events of all items, and the blocks that each response completes."""
    for item in items:
        if isinstance(item, tuple):
            yield item
            continue
        for response in item:
            track = response.request.track
            for event in [*response.events, *track.accept(response)]:
                yield track.index, event


def _run_batch(group: list[_WindowRequest], config: RunConfig) -> list[_WindowResponse]:
    """Run requests as one batch; if it fails, run each request alone to find which one fails."""
    member = group[0].batch.member
    network, select = config.ensemble.members[member], config.own_stems[member]
    windows = torch.cat([request.windows for request in group])
    try:
        output, events = config.runner.infer(network, windows, select, config.options)
    except Exception as error:  # noqa: BLE001 (a bad track must not stop the others)
        if len(group) == 1:
            return [_WindowResponse(group[0], error, [])]
    else:
        parts = torch.split(output, [len(request.windows) for request in group])
        # The events of the batch are reported only once, with its first request.
        events_per_request = [events, *([] for _ in group[1:])]
        return [
            _WindowResponse(*response)
            for response in zip(group, parts, events_per_request, strict=True)
        ]
    # Not inside `except`: the traceback keeps the tensors of the failed forward in memory.
    return [response for request in group for response in _run_batch([request], config)]


class _TrackState:
    """State of one track while it is read, planned and stitched.

    Only the thread that consumes the stream uses it; threads of the pool only get windows.
    """

    def __init__(self, index: int, track: Track, config: RunConfig) -> None:
        self.index = index
        self.is_over = False
        self._track = track
        if _keeps_track_on_device(config):
            self._track = DeviceTrack.place(track, config.device, config.options.max_memory)
        self._config = config
        self._gate: Gate | None = None
        self._level: Level | None = None  # None: the level is not changed
        self._levels: list[Level | None] = [None] * len(config.ensemble.members)
        """Levels of networks that differ in whether they change it; then `_level` is None."""

    def begin(self) -> Iterator[Event]:
        """Measure the level, and plan the work."""
        config, track = self._config, self._track
        if any(config.member_options[member].normalize for member in config.members):
            yield Stage.Started("normalize")
            if isinstance(track, DeviceTrack):
                self._level = track.measure()
            else:
                self._level = getattr(track, "level", None) or measure(track.blocks())
            length = self._level.length
            self._choose_levels(self._level)
            yield Stage.Completed("normalize")
        else:
            length = _length(track)
        if not length:
            raise ValueError("the track has no samples: there is nothing to separate")
        channels = config.ensemble.audio_channels
        if channels == 1 and track.channels > 1:
            yield Stage.Started("downmix_to_mono")
            yield Stage.Completed("downmix_to_mono")
        blocks = (with_channels(block, channels) for block in track.blocks())
        self._plan = config.plan(length)
        first: int = getattr(track, "first", 0)
        self._wanted = self._emitted = first
        if config.options.gate:
            first = find_first(config.ensemble.samplerate, first)
            self._emitted = first
            num_stems = len(config.stems.outputs)
            self._gate = Gate(config.ensemble.samplerate, num_stems, first)
        self._blend = Blend(self._plan, config, first)
        first = self._blend.first
        # Batches before `first` count as done, so that progress is that of the whole track.
        self._num_done = self._plan.num_before(first)
        done = self._plan.batches[: self._num_done]
        self._samples_done = sum(len(chunk) for batch in done for _, chunk in batch.indexed_chunks)
        self._buffer = TrackBuffer(
            blocks,
            length,
            level=self._level,
            start=self._plan.reads_from(first),
            around=getattr(track, "around", None),
        )
        yield from config.runner.announce_device()

    def _choose_levels(self, level: Level) -> None:
        """Set the level that each network expects, or one for all of them."""
        levels = [
            None
            if not options.normalize
            else level.with_population_std()
            if options.profile == "msst"
            else level
            for options in self._config.member_options
        ]
        ensemble = self._config.ensemble
        if ensemble.stems is None and not ensemble.is_spectral:
            self._level = levels[0]
        else:
            self._level, self._levels = None, levels

    def requests(self) -> Iterator[_WindowRequest]:
        """Yield the batches of this track; windows are cut only when a batch is requested."""
        config, plan = self._config, self._plan
        batches, first = plan.batches[self._num_done :], self._num_done + 1
        reads = [min(chunk.read for _, chunk in batch.indexed_chunks) for batch in batches]
        # A short chunk at the end of the track reads further back than the chunk before it.
        keep = [*accumulate(reversed(reads), min)][::-1] + [plan.length]
        widest = max(config.padding_width(member, plan.length) for member in config.members)
        for number, (batch, needed) in enumerate(zip(batches, keep[1:]), start=first):
            if self.is_over:  # an earlier window failed
                return
            options, level = config.member_options[batch.member], self._levels[batch.member]
            pad = config.padding_width(batch.member, plan.length)
            cut = self._buffer.cut_whole if options.profile == "msst" else self._buffer.cut
            windows = torch.stack(
                [cut(chunk, options.padding, pad, level) for _, chunk in batch.indexed_chunks]
            )
            limit = config.batch_size(batch.member, batch.window)
            if config.needs_mixture:
                # Stem rules and the gate read the track where stems become final, behind the
                # windows.
                needed = min(needed, self._blend.start)
            # Reflection reads up to the padding and one sample further back.
            self._buffer.drop(needed - (widest + 1 if widest else 0))
            yield _WindowRequest(self, number, batch, windows, limit)

    @property
    def num_batches(self) -> int:
        """Number of batches in the plan of the whole track."""
        return len(self._plan.batches)

    def announce(self, request: _WindowRequest) -> ChunkStarted:
        """Return the event for a batch that is about to run."""
        total = len(self._plan.batches)
        return ChunkStarted(request.number, total, self._positions(request.batch))

    def accept(self, response: _WindowResponse) -> Iterator[TrackEvent]:
        """Stitch the output (N, ..., S, C, W) of a batch; yield final blocks, and events."""
        batch, output = response.request.batch, response.output
        if self.is_over:
            return
        if isinstance(output, Exception):
            self.is_over = True
            yield TrackFailed(output)
            return
        level = self._levels[batch.member]
        output = output if level is None else level.restore(output)
        for (index, chunk), window in zip(batch.indexed_chunks, output, strict=True):
            self._blend.add(index, chunk, window)
        self._num_done += 1
        self._samples_done += sum(len(chunk) for _, chunk in batch.indexed_chunks)
        yield ChunkProcessed(
            self._num_done,
            len(self._plan.batches),
            self._positions(batch),
            self._samples_done / self._plan.num_samples,
            self._plan.length / self._config.ensemble.samplerate,
        )
        is_last = self._num_done == len(self._plan.batches)
        if is_last:
            yield Stage.Started("stitch")
        yield from self._final_blocks(is_last=is_last)
        if is_last:
            self.is_over = True
            yield Stage.Completed("stitch")
            stages = ["collect_outputs", *(["derive_stems"] if self._config.stems.rules else [])]
            for stage in stages:
                yield Stage.Started(stage)
                yield Stage.Completed(stage)
            yield TrackFinished()

    def _final_blocks(self, *, is_last: bool) -> Iterator[Block]:
        start = self._blend.start
        stems = self._blend.take()
        if stems is not None:
            mixture = None
            if self._config.needs_mixture:
                mixture = self._buffer.read(start, self._blend.start)
            stems = stems if self._level is None else self._level.restore(stems)
            if not isinstance(self._track, DeviceTrack):
                stems = stems.to(self._buffer.device)
            elif mixture is not None:
                mixture = mixture.to(stems.device)  # they differ after a fallback to the CPU
            stems = self._config.stems.derive(stems, mixture)
            if self._gate is not None and mixture is not None:
                stems = self._gate.push(stems, mixture)
        yield from self._emit(stems)
        if is_last and self._gate is not None:
            yield from self._emit(self._gate.finish())

    def _emit(self, stems: Tensor | None) -> Iterator[Block]:
        """Yield the next samples, without those before the first that is wanted."""
        if stems is None:
            return
        skipped = max(0, self._wanted - self._emitted)
        start = max(self._wanted, self._emitted)
        self._emitted += stems.shape[-1]
        stems = stems[..., skipped:]
        if isinstance(self._track, DeviceTrack):
            stems = download(stems, self._track.home)
        if stems.shape[-1]:
            yield Block(start, stems)

    def _positions(self, batch: ChunkBatch) -> tuple[Position, ...]:
        passes = self._plan.passes
        return tuple(passes[index].position(chunk) for index, chunk in batch.indexed_chunks)


def with_channels(block: Tensor, channels: int) -> Tensor:
    """Convert `block` (..., C, t) to `channels`; raise `ValueError` rather than drop a channel."""
    track_channels = block.shape[-2]
    if track_channels not in (1, channels) and channels != 1:
        raise ValueError(
            f"the track has {track_channels} channels, but the networks need {channels}: "
            "convert it first"
        )
    return convert_channels(block, channels)


def _length(track: Track) -> int:
    length: int | None = getattr(track, "length", None)
    if length is None:
        return sum(block.shape[-1] for block in track.blocks())
    return length
