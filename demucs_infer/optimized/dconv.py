"""Run the residual branches of a stage in place, in tiles that fit in the cache.

Shapes: R rows that are normalized independently, T steps of time, C channels, H hidden channels,
O = 2 C outputs of the second convolution, K taps.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import DConv
from demucs_infer.optimized.kernels import linear
from demucs_infer.optimized.layout import tiles


def supports(dconv: nn.Module | None) -> bool:
    """Tell whether `Branch` can replace all branches: none has an LSTM or attention."""
    return dconv is None or all(len(layer) == 7 for layer in cast(Any, dconv).layers)


class Branch:
    """One residual branch: convolution, norm, GELU, 1x1 convolution, norm, GLU and layer scale.

    Hidden tensors are (R, H, T), with time contiguous, because they have so few channels.
    """

    def __init__(self, layer: nn.Sequential) -> None:
        conv, norm, _, mix, mix_norm, _, scale = cast(Any, tuple(layer))
        (self._dilation,) = conv.dilation
        self._taps = conv.weight.detach().float().permute(2, 0, 1).contiguous()  # (K, H, C)
        self._conv_bias = conv.bias.detach().float()[:, None]
        self._hidden_norm = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps
        self._output_eps = mix_norm.eps
        self._weight = mix.weight.detach().float()[:, :, 0].contiguous()
        self._bias = mix.bias.detach().float()
        # The layer scale follows the GLU, so it multiplies the values and not the gates.
        gain = torch.cat([scale.scale.detach(), torch.ones_like(scale.scale)])
        self._output_gain = (mix_norm.weight.detach() * gain).double()
        self._output_shift = (mix_norm.bias.detach() * gain).double()
        # `_fold_norm` needs sums over the outputs of the 1x1 convolution.
        weight, bias = self._weight.double(), self._bias.double()
        self._weight_gram = weight.t() @ weight
        self._sum_weights = torch.stack([weight.sum(0), 2 * bias @ weight], dim=1)
        self._sum_constants = torch.stack([bias.sum(), bias.square().sum()])

    def add_to(self, y: Tensor) -> None:
        """Add the branch to `y` (R, T, C) in place."""
        rows, steps, channels = y.shape
        hidden = self._compute_hidden(y)
        weight, bias = self._fold_norm(hidden)
        parts = list(zip(bias[:, None].chunk(2, 2), weight.mT.chunk(2, 2), strict=True))
        for start, stop in tiles(steps, 8 * rows * channels):
            hidden_tile = hidden[..., start:stop].mT
            # Two separate tensors: see `SplitGate`.
            values, gates = (torch.baddbmm(shift, hidden_tile, gain) for shift, gain in parts)
            y[:, start:stop].addcmul_(values, gates.sigmoid_())

    def _compute_hidden(self, y: Tensor) -> Tensor:
        """Apply convolution, norm and GELU: (R, T, C) -> (R, H, T)."""
        # `F.group_norm` refuses rows of one number, as the innermost stage of a short window has.
        return F.gelu(torch.group_norm(self._convolve(y), 1, *self._hidden_norm))

    def _convolve(self, y: Tensor) -> Tensor:
        """Convolve (R, T, C) -> (R, H, T): multiply by all taps at once, then add with delays."""
        rows, steps, channels = y.shape
        products = linear(self._taps.flatten(0, 1), y.view(-1, channels))
        taps = products.view(*self._taps.shape[:2], rows, steps).transpose(1, 2)
        middle = len(taps) // 2
        sums = torch.add(taps[middle], self._conv_bias, out=y.new_empty(taps.shape[1:]))
        for index, tap in enumerate(taps):
            delay = (middle - index) * self._dilation
            if delay > 0:
                sums[..., delay:].add_(tap[..., :-delay])
            elif delay < 0:
                sums[..., :delay].add_(tap[..., -delay:])
        return sums

    def _fold_norm(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Fold the norm into the convolution before it: (R, H, T) -> weight (R, O, H), bias (R, O).

        Mean and variance of `W h + b` over all steps follow from the sums of `h` and `h hᵀ`, so
        they are known before the wide output is computed.
        """
        steps, outputs = hidden.shape[-1], len(self._bias)
        hidden = hidden.double()  # long sums in float32 would be 20 dB less exact
        sums = hidden.sum(2) @ self._sum_weights + steps * self._sum_constants
        sums[:, 1].add_(((hidden @ hidden.mT) * self._weight_gram).sum((1, 2)))
        mean, square = (sums / (steps * outputs)).chunk(2, 1)
        gain = self._output_gain * torch.rsqrt(square - mean**2 + self._output_eps)
        bias = (self._bias - mean) * gain + self._output_shift
        return gain.float()[..., None] * self._weight, bias.float()


class FastDConv:
    """`DConv`: the residual branches of a stage."""

    def __init__(self, dconv: DConv) -> None:
        self._branches = [Branch(cast(nn.Sequential, layer)) for layer in dconv.layers]

    def add_to(self, y: Tensor) -> None:
        """Add every branch to `y` (R, T, C) in place."""
        for branch in self._branches:
            branch.add_to(y)
