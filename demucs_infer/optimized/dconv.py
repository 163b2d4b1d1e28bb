"""The residual branches of a level, in place and in tiles that stay in the cache.

Shapes: R rows that are normalised each by itself, T steps of time, C channels, H hidden ones.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import DConv
from demucs_infer.optimized.kernels import linear
from demucs_infer.optimized.layout import tiles


def plain(dconv: nn.Module | None) -> bool:
    """Whether the branches are what `Branch` knows: no LSTM, no attention."""
    return dconv is None or all(len(layer) == 7 for layer in cast(Any, dconv).layers)


class Branch:
    """One residual branch of a DConv: convolution, norm, GELU, mixing, norm, gate and scale.

    There are so few hidden channels that time is what lies side by side in them.
    """

    def __init__(self, layer: nn.Sequential) -> None:
        conv, norm, _, mix, mix_norm, _, scale = cast(Any, tuple(layer))
        (self._dilation,) = conv.dilation
        self._taps = conv.weight.detach().float().permute(2, 0, 1).contiguous()  # (K H C)
        self._shift = conv.bias.detach().float()[:, None]
        self._norm = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps
        self._eps = mix_norm.eps
        self._weight = mix.weight.detach().float()[:, :, 0].contiguous()
        self._bias = mix.bias.detach().float()
        # The scale that follows the gate multiplies the half that is not the gate.
        gain = torch.cat([scale.scale.detach(), torch.ones_like(scale.scale)])
        self._mix_gain = (mix_norm.weight.detach() * gain).double()
        self._mix_shift = (mix_norm.bias.detach() * gain).double()
        # What `_normalised` asks of the mixing: sums over its outputs.
        weight, bias = self._weight.double(), self._bias.double()
        self._squares = weight.t() @ weight
        self._sums = torch.stack([weight.sum(0), 2 * bias @ weight], dim=1)
        self._rest = torch.stack([bias.sum(), bias.square().sum()])

    def add_to(self, y: Tensor) -> None:
        """`y` (R T C), in place."""
        rows, steps, channels = y.shape
        hidden = self._hidden(y)
        weight, bias = self._normalised(hidden)
        parts = list(zip(bias[:, None].chunk(2, 2), weight.mT.chunk(2, 2), strict=True))
        for start, stop in tiles(steps, 8 * rows * channels):
            some = hidden[..., start:stop].mT
            # Apart in memory: see `SplitGate`.
            values, gates = (torch.baddbmm(shift, some, gain) for shift, gain in parts)
            y[:, start:stop].addcmul_(values, gates.sigmoid_())

    def _hidden(self, y: Tensor) -> Tensor:
        """(R T C) -> (R H T): convolution, norm, GELU."""
        # Not `F.group_norm`, which refuses a single number: a short window's innermost row.
        return F.gelu(torch.group_norm(self._convolved(y), 1, *self._norm))

    def _convolved(self, y: Tensor) -> Tensor:
        """One product for all taps, which are then added up where they belong."""
        rows, steps, channels = y.shape
        wide = linear(self._taps.flatten(0, 1), y.view(-1, channels))
        taps = wide.view(*self._taps.shape[:2], rows, steps).transpose(1, 2)
        middle = len(taps) // 2
        sums = torch.add(taps[middle], self._shift, out=y.new_empty(taps.shape[1:]))
        for index, tap in enumerate(taps):
            late = (middle - index) * self._dilation
            if late > 0:
                sums[..., late:].add_(tap[..., :-late])
            elif late < 0:
                sums[..., :late].add_(tap[..., -late:])
        return sums

    def _normalised(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The mixing with the norm after it folded in: (R H T) -> (R O H) and (R O).

        Mean and variance of `W h + b` over all steps follow from the sums of `h` and `h hᵀ`, so
        the wide result needs no pass of its own to be measured.
        """
        steps, outputs = hidden.shape[-1], len(self._bias)
        hidden = hidden.double()  # in float32, long sums would lose 20 dB here
        sums = hidden.sum(2) @ self._sums + steps * self._rest
        sums[:, 1].add_(((hidden @ hidden.mT) * self._squares).sum((1, 2)))
        mean, square = (sums / (steps * outputs)).chunk(2, 1)
        gain = self._mix_gain * torch.rsqrt(square - mean**2 + self._eps)
        bias = (self._bias - mean) * gain + self._mix_shift
        return gain.float()[..., None] * self._weight, bias.float()


class FastDConv:
    """The residual branches of a level."""

    def __init__(self, dconv: DConv) -> None:
        self._branches = [Branch(cast(nn.Sequential, layer)) for layer in dconv.layers]

    def add_to(self, y: Tensor) -> None:
        """`y` (R T C), in place."""
        for branch in self._branches:
            branch.add_to(y)
