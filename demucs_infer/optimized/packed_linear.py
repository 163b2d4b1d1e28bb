"""Make a copy of any network that is faster on a CPU and takes less memory there.

Its linear layers have packed weights, and modules for which that is possible run in pieces.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from demucs_infer.optimized import kernels
from demucs_infer.optimized.pieces import FORWARDS, run_in_pieces

MIN_FEATURES = 16
"""Below, a packed product is not faster."""


class PackedLinear(nn.Linear):
    """A linear layer that computes with packed weights, and shares the original ones."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = kernels.Linear(linear.weight, linear.bias, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., C) by the weights: (..., O)."""
        return self._packed(input).to(input.dtype)


def find_packable_children(network: object) -> tuple[str, ...]:
    """Return the children of a custom network's inner network whose linear layers may be packed."""
    inner = getattr(network, "model", None)
    names: tuple[str, ...] = getattr(inner, "packable_children", ())
    return names


def pack_linear_layers(network: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> nn.Module:
    """Return a copy of `network` whose linear layers under the children `names` are packed.

    Modules there that are in the network's `itemwise_classes` run in pieces, and so do those in its
    `piecewise_classes`, by the functions of `FORWARDS`. All other modules are shared, and all
    weights.
    """
    itemwise: tuple[type[nn.Module], ...] = getattr(network, "itemwise_classes", ())
    piecewise: tuple[type[nn.Module], ...] = getattr(network, "piecewise_classes", ())
    fast = _copy_module(network)
    for name in names:
        child = network._modules.get(name)
        if child is not None:
            fast._modules[name] = _optimize(child, dtype, itemwise, piecewise, {})
    return fast


def release_originals(fast: nn.Module) -> bool:
    """Free the weights that `fast` and its original share, and return whether there were any.

    The original can then neither be run nor saved.
    """
    layers = [module for module in fast.modules() if isinstance(module, PackedLinear)]
    for layer in layers:
        layer.weight.data = layer.weight.new_empty(0)
    return bool(layers)


def _optimize(
    module: nn.Module,
    dtype: torch.dtype,
    itemwise: tuple[type[nn.Module], ...],
    piecewise: tuple[type[nn.Module], ...],
    copies: dict[nn.Module, nn.Module],
) -> nn.Module:
    """Return the optimized copy of a module; one that occurs twice is copied once."""
    if module in copies:
        return copies[module]
    result = module
    if type(module) is nn.Linear:
        if min(module.in_features, module.out_features) >= MIN_FEATURES:
            result = PackedLinear(module, dtype)
    elif any(type(part) in (nn.Linear, *itemwise, *piecewise) for part in module.modules()):
        result = _copy_module(module)
        for name, child in module.named_children():
            result._modules[name] = _optimize(child, dtype, itemwise, piecewise, copies)
        if type(module) in itemwise:
            run_in_pieces(result)
        elif type(module) in piecewise:
            result.__dict__["forward"] = partial(FORWARDS[type(module).__name__], result)
    copies[module] = result
    return result


def _copy_module(module: nn.Module) -> nn.Module:
    result = copy.copy(module)
    result._modules = dict(module._modules)
    return result
