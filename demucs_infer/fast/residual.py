"""The residual branches of a level, in place and in tiles that stay in the cache.

Shapes: C channels, T steps of time, R rows that are normalised each by itself.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.fast.kernels import Conv, Linear, linear
from demucs_infer.fast.memory import rows_of, tiles
from demucs_infer.layers import DConv


def plain(dconv: nn.Module | None) -> bool:
    """Whether the branches are what `Branch` knows: no LSTM, no attention."""
    return dconv is None or all(len(layer) == 7 for layer in cast(Any, dconv).layers)


class Branch:
    """One residual branch of a DConv, added in place."""

    def __init__(self, layer: nn.Sequential) -> None:
        conv, self._norm, _, mix, norm, _, scale = cast(Any, tuple(layer))
        self.hidden = conv.out_channels
        dilation = conv.dilation[0]
        self._conv = Conv(
            conv.weight[:, :, None],
            conv.bias,
            torch.float32,
            padding=(0, dilation),
            dilation=(1, dilation),
        )
        # The scale that follows the gate multiplies the half that is not the gate.
        gain = torch.cat([scale.scale.detach(), torch.ones_like(scale.scale)])
        self._gain = (norm.weight.detach() * gain).contiguous()
        self._shift = (norm.bias.detach() * gain).contiguous()
        self._eps = norm.eps
        self._weight = mix.weight.detach()[:, :, 0].contiguous()
        self._bias = mix.bias.detach()
        self._mix = Linear(self._weight, self._bias, torch.float32)
        self._tables: dict[int, tuple[Tensor, ...]] = {}

    def add_to_rows(self, y: Tensor) -> None:
        """Every row (T C) of `y` (R T C) by itself."""
        rows, steps, _ = y.shape
        gain, shift, wide_gain, wide_shift = self._tables_for(steps)
        hidden = rows_of(self._conv(y.permute(2, 0, 1)[None])[0]).reshape(rows, -1)
        hidden = F.layer_norm(hidden, hidden.shape[1:], gain, shift, self._norm.eps)
        hidden = F.gelu(hidden).view(rows * steps, self.hidden)
        wide = self._mix(hidden).view(rows, -1)
        wide = F.layer_norm(wide, wide.shape[1:], wide_gain, wide_shift, self._eps)
        y += F.glu(wide.view(rows, steps, -1), -1)

    def _tables_for(self, steps: int) -> tuple[Tensor, ...]:
        """The affine parts of the norms, for every step: a norm over a row takes one each."""
        if steps not in self._tables:
            parts = (self._norm.weight, self._norm.bias, self._gain, self._shift)
            self._tables = {steps: tuple(part.detach().repeat(steps) for part in parts)}
        return self._tables[steps]

    def add_to_whole(self, y: Tensor) -> None:
        """`y` (T C) as one row, too long for the cache."""
        hidden = self._conv(y.t()[None, :, None])[0, :, 0].t()  # (T C)
        hidden -= hidden.mean()
        gain = self._norm.weight * torch.rsqrt(hidden.square().mean() + self._norm.eps)
        hidden = F.gelu(torch.addcmul(self._norm.bias, hidden, gain))
        weight, bias = self._normalised(hidden)
        for start, stop in tiles(len(y), 8 * y.shape[1]):
            y[start:stop] += F.glu(linear(hidden[start:stop], weight, bias), -1)

    def _normalised(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The mixing weights with the norm after them folded in.

        Mean and variance of `W h + b` over all steps follow from the sums of `h` and `h hᵀ`, so
        the wide result needs no pass of its own to be measured.
        """
        count = len(hidden)
        hidden = hidden.double()  # tens of thousands of steps: float32 would lose 20 dB here
        total, gram = hidden.sum(0), hidden.t() @ hidden
        weight, bias = self._weight.double(), self._bias.double()
        sums = weight @ total + count * bias
        squares = ((weight @ gram) * weight).sum(1) + 2 * bias * (weight @ total) + count * bias**2
        size = count * len(bias)
        mean = sums.sum() / size
        gain = self._gain * torch.rsqrt(squares.sum() / size - mean**2 + self._eps)
        return (gain[:, None] * weight).float(), ((bias - mean) * gain + self._shift).float()


class FastDConv:
    """The residual branches of a level, in place."""

    def __init__(self, dconv: DConv) -> None:
        self._branches = [Branch(cast(nn.Sequential, layer)) for layer in dconv.layers]

    def over_rows(self, y: Tensor) -> None:
        for branch in self._branches:
            branch.add_to_rows(y)

    def over_whole(self, y: Tensor) -> None:
        for branch in self._branches:
            branch.add_to_whole(y)
