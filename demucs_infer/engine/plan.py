"""Plan the work for a track: which samples each window reads, and which windows form a batch.

All numbers are sample positions in the track; there are no tensors here. A *pass* is one network
of a bag, applied to the whole track at one time shift. Passes are merged in order of the starts of
their chunks, so that all of them reach a sample at about the same time, and their mean can be
returned while the rest of the track has not been read.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby
from operator import itemgetter

from demucs_infer.events import Position


@dataclass(frozen=True, slots=True)
class Chunk:
    """One window: the network reads `[read, read + window)`, its output covers `[start, stop)`.

    Both ranges may extend beyond the track on either side; samples outside are padding.
    """

    start: int
    stop: int
    read: int
    window: int

    def __post_init__(self) -> None:
        if not self.read <= self.start < self.stop <= self.read + self.window:
            raise ValueError(f"the window does not cover the chunk: {self}")

    @property
    def skip(self) -> int:
        """Number of output samples before `start`, which are not used."""
        return self.start - self.read

    def __len__(self) -> int:
        return self.stop - self.start


def plan_chunks(
    length: int,
    *,
    segment: int,
    stride: int,
    window: Callable[[int], int],
    origin: int = 0,
) -> tuple[Chunk, ...]:
    """Cover `[origin, length)` with a chunk of `segment` samples every `stride` samples.

    `window` returns the input length that a network needs for a chunk of a given length. A negative
    `origin` moves the grid to the left: the random shift of upstream, without copying samples.

    >>> plan_chunks(10, segment=6, stride=4, window=lambda n: 6)[-1]
    Chunk(start=8, stop=10, read=6, window=6)
    """
    check_grid(segment, stride)
    chunks = []
    for start in range(origin, length, stride):
        stop = min(start + segment, length)
        size = window(stop - start)
        # A short chunk is filled up with samples of the track on both sides, as upstream does.
        read = start - (size - (stop - start)) // 2
        chunks.append(Chunk(start, stop, read, size))
    return tuple(chunks)


def plan_padded(length: int, *, segment: int, stride: int, origin: int = 0) -> tuple[Chunk, ...]:
    """Cover `[origin, length)`, padded by `segment - stride` on both sides, with whole chunks.

    Chunks then overlap at the ends of the track as they do in its middle.

    >>> [chunk.start for chunk in plan_padded(10, segment=6, stride=4)]
    [-2, 2, 6]
    """
    check_grid(segment, stride)
    first = origin - (segment - stride)
    padded = length - origin + 2 * (segment - stride)
    count = max(0, -(-(padded - segment) // stride)) + 1 if length > origin else 0
    starts = range(first, first + count * stride, stride)
    return tuple(Chunk(start, start + segment, start, segment) for start in starts)


def plan_msst(
    length: int, *, segment: int, stride: int, border: int, origin: int = 0
) -> tuple[Chunk, ...]:
    """Cover `[origin, length)` as Music-Source-Separation-Training (MSST) does.

    The track is padded by `border` samples on both sides. No chunk ends after this padding, so the
    last ones may be shorter than their windows. MSST also has windows that begin after the end of
    the track; they are left out, because their output is not used.

    >>> [(chunk.start, chunk.stop) for chunk in plan_msst(10, segment=6, stride=4, border=2)]
    [(-2, 4), (2, 8), (6, 12)]
    """
    check_grid(segment, stride)
    stop = length + border
    return tuple(
        Chunk(start, min(start + segment, stop), start, segment)
        for start in range(origin - border, length, stride)
    )


def check_grid(segment: int, stride: int) -> None:
    """Raise `ValueError` if chunks would be empty, not advance, or leave gaps between them."""
    if not segment > 0:
        raise ValueError(f"a segment of {segment} samples is too short: it must be 1 or more")
    if not 0 < stride <= segment:
        raise ValueError(
            f"a stride of {stride} samples must be in [1, {segment}]: "
            "lower the overlap, or use a longer segment"
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """One network of a bag, applied to the whole track at one time shift."""

    member: int
    shift: int
    origin: int
    chunks: tuple[Chunk, ...]

    def position(self, chunk: Chunk) -> Position:
        """Return the position of `chunk` for progress events."""
        return Position(self.member, self.shift, chunk.start - self.origin)


def draw_origins(
    draws: Sequence[Callable[[int], int]], shifts: int, max_shift: int, seed: int | None
) -> list[list[int]]:
    """Draw the first sample of each pass, by network and shift; only sample 0 if `shifts` is 0.

    The order is upstream's, network by network, so that `seed=k` gives the offsets that upstream
    draws after `random.seed(k)`. Upstream's networks may draw from the same generator when they
    run: `draws` has a function for each network, from the first sample of a pass to the number of
    draws in it. It includes networks that are skipped here, because upstream runs them.
    """
    # Upstream uses the global generator; so does seed=None.
    randint = random.randint if seed is None else random.Random(seed).randint
    origins: list[list[int]] = []
    for draws_in_pass in draws:
        origins.append([])
        for _ in range(shifts):
            origins[-1].append(randint(0, max_shift) - max_shift)
            for _ in range(draws_in_pass(origins[-1][-1])):
                randint(0, 0)  # always 0, but it advances the generator
    return origins if shifts else [[0] for _ in draws]


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """Windows that one network processes together: equally long, ordered by start."""

    member: int
    window: int
    indexed_chunks: tuple[tuple[int, Chunk], ...]
    """(index of the pass, chunk) for each window."""

    @property
    def start(self) -> int:
        """First sample that the output of the batch covers."""
        return self.indexed_chunks[0][1].start


@dataclass(frozen=True, slots=True)
class Plan:
    """All the work for one track."""

    length: int
    passes: tuple[Pass, ...]
    batches: tuple[ChunkBatch, ...]

    @property
    def num_chunks(self) -> int:
        """Number of windows over all passes."""
        return sum(len(pass_.chunks) for pass_ in self.passes)

    @property
    def num_samples(self) -> int:
        """Sum of the lengths of all chunks; progress is reported as a fraction of it."""
        return sum(len(chunk) for pass_ in self.passes for chunk in pass_.chunks)

    def num_before(self, start: int) -> int:
        """Return how many batches, from the first one, only affect samples before `start`."""
        for number, batch in enumerate(self.batches):
            if any(chunk.stop > start for _, chunk in batch.indexed_chunks):
                return number
        return len(self.batches)

    def num_left(self, start: int) -> list[int]:
        """Return how many chunks of each pass are left to run for the samples from `start` on."""
        left = [0] * len(self.passes)
        for batch in self.batches[self.num_before(start) :]:
            for index, _ in batch.indexed_chunks:
                left[index] += 1
        return left

    def reads_from(self, start: int) -> int:
        """Return a sample before which no window, not even its reflected padding, has to read.

        Only windows that affect samples from `start` on count.
        """
        chunks = [
            chunk
            for batch in self.batches[self.num_before(start) :]
            for _, chunk in batch.indexed_chunks
        ]
        return max(0, min([start, *(chunk.read - chunk.window for chunk in chunks)]))


def plan_batches(
    passes: Sequence[Pass], max_batch_size: Callable[[int, int], int]
) -> tuple[ChunkBatch, ...]:
    """Interleave the chunks of all `passes` in order of start, in batches of a single network.

    `max_batch_size` returns the maximum batch size for a network's index and a window length.
    """
    members = sorted({pass_.member for pass_ in passes})
    queues = [_member_batches(passes, member, max_batch_size) for member in members]
    return tuple(merge(*queues, key=lambda batch: (batch.start, batch.member)))


def _member_batches(
    passes: Sequence[Pass], member: int, max_batch_size: Callable[[int, int], int]
) -> Iterator[ChunkBatch]:
    steps: Iterable[tuple[int, int, Chunk]] = merge(
        *(
            [(chunk.start, index, chunk) for chunk in pass_.chunks]
            for index, pass_ in enumerate(passes)
            if pass_.member == member
        ),
        key=itemgetter(0, 1),
    )
    for window, same in groupby(steps, key=lambda step: step[2].window):
        run = [(index, chunk) for _, index, chunk in same]
        count = max_batch_size(member, window)
        for at in range(0, len(run), count):
            yield ChunkBatch(member, window, tuple(run[at : at + count]))
