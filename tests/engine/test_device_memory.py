"""A device that runs out of memory at any allocation, and one that computes nothing."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from demucs_infer.engine.network import Ensemble
from demucs_infer.engine.pipeline import Block, TensorTrack, separate
from demucs_infer.engine.runner import Runner
from demucs_infer.events import BatchSizeReduced, Event
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.gpu.arithmetic import PRECISIONS, Precision
from demucs_infer.optimized.gpu.build import optimize_for_gpu
from demucs_infer.options import SeparationOptions
from tests.bench.steps import make_released_network
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, ScaleModel, randomize
from tests.optimized.test_graphs import CountingGraphs

CPU = torch.device("cpu")


class FailingAllocator(TorchDispatchMode):
    """Run out of memory at one operation that makes a tensor."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shares = any(alias.alias_info is not None for alias in func._schema.returns)
        if not shares:  # neither a view nor in place
            self.count += 1
            if self.count == self.fail_at:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return result


class FailingNetwork(nn.Module):
    """A fast network that runs out of memory in its first forward, and again in later ones."""

    def __init__(self, network: nn.Module, fail_at: int) -> None:
        super().__init__()
        self.network = network
        self.sources = network.sources
        self.allocator = FailingAllocator(fail_at)
        self.released = 0

    def forward(self, mix: Tensor) -> Tensor:
        with self.allocator:
            result: Tensor = self.network(mix)
        return result

    def release_memory(self) -> None:
        self.released += 1


def run(prepared: Any, network: Any, batch: int) -> tuple[Tensor, list[Event]]:
    options = SeparationOptions(shifts=0, batch_size=batch, precision="fp32")
    runner = Runner(CPU, prepare=lambda _network, _precision: prepared)
    items = list(
        separate(
            TensorTrack(make_noise(2, 28_000)), Ensemble((network,)), options=options, runner=runner
        )
    )
    stems = torch.cat([item.stems for item in items if isinstance(item, Block)], dim=-1)
    return stems, [item for item in items if not isinstance(item, Block)]


@pytest.fixture(scope="module")
def network() -> HTDemucs:
    return randomize(HTDemucs(**TINY["HTDemucs"]))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def expected(network: HTDemucs) -> Tensor:
    return run(optimize_for_gpu(network, Precision("float32"), CPU), network, 4)[0]


@pytest.mark.parametrize("fail_at", [1, 2, 17, 100, 250, 400])
def test_stems_are_right_wherever_memory_runs_out(
    fail_at: int, network: HTDemucs, expected: Tensor
) -> None:
    graphs = CountingGraphs()
    fast = optimize_for_gpu(network, Precision("float32"), CPU, graphs=graphs)
    failing = FailingNetwork(fast, fail_at)
    stems, events = run(failing, network, 4)
    reduced = [event for event in events if isinstance(event, BatchSizeReduced)]
    assert [(event.old, event.new) for event in reduced] == [(4, 2)]
    assert failing.released == 1, "graphs keep memory that the next try needs"
    assert torch.allclose(stems, expected, atol=1e-5)


def test_released_graphs_are_captured_anew(network: HTDemucs) -> None:
    graphs = CountingGraphs()
    fast = optimize_for_gpu(network, Precision("float32"), CPU, graphs=graphs)
    mix = make_noise(2, 8000)[None]
    with torch.inference_mode():
        outputs = [fast(mix) for _ in range(2)]
        fast.release_memory()  # type: ignore[operator]
        outputs += [fast(mix) for _ in range(2)]
    assert graphs.captured == [1, 1]
    assert all(torch.allclose(output, outputs[0], atol=1e-6) for output in outputs)


def test_runner_releases_the_memory_of_all_its_networks() -> None:
    networks = [ScaleModel(), ScaleModel()]
    prepared = {id(network): FailingNetwork(network, fail_at=0) for network in networks}
    runner = Runner(CPU, prepare=lambda network, _precision: prepared[id(network)])
    options = SeparationOptions(shifts=0)
    for network in networks:
        runner.infer(network, make_noise(2, 100)[None], [0], options)
    runner.release_memory(networks[0])
    assert [fast.released for fast in prepared.values()] == [1, 0]
    runner.release_memory()
    assert [fast.released for fast in prepared.values()] == [2, 1]


class CountOperations(TorchDispatchMode):
    """Count operations; one that reads a value would stop a GPU, and the capture of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "item" not in name and "_local_scalar_dense" not in name, name
        self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_core_of_the_released_shape_never_waits_for_a_value(precision: str) -> None:
    """A meta device has shapes and types but no numbers: whatever reads one fails."""
    network = make_released_network().to("meta")
    fast: Any = optimize_for_gpu(network, PRECISIONS[precision], torch.device("meta"))
    batch = 16
    planes = torch.empty(batch, 4, 2048, 336, device="meta")
    waves = torch.empty(batch, 2, 343_980, device="meta")
    with torch.inference_mode(), CountOperations() as operations:
        spectra, stems = fast.estimate(planes, waves)
    assert spectra.shape == (batch, 16, 2048, 336) and spectra.dtype == torch.float32
    assert stems.shape == (batch, 8, 343_980) and stems.dtype == torch.float32
    products = ("conv2d.default", "conv_transpose2d.input", "linear.default")
    assert [operations.names[f"aten.{name}"] for name in products] == [48, 8, 88]


def test_whole_network_of_the_released_shape_keeps_shapes_on_a_meta_device() -> None:
    network = make_released_network().to("meta")
    fast: Any = optimize_for_gpu(
        network, PRECISIONS["fp16"], torch.device("meta"), complex_numbers=False
    )
    with torch.inference_mode():
        stems = fast.forward_stems(torch.empty(3, 2, 343_980, device="meta"), [1, 3])
    assert stems.shape == (3, 2, 2, 343_980)
