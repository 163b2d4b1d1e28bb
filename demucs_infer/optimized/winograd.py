"""A convolution over three neighbouring bins with two thirds of the products.

Two results side by side take six products of a bin with a tap; of sums and differences of bins with
those of taps, four are enough (Winograd 1980). What is added before and after is whole rows.

Shapes: C channels in, O channels out, R rows of bins, T steps of time.
"""

import torch
from torch import Tensor

from demucs_infer.optimized.kernels import Conv, SplitGate
from demucs_infer.optimized.layout import empty_last, rows_of

_WIDE = 96
"""Channels from which on the products that are saved outweigh the sums."""


def supports(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is worth it: in half the bits products are too cheap for the sums around them."""
    outputs, channels, bins = weight.shape[:3]
    return bins == 3 and min(outputs // 2, channels) >= _WIDE and dtype == torch.float32


class WinogradConv:
    """As `SplitGate` of a convolution over three bins, two rows of results at a time."""

    together = 2

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, across: int
    ) -> None:
        before, at, behind = weight.detach().double().unbind(2)
        both, turned = (before + behind + at) / 2, (before + behind - at) / 2
        padding = (0, across)
        self._products = [
            # The second is part of both results, and so carries the bias to both.
            SplitGate(
                Conv, taps[:, :, None], bias if taps is both else None, dtype, padding=padding
            )
            for taps in (before, both, turned, behind)
        ]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1 C R+2 T) with an even R -> values and gates, each (1 O/2 R T)."""
        rows = rows_of(x[0])
        first, second, third, fourth = rows[:-2:2], rows[1:-2:2], rows[2::2], rows[3::2]
        inputs = first - third, second + third, third - second, second - fourth
        products = [
            product(rows.permute(2, 0, 1)[None])
            for product, rows in zip(self._products, inputs, strict=True)
        ]
        values, gates = (_two_rows(*half) for half in zip(*products, strict=True))
        return values, gates


def _two_rows(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """What the four products come to: a row and the next, in turn."""
    _, outputs, rows, steps = a.shape
    out = empty_last((1, outputs, 2 * rows, steps))
    pairs = rows_of(out[0]).unflatten(0, (-1, 2))
    a, b, c, d = (rows_of(each[0]) for each in (a, b, c, d))
    torch.add(a.add_(b), c, out=pairs[:, 0])
    torch.sub(b.sub_(c), d, out=pairs[:, 1])
    return out
