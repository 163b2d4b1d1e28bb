"""Networks of the released shapes have the state dicts in `tests/contracts`: names, shapes, order.

`python -m tests.checkpoints.test_state_dict` regenerates the contracts from upstream's classes.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import demucs.demucs
import demucs.hdemucs
import demucs.htdemucs
import pytest
import torch
from torch import nn

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

CONTRACTS = Path(__file__).parents[1] / "contracts"
FOUR = ["drums", "bass", "other", "vocals"]
# The version of 2019 and 2020: no norms, no residual branches, one LSTM at the bottom.
V1_AND_V2: dict[str, Any] = {
    "sources": FOUR,
    "lstm_layers": 2,
    "gelu": False,
    "norm_starts": 999,
    "dconv_mode": 0,
}
TRANSFORMER: dict[str, Any] = {
    "channels": 48,
    "depth": 4,
    "dconv_mode": 3,
    "t_layers": 5,
    "segment": Fraction(39, 5),
}
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "htdemucs": ("HTDemucs", {"sources": FOUR, "bottom_channels": 512} | TRANSFORMER),
    "htdemucs_6s": ("HTDemucs", {"sources": [*FOUR, "guitar", "piano"]} | TRANSFORMER),
    "hdemucs_mmi": ("HDemucs", {"sources": FOUR, "segment": 44}),
    "mdx_hybrid": ("HDemucs", {"sources": FOUR, "hybrid_old": True, "segment": 44}),
    "mdx_time": ("Demucs", {"sources": FOUR, "segment": 44}),
    "demucs_v2": ("Demucs", V1_AND_V2),
    "demucs_v1": ("Demucs", V1_AND_V2 | {"normalize": False, "resample": False, "channels": 100}),
}
CLASSES: dict[str, type[nn.Module]] = {"Demucs": Demucs, "HDemucs": HDemucs, "HTDemucs": HTDemucs}
UPSTREAM: dict[str, type[nn.Module]] = {
    "Demucs": demucs.demucs.Demucs,
    "HDemucs": demucs.hdemucs.HDemucs,
    "HTDemucs": demucs.htdemucs.HTDemucs,
}


def list_shapes(network: nn.Module) -> dict[str, list[int]]:
    """Return the shape of every tensor of a state dict, in order."""
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


def write_contracts() -> None:
    """Write one file per released shape, one tensor per line, from upstream's own classes."""
    for name, (kind, arguments) in RELEASED.items():
        tensors = list_shapes(UPSTREAM[kind](**arguments))
        lines = ",\n".join(f"{json.dumps(key)}: {shape}" for key, shape in tensors.items())
        (CONTRACTS / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


def read_contract(name: str) -> dict[str, list[int]]:
    tensors: dict[str, list[int]] = json.loads((CONTRACTS / f"{name}.json").read_text())
    return tensors


@pytest.mark.parametrize("name", RELEASED)
def test_state_dict_matches_the_released_one(name: str) -> None:
    kind, arguments = RELEASED[name]
    with torch.device("meta"):
        network = CLASSES[kind](**arguments)
    # Lists, because quantized states refer to parameters by their order.
    assert list(list_shapes(network).items()) == list(read_contract(name).items())
    assert [key for key, _ in network.named_parameters()] == list(read_contract(name))
    assert not list(network.buffers())


def test_contract_matches_what_upstream_builds() -> None:
    """The smallest one; the others are written by the same code."""
    kind, arguments = RELEASED["htdemucs_6s"]
    assert list(list_shapes(UPSTREAM[kind](**arguments)).items()) == list(
        read_contract("htdemucs_6s").items()
    )


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("htdemucs", 533, 41_984_456)])
def test_contract_has_the_size_of_the_released_file(
    name: str, tensors: int, parameters: int
) -> None:
    shapes = read_contract(name).values()
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


if __name__ == "__main__":
    write_contracts()
