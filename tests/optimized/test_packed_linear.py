"""Test that packed linear layers compute the same sums, and leave the original network alone."""

import pytest
import torch
from torch import nn

from demucs_infer.optimized.packed_linear import PackedLinear, pack_linear_layers, release_originals
from tests.helpers.community import decibels


class Shared(nn.Module):
    """Two children with the same linear layer, one of them not to be packed."""

    def __init__(self) -> None:
        super().__init__()
        linear = nn.Linear(32, 48)
        self.body = nn.Sequential(linear, nn.GELU(), nn.Linear(48, 32), nn.Linear(32, 4))
        self.head = nn.ModuleList([linear])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 5, 32)], ids=str)
def test_sums_are_the_same(shape: tuple[int, ...]) -> None:
    network = Shared().eval()
    fast = pack_linear_layers(network, ("body", "missing"), torch.float32)
    x = torch.randn(shape)
    with torch.inference_mode():
        expected, actual = network(x), fast(x)
    assert actual.shape == expected.shape
    assert decibels(expected, actual) >= 110


def test_only_named_children_are_packed_and_weights_are_shared() -> None:
    network = Shared()
    fast = pack_linear_layers(network, ("body",), torch.float32)
    kinds = [type(module) for module in fast.body]  # type: ignore[union-attr]
    assert kinds == [PackedLinear, nn.GELU, PackedLinear, nn.Linear]  # the last one is too small
    assert type(fast.head[0]) is nn.Linear  # type: ignore[index]
    assert all(type(module) is not PackedLinear for module in network.modules())
    assert fast.body[0].weight is network.body[0].weight  # type: ignore[index]
    assert fast.state_dict().keys() == network.state_dict().keys()


def test_original_weights_can_be_freed() -> None:
    network = Shared().eval()
    x = torch.randn(5, 32)
    with torch.inference_mode():
        expected = network(x)
    fast = pack_linear_layers(network, ("body",), torch.float32)
    assert release_originals(fast)
    assert network.body[0].weight.numel() == 0  # type: ignore[union-attr]
    with torch.inference_mode():
        assert decibels(expected, fast(x)) >= 110
    assert not release_originals(nn.Linear(32, 32))
