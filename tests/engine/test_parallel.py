"""Cores run windows, and the bytes of a stem do not depend on how many cores there are."""

import hashlib
import threading
from typing import Any

import pytest
import torch

from demucs_infer.demucs import Demucs
from demucs_infer.engine import parallel, pipeline
from demucs_infer.engine.blend import Blend
from demucs_infer.engine.parallel import Parallelism, choose_parallelism, decide_parallelism
from demucs_infer.engine.pipeline import Block, TensorTrack, separate, separate_many
from demucs_infer.engine.runner import Runner
from demucs_infer.events import ChunkProcessed, ChunkStarted, Event
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.optimize import optimize
from demucs_infer.options import SeparationOptions
from demucs_infer.pretrained import get_model
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, RecordingModel, ScaleModel, randomize

NETWORKS = {"HTDemucs": HTDemucs, "HDemucs": HDemucs, "Demucs": Demucs}
GB = 10**9


@pytest.mark.parametrize(
    ("given", "windows", "reason"),
    [
        ({"cores": 2, "threads": 2}, 2, "2 usable cores, 2 threads of torch"),
        ({"cores": 16, "threads": 8}, 8, "16 usable cores, 8 threads of torch"),
        ({"cores": 2, "threads": 8}, 2, "2 usable cores, 8 threads of torch"),
        ({"cores": 8, "threads": 1}, 1, "8 usable cores, 1 threads of torch"),
        ({"cores": 8, "threads": 8, "memory": None}, 8, "8 usable cores, 8 threads of torch"),
        ({"cores": 8, "threads": 8, "memory": 2 * GB}, 3, "2.0 GB of free memory"),
        ({"cores": 8, "threads": 8, "memory": 10**9}, 0, "1.0 GB of free memory"),
        ({"cores": 8, "threads": 8, "memory": 0}, 0, "0.0 GB of free memory"),
        ({"cores": 8, "threads": 8, "is_long": True}, 8, "8 usable cores, 8 threads of torch"),
        (
            {"cores": 8, "threads": 8, "is_long": True, "memory": None},
            0,
            "the free memory is unknown",
        ),
        ({"cores": 8, "threads": 8, "is_long": True, "memory": 2 * GB}, 0, "2.0 GB of free memory"),
    ],
    ids=[
        "a window a core",
        "torch may use fewer threads than there are cores",
        "a quota below the threads of torch",
        "torch may use one thread",
        "memory unknown",
        "memory for three",
        "memory for one: all threads share it",
        "no memory: one at least",
        "long windows, memory for all",
        "long windows, memory unknown",
        "long windows, memory for one",
    ],
)
def test_windows_in_flight_are_limited_by_cores_memory_and_the_caller(
    given: dict[str, Any], windows: int, reason: str
) -> None:
    decided = decide_parallelism(**{"memory": 100 * GB, "window_bytes": 3 * 10**8, **given})
    assert decided == Parallelism(windows, reason)


def test_long_windows_that_do_not_fill_the_cores_have_several_threads() -> None:
    given = {"cores": 8, "threads": 8, "window_bytes": 3 * 10**8, "memory": 4 * GB}
    assert decide_parallelism(**given, is_long=True) == Parallelism(
        3, "4.0 GB of free memory", threads=2
    )
    assert decide_parallelism(**given, is_long=False) == Parallelism(6, "4.0 GB of free memory")


@pytest.mark.parametrize(
    ("options", "device", "text"),
    [
        (
            SeparationOptions(),
            "cpu",
            "4 windows at a time, 1 thread each (8 usable cores",
        ),
        (
            SeparationOptions(batch_size=1),
            "cpu",
            "4 windows at a time, 1 thread each",
        ),
        (
            SeparationOptions(batch_size=2),
            "cpu",
            "one batch at a time, on all threads (batch_size = 2)",
        ),
        (
            SeparationOptions(split=False),
            "cpu",
            "one batch at a time, on all threads (tracks are not split)",
        ),
        (
            SeparationOptions(segment=44),
            "cpu",
            "4 windows at a time, 1 thread each (8 usable cores",
        ),
        (SeparationOptions(jobs=1), "cpu", "1 window at a time, 4 threads each (jobs = 1)"),
        (SeparationOptions(jobs=3), "cpu", "3 windows at a time, 1 thread each (jobs = 3)"),
        (SeparationOptions(jobs=9), "cpu", "9 windows at a time, 1 thread each (jobs = 9)"),
        (SeparationOptions(), "cuda", "one batch at a time, on all threads (on cuda)"),
    ],
    ids=[
        "default",
        "batch of 1",
        "batch of 2",
        "no split",
        "long windows",
        "one job",
        "jobs",
        "more jobs than threads",
        "GPU",
    ],
)
def test_only_windows_that_run_alone_on_a_cpu_share_the_cores(
    options: SeparationOptions, device: str, text: str, machine: None
) -> None:
    torch.set_num_threads(4)
    decided = choose_parallelism([ScaleModel()], options, torch.device(device))
    assert str(decided).startswith(text)


DEFAULT = SeparationOptions()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to have eight cores and 100 GB, and restore the number of threads."""
    monkeypatch.setattr(parallel, "count_cores", lambda: 8)
    monkeypatch.setattr(parallel, "free_memory", lambda: 100 * GB)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def digest(track: TensorTrack, network: Any, runner: Runner | None = None, **options: Any) -> str:
    settings = SeparationOptions(**options)
    stream = separate(track, network, options=settings, runner=runner)
    blocks = [item.stems for item in stream if isinstance(item, Block)]
    return hashlib.sha256(torch.cat(blocks, -1).contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("prepare", [None, optimize], ids=["plain", "optimized"])
@pytest.mark.parametrize("kind", [*NETWORKS, "tiny"])
@pytest.mark.parametrize("num_windows", [5])
def test_bytes_do_not_depend_on_threads_or_jobs(
    kind: str, prepare: Any, num_windows: int, machine: None
) -> None:
    if kind == "tiny":
        network: Any = get_model("tiny")
    else:
        network = randomize(NETWORKS[kind](**TINY[kind]))
    stride = int(0.75 * float(network.segment) * network.samplerate)
    length = num_windows * stride - 99 if kind != "tiny" else (1 + num_windows) * 44100
    track = TensorTrack(make_noise(2, length))
    runner = Runner(prepare=prepare)
    digests: dict[tuple[int, int], str] = {}
    for threads, jobs in [
        (1, 0),
        (2, 0),
        (4, 0),
        (8, 0),
        (1, 1),
        (2, 2),
        (4, 3),
    ]:
        torch.set_num_threads(threads)
        digests[threads, jobs] = digest(track, network, runner, shifts=0, jobs=jobs)
        assert torch.get_num_threads() == threads
    assert len(set(digests.values())) == 1, digests


def test_each_window_in_flight_has_one_thread(machine: None) -> None:
    class ThreadsModel(ScaleModel):
        def forward(self, mix: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(mix)

    seen: list[int] = []
    torch.set_num_threads(4)
    for jobs in (0, 4):
        digest(TensorTrack(make_noise(2, 10 * 6000)), ThreadsModel(), shifts=0, jobs=jobs)
    assert seen == [1] * 20
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("leaves_cores", "count"), [(True, 1), (False, 4)], ids=["in a command", "in a library"]
)
def test_beside_windows_the_caller_of_a_command_computes_in_one_thread(
    leaves_cores: bool, count: int, machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second thread of the caller would wait actively on a core that belongs to a window."""
    monkeypatch.setattr("demucs_infer.system.threads._leaves_cores", leaves_cores)
    blend_take, seen = Blend.take, list[int]()

    def take_and_record(blend: Blend) -> torch.Tensor | None:
        seen.append(torch.get_num_threads())
        return blend_take(blend)

    monkeypatch.setattr(Blend, "take", take_and_record)
    torch.set_num_threads(4)
    between = [
        torch.get_num_threads()
        for _ in separate(TensorTrack(make_noise(2, 60_000)), ScaleModel(), options=DEFAULT)
    ]
    assert set(seen) == {count}
    assert set(between) == {4}


def test_a_network_runs_as_many_windows_as_cores(machine: None) -> None:
    class MeetingModel(ScaleModel):
        def forward(self, mix: torch.Tensor) -> torch.Tensor:
            barrier.wait(30)  # raises unless four windows are here at a time
            return super().forward(mix)

    torch.set_num_threads(4)
    barrier = threading.Barrier(4)
    digest(TensorTrack(make_noise(2, 8 * 6000)), MeetingModel(), shifts=0)


@pytest.mark.parametrize(
    ("jobs", "times"), [(2, 2), (1, 0)], ids=["side by side", "one after another"]
)
def test_free_memory_is_returned_while_windows_run_side_by_side(
    jobs: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims: list[None] = []
    monkeypatch.setattr(pipeline, "return_free_memory", lambda: trims.append(None))
    digest(TensorTrack(make_noise(2, 10 * 8000)), ScaleModel(), shifts=0, overlap=0, jobs=jobs)
    assert len(trims) == times


def test_no_thread_is_left_after_the_stream(machine: None) -> None:
    torch.set_num_threads(4)
    before = threading.active_count()
    stream = separate(TensorTrack(make_noise(2, 60_000)), ScaleModel(), options=DEFAULT)
    next(item for item in stream if isinstance(item, ChunkProcessed))
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before
    digest(TensorTrack(make_noise(2, 60_000)), ScaleModel())
    assert threading.active_count() == before


@pytest.mark.parametrize("jobs", [0, 2])
def test_each_batch_is_announced_after_the_one_before_it(jobs: int, machine: None) -> None:
    torch.set_num_threads(4)
    options = SeparationOptions(shifts=0, jobs=jobs)
    stream = separate(
        TensorTrack(make_noise(2, 60_000)), ScaleModel(), options=options, announce=True
    )
    chunks: list[Event] = [
        item for item in stream if isinstance(item, ChunkStarted | ChunkProcessed)
    ]
    assert [type(event) for event in chunks] == [ChunkStarted, ChunkProcessed] * 10
    assert [event.batch_index for event in chunks[::2]] == list(range(1, 11))


def test_tracks_fill_the_cores_together(machine: None) -> None:
    class MeetingModel(ScaleModel):
        def forward(self, mix: torch.Tensor) -> torch.Tensor:
            barrier.wait(30)  # raises unless four windows are here at a time
            return super().forward(mix)

    torch.set_num_threads(4)
    barrier = threading.Barrier(4)
    tracks = [TensorTrack(make_noise(2, 9000, i)) for i in range(4)]
    options = SeparationOptions(shifts=0)
    stream = separate_many(tracks, MeetingModel(), options=options, max_tracks_per_batch=1)
    events = [item for _, item in stream]
    assert sum(isinstance(event, ChunkProcessed) for event in events) == 8


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "among others"])
def test_all_threads_share_a_track_of_one_window(count: int, machine: None) -> None:
    class ThreadsModel(ScaleModel):
        def forward(self, mix: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(mix)

    seen: list[int] = []
    torch.set_num_threads(4)
    tracks = [TensorTrack(make_noise(2, 3000, i)) for i in range(count)]
    options = SeparationOptions(shifts=0)
    list(separate_many(tracks, ThreadsModel(), options=options, max_tracks_per_batch=1))
    assert seen == [4] * count


def test_error_stops_what_is_in_flight(machine: None) -> None:
    torch.set_num_threads(2)

    class FailsModel(RecordingModel):
        def forward(self, mix: torch.Tensor) -> torch.Tensor:
            super().forward(mix)
            raise RuntimeError("a shape")

    network = FailsModel()
    with pytest.raises(RuntimeError, match="a shape"):
        digest(TensorTrack(make_noise(2, 60_000)), network, shifts=0)
    assert len(network.seen) <= 3, "two in flight, and one that follows"
