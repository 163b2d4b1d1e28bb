"""The state dicts of the released shapes: names, shapes and order, as in `tests/contracts`.

`python -m tests.checkpoints.test_state_dict` writes the contracts anew from upstream's own classes.
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
FIRST: dict[str, Any] = {
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
    "demucs_v2": ("Demucs", FIRST),
    "demucs_v1": ("Demucs", FIRST | {"normalize": False, "resample": False, "channels": 100}),
}
OURS: dict[str, type[nn.Module]] = {"Demucs": Demucs, "HDemucs": HDemucs, "HTDemucs": HTDemucs}
UPSTREAM: dict[str, type[nn.Module]] = {
    "Demucs": demucs.demucs.Demucs,
    "HDemucs": demucs.hdemucs.HDemucs,
    "HTDemucs": demucs.htdemucs.HTDemucs,
}


def contract(network: nn.Module) -> dict[str, list[int]]:
    """Every tensor of a state dict and its shape, in order."""
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


def write() -> None:
    """One file for each released shape, a tensor a line, from upstream's own classes."""
    for name, (kind, arguments) in RELEASED.items():
        tensors = contract(UPSTREAM[kind](**arguments))
        lines = ",\n".join(f"{json.dumps(key)}: {shape}" for key, shape in tensors.items())
        (CONTRACTS / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


def stored(name: str) -> dict[str, list[int]]:
    tensors: dict[str, list[int]] = json.loads((CONTRACTS / f"{name}.json").read_text())
    return tensors


@pytest.mark.parametrize("name", RELEASED)
def test_the_state_dict_is_the_released_one(name: str) -> None:
    kind, arguments = RELEASED[name]
    with torch.device("meta"):
        network = OURS[kind](**arguments)
    # Lists, not dicts: quantised states name parameters by their order.
    assert list(contract(network).items()) == list(stored(name).items())
    assert [key for key, _ in network.named_parameters()] == list(stored(name))
    assert not list(network.buffers())


def test_the_contract_of_a_released_file_is_what_upstream_builds() -> None:
    """The smallest one; the others are written by the same lines."""
    kind, arguments = RELEASED["htdemucs_6s"]
    assert list(contract(UPSTREAM[kind](**arguments)).items()) == list(
        stored("htdemucs_6s").items()
    )


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("htdemucs", 533, 41_984_456)])
def test_sizes_are_those_of_the_released_files(name: str, tensors: int, parameters: int) -> None:
    shapes = stored(name).values()
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


if __name__ == "__main__":
    write()
