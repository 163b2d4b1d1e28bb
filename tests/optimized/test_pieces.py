"""Test that modules in pieces compute what they compute at once."""

from pathlib import Path

import pytest
import torch
from torch import nn

from demucs_infer import Config
from demucs_infer.custom.build import load_network
from demucs_infer.optimized import pieces
from demucs_infer.optimized.optimize import optimize
from demucs_infer.optimized.packed_linear import pack_linear_layers
from tests.helpers.audio_signals import make_noise
from tests.helpers.community import CONFIGS, decibels, write_files
from tests.helpers.oracles import require_module


class Block(nn.Module):
    """A block of which each item is transformed alone; it records the sizes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return torch.tanh(self.layer(x))


def test_items_run_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Module()
    network.body = Block().eval()
    network.itemwise_classes = (Block,)  # type: ignore[assignment]
    fast = pack_linear_layers(network, ("body",), torch.float32)
    x = torch.randn(7, 5, 32)
    monkeypatch.setattr(pieces, "MAX_VALUES", 3 * 5 * 32)
    with torch.inference_mode():
        expected = network.body(x)
        network.body.sizes.clear()
        assert decibels(expected, fast.body(x)) >= 110  # type: ignore[operator]
    assert network.body.sizes == [3, 3, 1]  # the copy shares the list


@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize(
    "kind", ["bs_roformer, four stems", "mel_band_roformer, one target", "scnet, two stems"]
)
def test_networks_compute_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_module("pymss_core")
    config, checkpoint = write_files(CONFIGS[kind], tmp_path)
    network = load_network(Config.from_file(config), checkpoint)
    window = make_noise(2, network.chunk_size)[None]
    calls: list[int] = []
    run = pieces._run
    monkeypatch.setattr(pieces, "MAX_VALUES", 3000)
    monkeypatch.setattr(pieces, "_run", lambda f, x: (calls.append(len(x)), run(f, x))[1])
    with torch.inference_mode():
        assert decibels(network(window), optimize(network)(window)) >= 110
    assert max(calls) > 1
