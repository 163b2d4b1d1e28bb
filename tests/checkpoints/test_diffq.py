"""Compare decoded quantized states with those that DiffQ restores, number by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.checkpoints.diffq import decode
from demucs_infer.checkpoints.reader import Package, read_package
from demucs_infer.errors import CheckpointError
from tests.helpers import malicious_checkpoints as malicious
from tests.helpers.oracles import require_module

DIFFQ = {"klass": malicious.GlobalName("diffq.diffq", "DiffQuantizer"), "packed": True}


class MixedSizeNetwork(nn.Module):
    """A network with parameters below and above the size limit, one of an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 200)
        self.inner = nn.Sequential(nn.Conv1d(8, 24, 5), nn.GroupNorm(2, 24))
        self.scale = nn.Parameter(torch.randn(16))


@pytest.fixture
def network() -> MixedSizeNetwork:
    torch.manual_seed(3)
    return MixedSizeNetwork()


def make_quantizer(name: str, network: nn.Module, **options: Any) -> Any:
    diffq = require_module("diffq")
    return getattr(diffq, name)(network, **options)


def save_and_read_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the state as it is read from a file that torch wrote."""
    path = folder / "q.th"
    klass = MixedSizeNetwork
    torch.save(
        {"klass": klass, "args": (), "kwargs": {}, "state": {**state, "__quantized": 1}}, path
    )
    package: Package = read_package(path)
    return dict(package.state)


def parameter_shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiffQuantizer", {"min_size": 0.0005, "group_size": 8}),
        ("DiffQuantizer", {"min_size": 0.0005, "group_size": 4, "float16": True}),
        ("DiffQuantizer", {"min_size": 0.0005, "group_size": 8, "exclude": ["wide*"]}),
        ("DiffQuantizer", {"min_size": 0.0005, "group_size": 8, "min_bits": 3, "max_bits": 14}),
        ("DiffQuantizer", {"min_size": 960 * 4 / 2**20, "group_size": 8}),  # `inner`, exactly
        ("UniformQuantizer", {"min_size": 0.0005, "bits": 8}),
        ("UniformQuantizer", {"min_size": 0.0005, "bits": 3}),
        ("UniformQuantizer", {"min_size": 0.0005, "bits": 12, "float16": True}),
        ("UniformQuantizer", {"min_size": 100.0}),
    ],
)
def test_weights_equal_those_that_diffq_restores(
    tmp_path: Path, network: MixedSizeNetwork, name: str, options: dict[str, Any], packed: bool
) -> None:
    quantizer = make_quantizer(name, network, **options)
    for module in network.modules():  # groups with many different bit widths
        for key, parameter in module.named_parameters(recurse=False):
            if key.endswith("_diffq"):
                parameter.data = torch.linspace(-3, 3, parameter.numel())
    state = quantizer.get_quantized_state(packed=packed)
    quantizer.detach()
    oracle = MixedSizeNetwork()
    require_module("diffq").restore_quantized_state(oracle, state)
    found = dict(decode(save_and_read_state(state, tmp_path), parameter_shapes(network)))
    wanted = dict(oracle.named_parameters())
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, wanted[key]), key  # the same roundings, in the same order


def test_groups_of_2_to_14_bits_are_decoded(tmp_path: Path) -> None:
    """Groups of each width are spread over more than one line of 2048 values."""
    network = nn.Linear(40, 13 * 64)
    quantizer = make_quantizer("DiffQuantizer", network, min_size=0.01, group_size=8)
    logit = dict(network.named_parameters())["weight_diffq"]
    target = torch.arange(2.05, 14.4, 0.95).repeat(logit.numel())[: logit.numel()]
    logit.data = torch.logit((target - 2) / 13)
    state = quantizer.get_quantized_state()
    quantizer.detach()
    widths = {index + 1 for index, pack in enumerate(state["quantized"][0][0]) if pack is not None}
    assert len(widths) >= 12
    oracle = nn.Linear(40, 13 * 64)
    require_module("diffq").restore_quantized_state(oracle, state)
    found = dict(decode(save_and_read_state(state, tmp_path), parameter_shapes(network)))
    assert torch.equal(found["weight"], oracle.weight)


# ── states made without a quantizer ──


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack values in the layout that the decoder documents, in the simplest way."""
    lines = -(-len(values) // 2048)
    words = [[[0] * 32 for _ in range(bits)] for _ in range(lines)]
    for index, value in enumerate(values.tolist()):
        line, rest = divmod(index, 2048)
        shift, word = divmod(rest, 32)
        for bit in range(bits):
            words[line][bit][word] |= (value >> bit & 1) << shift
    flat = [word - (word >> 63 << 64) for line in words for plane in line for word in plane]
    return torch.tensor(flat, dtype=torch.int64).view(lines, bits, 32)


def make_state(numel: int, **meta: Any) -> tuple[dict[str, Any], Tensor]:
    """Return a state of one parameter in groups of 8 with 3 and 5 bits, and its weights."""
    generator = torch.Generator().manual_seed(1)
    groups = numel // 8
    bits = torch.tensor([3, 5]).repeat(groups)[:groups]
    levels = torch.randint(0, 8, (groups, 8), generator=generator)
    planes: list[Tensor | None] = [None] * 14
    planes[2] = pack(levels[bits == 3].reshape(-1), 3)
    planes[4] = pack(levels[bits == 5].reshape(-1), 5)
    state = {
        "meta": {**DIFFQ, "init_kwargs": {"group_size": 8, "min_size": 0.0}, **meta},
        "others": [],
        "quantized": [(planes, (-1.0, 2.0), pack(bits - 2, 2))],
    }
    expected = levels / (2.0 ** bits[:, None] - 1) * 3 - 1
    return state, expected.reshape(-1)


@pytest.fixture
def read_state(tmp_path: Path) -> Iterator[Any]:
    """Return a function that writes a state to a file and reads it."""

    def through_file(state: dict[str, Any]) -> dict[str, Any]:
        klass = state["meta"].pop("klass")
        file = tmp_path / "q.th"
        torch.save({"klass": MixedSizeNetwork, "state": {**state, "__quantized": True}}, file)
        found = dict(read_package(file).state)
        program = malicious.make_archive(malicious.dumps(klass))
        (tmp_path / "klass.th").write_bytes(program)
        from demucs_infer.checkpoints.torch_file import read_torch_file

        found["meta"] = {**found["meta"], "klass": read_torch_file(tmp_path / "klass.th")}
        return found

    yield through_file


@pytest.mark.parametrize("numel", [16, 2048 * 8, 2048 * 8 + 24])
def test_bit_layout_is_as_documented(numel: int, read_state: Any) -> None:
    state, expected = make_state(numel)
    ((name, found),) = decode(read_state(state), {"w": torch.Size([numel // 8, 8])})
    assert name == "w"
    # Two float32 multiplications and an addition, on values up to 2.
    torch.testing.assert_close(found.reshape(-1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"klass": malicious.GlobalName("os", "system")}, "system"),
        ({"torch_pack": True}, "torch_pack"),
        ({"init_kwargs": {"group_size": 3, "min_size": 0.0}}, "groups of 3"),
        ({"init_kwargs": {"group_size": 0}}, "invalid quantizer parameters"),
        ({"init_kwargs": {"group_size": 8, "min_bits": "two"}}, "min_bits"),
        ({"init_kwargs": {"group_size": 8, "min_size": 1.0}}, "others"),
        ({"init_kwargs": {"group_size": 8, "min_size": 0, "min_bits": 13}}, "bits"),
        ({"init_kwargs": None}, "lacks the class or options"),
        ({"packed": False}, "quantized weights"),
    ],
)
def test_invalid_quantizer_metadata_is_refused(
    wrong: dict[str, Any], word: str, read_state: Any
) -> None:
    state, _ = make_state(64, **wrong)
    with pytest.raises(CheckpointError, match=word):
        dict(decode(read_state(state), {"w": torch.Size([64])}))


def test_groups_of_15_bits_are_refused(read_state: Any) -> None:
    """DiffQ's writer omits them, and its reader leaves them uninitialized."""
    state, _ = make_state(64)
    planes, limits, _ = state["quantized"][0]
    state["quantized"] = [(planes, limits, pack(torch.full((8,), 13), 4))]
    with pytest.raises(CheckpointError, match="with 15 bits"):
        dict(decode(read_state(state), {"w": torch.Size([64])}))


def test_packed_weights_of_wrong_size_are_refused(read_state: Any) -> None:
    state, _ = make_state(64)
    with pytest.raises(CheckpointError, match="packed values"):
        dict(decode(read_state(state), {"w": torch.Size([64 * 1024])}))
