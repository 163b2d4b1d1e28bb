"""Test that networks of the community compute the same in pieces as in one go."""

from pathlib import Path

import pytest
import torch

from demucs_infer import Config
from demucs_infer.custom.build import load_network
from demucs_infer.optimized import pieces
from demucs_infer.optimized.optimize import optimize
from tests.helpers.community import CONFIGS, decibels, write_files
from tests.helpers.oracles import require_module

CASES = {
    "scnet": ("scnet, four stems", {}),
    "scnet, other depths": ("scnet, two stems", {}),
    "mdx23c, norm of each channel": ("mdx23c, two stems", {}),
    "mdx23c, norm of the training": ("mdx23c, one target", {}),
    "mdx23c, norm of groups": ("mdx23c, two stems", {"norm": "GroupNorm2"}),
    "mdx23c, no norm": ("mdx23c, two stems", {"norm": "none", "act": "elu1.0"}),
}


@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize("case", CASES)
def test_pieces_give_the_same_stems(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_module("pymss_core")
    base, changes = CASES[case]
    config = {**CONFIGS[base], "model": {**CONFIGS[base]["model"], **changes}}
    config_path, checkpoint = write_files(config, tmp_path)
    network = load_network(Config.from_file(config_path), checkpoint).eval()
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(2, 2, network.chunk_size, generator=generator)
    fast = optimize(network)
    replaced = [module for module in fast.modules() if "forward" in module.__dict__]
    assert {type(module).__name__ for module in replaced} & set(pieces.FORWARDS)
    for name in ("MAX_VALUES", "MAX_ROW_VALUES", "MAX_LINE_VALUES"):
        monkeypatch.setattr(pieces, name, 5000)  # several pieces, of several rows
    with torch.inference_mode():
        assert decibels(network(mix), fast(mix)) >= 100
