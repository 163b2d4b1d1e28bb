"""Graphs are captured once per size of a batch, and only where that is possible."""

import pytest
import torch
from torch import Tensor

from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.gpu import graphs
from demucs_infer.optimized.gpu.arithmetic import Precision
from demucs_infer.optimized.gpu.build import optimize_for_gpu
from demucs_infer.optimized.gpu.graphs import Core, GraphedCore
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, randomize


class CountingGraphs:
    """Replay by running the core again, into the same tensors; count captures and replays."""

    def __init__(self, error: Exception | None = None) -> None:
        self.captured: list[int] = []
        self.replays = 0
        self.resets = 0
        self.error = error

    def reset(self) -> None:
        self.resets += 1

    def capture(self, core: Core, inputs: tuple[Tensor, ...]) -> tuple[object, object]:
        if self.error is not None:
            raise self.error
        self.captured.append(len(inputs[0]))
        outputs = core(*inputs)
        together = [outputs] if isinstance(outputs, Tensor) else outputs

        def replay() -> None:
            self.replays += 1
            again = core(*inputs)
            for target, source in zip(together, [again] if isinstance(again, Tensor) else again):
                target.copy_(source)

        return replay, outputs


class Doubling:
    """A core that counts how often it runs, and on how many items."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.batches.append(len(x))
        return 2 * x, None if y is None else 2 * y


def run(core: GraphedCore, batch: int, seed: int = 0, samples: int = 5) -> None:
    x, y = make_noise(batch, samples, seed), make_noise(batch, 3, seed + 1)
    doubled = core(x, y)
    assert torch.equal(doubled[0], 2 * x) and torch.equal(doubled[1], 2 * y)


def test_second_batch_of_a_size_is_captured_and_later_ones_replay() -> None:
    counting, core = CountingGraphs(), Doubling()
    graphed = GraphedCore(core, counting, sizes=(1, 2, 4))
    run(graphed, 3)
    assert (counting.captured, core.batches) == ([], [4]), "padded like the graph"
    for seed in range(5):
        run(graphed, 4 - seed % 2, seed)
    assert counting.captured == [4] and counting.replays == 5


def test_batch_is_padded_to_the_next_captured_size() -> None:
    counting = CountingGraphs()
    graphed = GraphedCore(Doubling(), counting, sizes=(2, 8))
    for batch in (1, 2, 5, 8, 7, 3):
        run(graphed, batch)
    assert counting.captured == [2, 8] and counting.replays == 4


def test_larger_batches_than_any_captured_size_run_eagerly() -> None:
    counting, core = CountingGraphs(), Doubling()
    graphed = GraphedCore(core, counting, sizes=(1, 2))
    for _ in range(3):
        run(graphed, 3)
    assert counting.captured == [] and core.batches == [3, 3, 3]


def test_earlier_outputs_survive_a_replay() -> None:
    graphed = GraphedCore(Doubling(), CountingGraphs(), sizes=(1,))
    first, second = make_noise(1, 5), make_noise(1, 5, seed=1)
    for _ in range(2):
        kept, _ = graphed(first, first)
    graphed(second, second)
    assert torch.equal(kept, 2 * first)


def test_core_without_a_waveform_branch_runs_eagerly() -> None:
    counting = CountingGraphs()
    graphed = GraphedCore(Doubling(), counting)
    for _ in range(3):
        assert graphed(torch.ones(1, 2), None)[1] is None
    assert counting.captured == []


def test_failed_capture_warns_once_and_runs_eagerly_for_good() -> None:
    core = Doubling()
    graphed = GraphedCore(core, CountingGraphs(RuntimeError("capture is not possible")))
    run(graphed, 1)
    with pytest.warns(UserWarning, match="no graph could be captured.*capture is not possible"):
        run(graphed, 1)
    run(graphed, 1)
    assert core.batches == [1, 1, 1]


def test_capture_without_memory_frees_all_graphs_and_fails() -> None:
    """The runner then retries with half of the batch."""
    counting = CountingGraphs()
    graphed = GraphedCore(Doubling(), counting, sizes=(1, 2))
    run(graphed, 1)
    run(graphed, 1)
    counting.error = torch.OutOfMemoryError("CUDA out of memory")
    run(graphed, 2)
    with pytest.raises(torch.OutOfMemoryError):
        run(graphed, 2)
    counting.error = None
    run(graphed, 1)
    run(graphed, 1)
    assert counting.captured == [1, 1] and counting.resets == 1


def test_windows_of_any_length_do_not_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MAX_GRAPHS", 2)
    counting = CountingGraphs()
    graphed = GraphedCore(Doubling(), counting, sizes=(1,))
    for samples in (4, 5, 6, 7):
        for _ in range(3):
            run(graphed, 1, samples=samples)
    assert counting.captured == [1, 1] and counting.replays == 4


def test_network_gives_the_same_stems_from_graphs() -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    counting = CountingGraphs()
    eager = optimize_for_gpu(network, Precision("float32"), torch.device("cpu"))
    graphed = optimize_for_gpu(network, Precision("float32"), torch.device("cpu"), graphs=counting)
    with torch.inference_mode():
        for seed, batch in enumerate((1, 1, 2, 2, 1)):
            mix = torch.stack([make_noise(2, 8000, seed + item) for item in range(batch)])
            assert torch.allclose(graphed(mix), eager(mix), atol=1e-6)
    assert counting.captured == [1, 2] and counting.replays == 3
