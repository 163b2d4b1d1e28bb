"""What only a GPU can show; `python -m tests.bench.gpu` shows more of it at the released shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from demucs_infer import Separator
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.gpu.arithmetic import PRECISIONS
from demucs_infer.optimized.gpu.build import optimize_for_gpu
from demucs_infer.optimized.gpu.graphs import CudaGraphs
from demucs_infer.states import save_with_checksum, serialize_model
from tests.helpers.audio_signals import make_noise
from tests.helpers.bursts import decibels, make_corpus
from tests.helpers.networks import TINY, randomize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CORPUS = make_corpus(8000)
LEAST = {"fp32": 100, "fp16": 60}


def make_network() -> HTDemucs:
    network: Any = randomize(HTDemucs(**TINY["HTDemucs"]))
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    return network  # type: ignore[no-any-return]


@pytest.mark.parametrize("window", [name for name in CORPUS if name != "silence"])
@pytest.mark.parametrize("precision", LEAST)
def test_windows_equal_those_on_a_cpu(precision: str, window: str) -> None:
    network, mix = make_network(), CORPUS[window][None]
    device = torch.device("cuda")
    with torch.inference_mode():
        expected = network(mix)
        graphs = CudaGraphs(device)
        fast = optimize_for_gpu(network.to(device), PRECISIONS[precision], device, graphs=graphs)
        for _ in range(3):  # eager, captured, replayed
            assert decibels(expected, fast(mix.to(device)).cpu()) >= LEAST[precision]


@pytest.mark.parametrize("precision", LEAST)
def test_track_gives_the_same_samples_on_a_cpu_and_again(precision: Any, tmp_path: Path) -> None:
    save_with_checksum(serialize_model(make_network(), {}), tmp_path / "abc.th")
    (tmp_path / "tiny.yaml").write_text("models: [abc]\n")
    mix = make_noise(2, 50_000)
    _, expected = Separator("tiny", tmp_path, "cpu", shifts=0).separate_tensor(mix)
    separator = Separator("tiny", tmp_path, "cuda", shifts=0, precision=precision)
    runs = [separator.separate_tensor(mix)[1] for _ in range(3)]
    for name, stem in expected.items():
        assert decibels(stem, runs[0][name]) >= LEAST[precision]
        assert torch.equal(runs[0][name], runs[1][name])
        assert torch.equal(runs[0][name], runs[2][name])
