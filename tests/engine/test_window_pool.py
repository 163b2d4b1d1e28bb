"""The pool in which windows of several tracks run in turn."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from demucs_infer.engine.pipeline import Block, TensorTrack, separate_many
from demucs_infer.engine.window_pool import WindowPool, WindowQueue, WindowTask
from demucs_infer.events import TrackFailed, TrackFinished
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.options import SeparationOptions
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, ScaleModel, randomize

SECONDS = 30.0  # until a test that hangs fails


class Log:
    """Runs tasks, and lists them; each waits until `gate` is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[str]] = []

    def run(self, items: list[str]) -> list[str]:
        assert self.gate.wait(SECONDS)
        self.batches.append(items)
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]

    def task(self, name: str, **changes: Any) -> WindowTask:
        values: dict[str, Any] = {"size": 1, "limit": 1, "key": None, "threads": 1, "at_a_time": 1}
        return WindowTask(items=[name], run=self.run, **{**values, **changes})


@pytest.fixture
def pool() -> Iterator[WindowPool]:
    pool = WindowPool()
    yield pool
    pool.close()


@pytest.fixture
def log() -> Log:
    return Log()


def run_all(log: Log, futures: list["Future[list[str]]"]) -> list[str]:
    """Let all tasks run, and return their names in order."""
    log.gate.set()
    assert not wait(futures, SECONDS).not_done
    return [name for batch in log.batches for name in batch]


def test_clients_take_turns_and_so_do_tracks_of_each(pool: WindowPool, log: Log) -> None:
    with ExitStack() as stack:
        queues = [stack.enter_context(pool.open_queue(client)) for client in "aab"]
        futures = [queues[0].submit(log.task("start"))]
        futures += [queues[0].submit(log.task(f"a1-{number}")) for number in range(3)]
        futures += [queues[1].submit(log.task(f"a2-{number}")) for number in range(3)]
        futures += [queues[2].submit(log.task(f"b-{number}")) for number in range(3)]
        order = run_all(log, futures)
    # "start" is the turn of the first track of a; it may have begun before the others came.
    assert [name for name in order if name[0] == "b"] == ["b-0", "b-1", "b-2"]
    assert order.index("b-2") <= 6
    a = [name for name in order if name[0] == "a"]
    assert a == ["a2-0", "a1-0", "a2-1", "a1-1", "a2-2", "a1-2"]


def test_windows_with_all_threads_run_alone(pool: WindowPool) -> None:
    lock, running, most = threading.Lock(), [0], {1: 0, 2: 0}
    both = threading.Barrier(2, timeout=SECONDS)

    def run(threads: int, items: list[str]) -> list[str]:
        with lock:
            running[0] += 1
            most[threads] = max(most[threads], running[0])
        assert torch.get_num_threads() == threads
        if threads == 1:
            both.wait()  # two of them run at a time
        with lock:
            running[0] -= 1
        return items

    def submit(queue: WindowQueue, threads: int) -> "Future[list[str]]":
        task = WindowTask(items=["x"], run=partial(run, threads), size=1, limit=1, key=None,
                          threads=threads, at_a_time=3 - threads)  # fmt: skip
        return queue.submit(task)

    with pool.open_queue("a") as first, pool.open_queue("b") as second:
        futures = [submit(first, 1) for _ in range(4)] + [submit(second, 2) for _ in range(3)]
        for future in futures:
            assert future.result(SECONDS) == ["x"]
    assert most == {1: 2, 2: 1}


def test_windows_of_several_tracks_fill_a_batch(log: Log) -> None:
    sizes: list[int] = []
    pool = WindowPool(sizes.append)
    with ExitStack() as stack:
        queues = [stack.enter_context(pool.open_queue(client)) for client in "abcd"]
        futures = [queues[0].submit(log.task("start"))]
        for name, size, key, queue in [
            ("a", 2, "k", queues[0]),
            ("b", 1, "k", queues[1]),
            ("c", 1, "other", queues[2]),
            ("d", 2, "k", queues[3]),
            ("b2", 1, "k", queues[1]),
        ]:
            futures.append(queue.submit(log.task(name, size=size, limit=4, key=key)))
        run_all(log, futures)
        assert [future.result() for future in futures[1:3]] == [["A"], ["B"]]
    pool.close()
    shared = next(batch for batch in log.batches if "b" in batch)
    assert len(shared) > 1 and "c" not in shared
    assert max(sizes) <= 4 and sum(sizes) == 8


def test_error_concerns_only_its_task(pool: WindowPool, log: Log) -> None:
    with pool.open_queue("a") as first, pool.open_queue("b") as second:
        bad, good = first.submit(log.task("bad")), second.submit(log.task("good"))
        run_all(log, [bad, good])
        assert good.result() == ["GOOD"]
        with pytest.raises(ValueError, match="bad"):
            bad.result()


def test_windows_of_closed_queue_are_dropped(pool: WindowPool, log: Log) -> None:
    with pool.open_queue("a") as queue:
        first = queue.submit(log.task("first"))
        with pool.open_queue("b") as other:
            dropped = [other.submit(log.task("dropped")) for _ in range(3)]
        last = queue.submit(log.task("last"))
        log.gate.set()
        assert (first.result(SECONDS), last.result(SECONDS)) == (["FIRST"], ["LAST"])
    assert sum(future.cancelled() for future in dropped) >= 2  # one may have begun


def test_closed_pool_refuses_windows(pool: WindowPool, log: Log) -> None:
    pool.close()
    with pool.open_queue("a") as queue, pytest.raises(RuntimeError, match="closed"):
        queue.submit(log.task("late"))


def collect(stream: Any) -> Any:
    """Return the stems of one track, or its error."""
    blocks: list[Tensor] = []
    for _, item in stream:
        if isinstance(item, TrackFailed):
            return item.error
        if isinstance(item, Block):
            blocks.append(item.stems)
        elif isinstance(item, TrackFinished):
            return torch.cat(blocks, dim=-1)
    raise AssertionError("the stream ended without a result")


def test_stems_are_those_of_tracks_alone(pool: WindowPool) -> None:
    model = randomize(HTDemucs(**TINY["HTDemucs"]))
    lengths = [0.7, 5.0, 2.5, 9.0]  # the first has one window
    tracks = [TensorTrack(make_noise(2, round(8000 * seconds), seed))
              for seed, seconds in enumerate(lengths)]  # fmt: skip
    options = [SeparationOptions(overlap=0.1 * number) for number in range(len(tracks))]
    alone = [
        collect(separate_many([track], model, options=own, max_tracks_per_batch=1))
        for track, own in zip(tracks, options)
    ]

    def run(number: int) -> Any:
        with pool.open_queue(str(number % 2)) as windows:
            return collect(
                separate_many([tracks[number]], model, options=options[number], windows=windows)
            )

    with ThreadPoolExecutor(len(tracks)) as threads:
        together = list(threads.map(run, range(len(tracks))))
    assert all(map(torch.equal, alone, together))


class LoudnessModel(ScaleModel):
    """Fails for tracks above full scale, and counts windows: those of loud and of quiet tracks."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.before_quiet = lambda: None

    def forward(self, mix: Tensor) -> Tensor:
        peak = float(mix.abs().max())
        if peak > 1:
            raise ValueError("too loud")
        if peak < 0.5:
            self.before_quiet()
        self.log.append("quiet" if peak < 0.5 else "loud")
        return super().forward(mix)


def constant(seconds: float, value: float) -> TensorTrack:
    return TensorTrack(torch.full((2, round(8000 * seconds)), value))


OPTIONS = SeparationOptions(normalize=False, overlap=0.0, shifts=0, jobs=1)


class CountingPool(WindowPool):
    """Counts the windows of each track."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[WindowQueue] = Counter()

    def submit(self, queue: WindowQueue, task: WindowTask) -> None:
        super().submit(queue, task)
        self.counts[queue] += 1


def test_short_track_is_done_after_twice_its_windows() -> None:
    model, pool, began = LoudnessModel(), CountingPool(), threading.Event()

    def wait_for_short() -> None:
        """Hold the long track up until the next windows of the short one are in the queue."""
        began.set()
        while not short_queue.tasks and pool.counts[short_queue] < 10:
            time.sleep(0.001)

    def run(track: TensorTrack, windows: WindowQueue) -> Any:
        return collect(separate_many([track], model, options=OPTIONS, windows=windows))

    model.before_quiet = wait_for_short
    with (
        ThreadPoolExecutor(2) as threads,
        pool.open_queue("a") as long_queue,
        pool.open_queue("b") as short_queue,
    ):
        long = threads.submit(run, constant(60, 0.1), long_queue)
        assert began.wait(SECONDS)
        short = threads.submit(run, constant(10, 0.9), short_queue)
        assert short.result(SECONDS).shape[-1] == 80_000
        assert long.result(SECONDS).shape[-1] == 480_000
    pool.close()
    assert (model.log.count("loud"), model.log.count("quiet")) == (10, 60)
    last = len(model.log) - model.log[::-1].index("loud")
    assert last <= 2 * 10 + 1


def test_bad_and_cancelled_tracks_do_not_disturb_others(pool: WindowPool) -> None:
    model = LoudnessModel()

    def run(track: TensorTrack, cancel: bool) -> Any:
        with pool.open_queue("a") as windows:
            stream = separate_many([track], model, options=OPTIONS, windows=windows)
            if not cancel:
                return collect(stream)
            while not isinstance(next(stream)[1], Block):
                pass
            stream.close()
            return None

    with ThreadPoolExecutor(3) as threads:
        good = threads.submit(run, constant(20, 0.2), False)
        bad = threads.submit(run, constant(20, 2.0), False)
        cancelled = threads.submit(run, constant(20, 0.7), True)
        assert cancelled.result(SECONDS) is None
        assert str(bad.result(SECONDS)) == "too loud"
        expected = torch.full((2, 2, 160_000), 0.2) * model.gains[:, None, None]
        assert torch.allclose(good.result(SECONDS), expected)
    assert model.log.count("loud") < 20
