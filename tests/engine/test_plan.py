"""The plan covers every sample, and merges passes without reordering their chunks."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demucs_infer.engine.plan import (
    Chunk,
    ChunkBatch,
    Pass,
    Plan,
    draw_origins,
    plan_batches,
    plan_chunks,
    plan_padded,
)
from demucs_infer.events import Position

grids = st.integers(1, 60).flatmap(
    lambda segment: st.tuples(st.just(segment), st.integers(1, segment))
)
lengths = st.integers(0, 400)
origins = st.integers(-100, 0)


@settings(max_examples=1500, deadline=None)
@given(length=lengths, grid=grids, origin=origins, extra=st.integers(0, 50))
def test_plan_chunks_owns_every_sample_as_often_as_the_grid_requires(
    length: int, grid: tuple[int, int], origin: int, extra: int
) -> None:
    segment, stride = grid
    chunks = plan_chunks(
        length, segment=segment, stride=stride, window=lambda n: segment + extra, origin=origin
    )
    owned = Counter(sample for chunk in chunks for sample in range(chunk.start, chunk.stop))
    assert set(owned) == set(range(origin, length))
    for sample, count in owned.items():
        # Chunks begin at origin + k * stride, no later than the sample, less than a segment ago.
        first = max(0, (sample - origin - segment) // stride + 1)
        assert count == (sample - origin) // stride - first + 1
    assert [chunk.start for chunk in chunks] == list(range(origin, length, stride))
    assert all(len(chunk) == segment for chunk in chunks if chunk.start + segment <= length)
    for chunk in chunks:
        # A short chunk is extended by real context on both sides, half each, the odd one right.
        left, right = chunk.skip, chunk.read + chunk.window - chunk.stop
        assert 0 <= right - left <= 1


@settings(max_examples=1500, deadline=None)
@given(length=lengths, grid=grids, origin=origins)
def test_plan_padded_covers_every_sample_equally_often(
    length: int, grid: tuple[int, int], origin: int
) -> None:
    segment, stride = grid
    chunks = plan_padded(length, segment=segment, stride=stride, origin=origin)
    if length <= origin:
        assert chunks == ()
        return
    pad = segment - stride
    padded = length - origin + 2 * pad
    rest = (padded - segment) % stride if padded > segment else 0
    total = padded + (stride - rest if rest else 0)
    # Counted as the definition has it: pad, extend to whole hops, count windows.
    assert len(chunks) == max(0, (total - segment) // stride) + 1
    assert chunks[0].start == origin - pad
    assert all(len(chunk) == chunk.window == segment and not chunk.skip for chunk in chunks)
    counts = {
        sum(chunk.start <= sample < chunk.stop for chunk in chunks)
        for sample in range(origin, length)
    }
    assert counts <= {segment // stride, -(-segment // stride)}
    assert min(counts) >= 1


@pytest.mark.parametrize(("segment", "stride"), [(10, 0), (10, -1), (10, 11), (0, 1), (-3, 1)])
def test_invalid_grid_is_rejected(segment: int, stride: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        plan_chunks(100, segment=segment, stride=stride, window=int)
    with pytest.raises(ValueError, match="samples"):
        plan_padded(100, segment=segment, stride=stride)


def test_chunk_rejects_a_window_that_does_not_cover_it() -> None:
    with pytest.raises(ValueError, match="does not cover"):
        Chunk(start=0, stop=10, read=1, window=10)
    with pytest.raises(ValueError, match="does not cover"):
        Chunk(start=0, stop=10, read=-1, window=10)
    with pytest.raises(ValueError, match="does not cover"):
        plan_chunks(100, segment=10, stride=5, window=lambda n: n - 1)


@given(seed=st.integers(0, 1000), members=st.integers(1, 4), shifts=st.integers(1, 5))
def test_origins_equal_upstream(seed: int, members: int, shifts: int) -> None:
    expected = random.Random(seed)
    wanted = [[expected.randint(0, 4000) - 4000 for _ in range(shifts)] for _ in range(members)]
    silent = [lambda _origin: 0] * members
    assert draw_origins(silent, shifts, 4000, seed) == wanted
    random.seed(seed)
    assert draw_origins(silent, shifts, 4000, None) == wanted
    state = random.getstate()
    draw_origins(silent, shifts, 4000, seed)
    assert random.getstate() == state, "a seed of its own leaves the global generator alone"
    assert draw_origins(silent, 0, 4000, seed) == [[0]] * members


def test_draws_of_networks_advance_the_generator() -> None:
    expected = random.Random(5)
    wanted = []
    for _ in range(2):
        wanted.append([expected.randint(0, 100) - 100])
        for _ in range(7 - wanted[-1][0]):
            expected.randrange(1)
    assert draw_origins([lambda origin: 7 - origin] * 2, 1, 100, 5) == wanted


def make_passes(
    length: int, segment: int, stride: int, starts: Sequence[tuple[int, int]], fixed: bool
) -> tuple[Pass, ...]:
    return tuple(
        Pass(
            member,
            index,
            origin,
            plan_chunks(
                length,
                segment=segment,
                stride=stride,
                window=(lambda n: segment) if fixed else int,
                origin=origin,
            ),
        )
        for index, (member, origin) in enumerate(starts)
    )


@settings(max_examples=800, deadline=None)
@given(
    length=st.integers(1, 300),
    grid=grids,
    starts=st.lists(st.tuples(st.integers(0, 2), origins), min_size=1, max_size=6),
    size=st.integers(1, 5),
    fixed=st.booleans(),
)
def test_batches_contain_every_chunk_once_in_the_order_of_its_pass(
    length: int,
    grid: tuple[int, int],
    starts: list[tuple[int, int]],
    size: int,
    fixed: bool,
) -> None:
    passes = make_passes(length, *grid, starts, fixed)
    batches = plan_batches(passes, lambda member, window: size)
    for index, pass_ in enumerate(passes):
        seen = [chunk for batch in batches for at, chunk in batch.indexed_chunks if at == index]
        assert seen == list(pass_.chunks)
    for batch in batches:
        assert 1 <= len(batch.indexed_chunks) <= size
        assert {chunk.window for _, chunk in batch.indexed_chunks} == {batch.window}
        assert {passes[at].member for at, _ in batch.indexed_chunks} == {batch.member}
    assert [batch.start for batch in batches] == sorted(batch.start for batch in batches)
    plan = Plan(length, passes, batches)
    assert plan.num_chunks == sum(len(batch.indexed_chunks) for batch in batches)
    if fixed:  # equal windows: only the end of a member is not a full batch
        for member in {member for member, _ in starts}:
            chunks = sum(len(p.chunks) for p in passes if p.member == member)
            assert sum(b.member == member for b in batches) == -(-chunks // size)


def test_passes_reach_a_sample_at_the_same_time() -> None:
    passes = make_passes(10_000, 100, 75, [(0, 0), (1, -30), (2, -60)], True)
    batches = plan_batches(passes, lambda member, window: 4)
    reached = dict.fromkeys(range(3), 0)
    for batch in batches:
        reached[batch.member] = batch.indexed_chunks[-1][1].stop
        # Merged by start: no pass is more than a batch and a segment ahead of another.
        assert max(reached.values()) - min(reached.values()) <= 2 * 4 * 75 + 100


def test_position_is_relative_to_the_origin_of_the_grid() -> None:
    (one,) = make_passes(100, 50, 40, [(3, -7)], True)
    assert one.position(one.chunks[1]) == Position(member=3, shift=0, offset=40)
    batch = ChunkBatch(3, 50, ((0, one.chunks[1]),))
    assert batch.start == 33
