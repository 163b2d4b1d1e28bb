"""Compute a convolution over three neighboring bins with two thirds of the products.

Two adjacent results take six products of a bin and a tap. They can also be computed from four
products, each of a sum or difference of bins and one of taps (Winograd 1980). A bin stands for its
whole row here: all channels and steps of time.

Shapes: C channels in, O channels out, R rows of bins, T steps of time.
"""

import torch
from torch import Tensor

from demucs_infer.optimized.kernels import Conv, SplitGate
from demucs_infer.optimized.layout import empty_channels_last, view_as_rows

_MIN_CHANNELS = 96
"""Fewest channels with which the saved products outweigh the sums."""


def supports(weight: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether `WinogradConv` is faster for this kernel than a plain convolution.

    It is not in reduced precision, where products are too cheap to outweigh the extra sums.
    """
    outputs, channels, bins = weight.shape[:3]
    return bins == 3 and min(outputs // 2, channels) >= _MIN_CHANNELS and dtype == torch.float32


class WinogradConv:
    """A replacement for `SplitGate`: a convolution over three bins, two rows at a time."""

    rows_per_step = 2

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, time_padding: int
    ) -> None:
        before, at, behind = weight.detach().double().unbind(2)
        plus, minus = (before + behind + at) / 2, (before + behind - at) / 2
        padding = (0, time_padding)
        self._products = [
            # The second product is part of both results, so the bias is added there.
            SplitGate(
                Conv, taps[:, :, None], bias if taps is plus else None, dtype, padding=padding
            )
            for taps in (before, plus, minus, behind)
        ]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve (1, C, R+2, T) -> values and gates, each (1, O/2, R, T); R must be even."""
        rows = view_as_rows(x[0])
        first, second, third, fourth = rows[:-2:2], rows[1:-2:2], rows[2::2], rows[3::2]
        inputs = first - third, second + third, third - second, second - fourth
        products = [
            product(rows.permute(2, 0, 1)[None])
            for product, rows in zip(self._products, inputs, strict=True)
        ]
        values, gates = (_combine(*half) for half in zip(*products, strict=True))
        return values, gates


def _combine(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Combine the four products into the even and odd rows of the result."""
    _, outputs, rows, steps = a.shape
    out = empty_channels_last((1, outputs, 2 * rows, steps))
    row_pairs = view_as_rows(out[0]).unflatten(0, (-1, 2))
    a, b, c, d = (view_as_rows(each[0]) for each in (a, b, c, d))
    torch.add(a.add_(b), c, out=row_pairs[:, 0])
    torch.sub(b.sub_(c), d, out=row_pairs[:, 1])
    return out
