"""Compute convolutions with two or three taps with fewer products, more sums (Winograd 1980).

Two adjacent results of three taps take six products of an input and a tap. They can also be
computed from four products, each of a sum or difference of inputs and one of taps. In both
directions, a block of two bins and two steps takes 16 products instead of 36. Two adjacent results
of two taps take three products instead of four.

Shapes: C channels in, O channels out, R rows of bins, T steps of time.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from demucs_infer.optimized.kernels import Linear
from demucs_infer.optimized.layout import view_as_rows
from demucs_infer.system.arena import empty

_TAPS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""The combination of the three taps in each of the four products."""


def has_enough_channels(channels: int, dtype: torch.dtype) -> bool:
    """Tell whether the saved products outweigh the sums.

    With wide vectors that takes more channels. In reduced precision, products are too cheap.
    """
    has_wide_vectors = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return channels >= (96 if has_wide_vectors else 48) and dtype == torch.float32


def supports(weight: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether `WinogradConv` is faster for this kernel than a plain convolution."""
    outputs, channels = weight.shape[:2]
    return weight.shape[2:] == (3, 3) and has_enough_channels(min(outputs // 2, channels), dtype)


class WinogradConv:
    """A replacement for `SplitGate`: a 3x3 convolution in blocks of two rows and two steps.

    It pads time by one step on each side; the caller pads the bins.
    """

    results_at_a_time = 2

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        combine = torch.tensor(_TAPS, dtype=torch.float64)
        taps = torch.einsum("if,jt,ocft->ijoc", combine, combine, weight.detach().double())
        self._products = [
            # Product (1, 1) is the only one that all four results add, so it has the bias.
            [Linear(each, bias if i == j == 1 else None, dtype) for j, each in enumerate(row)]
            for i, row in enumerate(taps)
        ]
        self._num_outputs = len(weight)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve (1, C, R+2, T) -> values and gates, each (1, O/2, R, T); R must be even."""
        rows = view_as_rows(x[0])
        _, steps, channels = rows.shape
        row_pairs, step_pairs = len(rows) // 2 - 1, -(-steps // 2)
        sums = rows.new_empty(row_pairs, 2 * step_pairs + 2, channels)
        sums[:, 0], sums[:, steps + 1 :] = 0, 0
        product_input = rows.new_empty(row_pairs, step_pairs, channels)
        over_steps = list(_combine_inputs(sums, 1))
        halves = []
        for (combine, first, second), products in zip(
            _combine_inputs(rows, 0), self._products, strict=True
        ):
            combine(first, second, out=sums[:, 1 : steps + 1])
            results = [
                product(combine(first, second, out=product_input))
                for (combine, first, second), product in zip(over_steps, products, strict=True)
            ]
            _combine_products(results, even=results[0], odd=results[1])
            halves.append(results[:2])
        out = empty(row_pairs, 2, step_pairs, 2, self._num_outputs)
        for side, parts in enumerate(zip(*halves, strict=True)):
            _combine_products(parts, even=out[:, 0, :, side], odd=out[:, 1, :, side])
        image = out.view(2 * row_pairs, 2 * step_pairs, -1)[:, :steps].permute(2, 0, 1)[None]
        values, gates = image.chunk(2, 1)
        return values, gates


def _combine_inputs(x: Tensor, dim: int) -> Iterator[tuple[Callable[..., Tensor], Tensor, Tensor]]:
    """Yield (add or sub, a, b) for each of four products; its input is the sum or difference."""
    first, second, third, fourth = x.unfold(dim, 4, 2).unbind(-1)
    yield torch.sub, first, third
    yield torch.add, second, third
    yield torch.sub, third, second
    yield torch.sub, second, fourth


def _combine_products(products: Sequence[Tensor], *, even: Tensor, odd: Tensor) -> None:
    """Write the pairs of results, and overwrite the first two products.

    `even` may be the first product, and `odd` the second.
    """
    first, second, third, fourth = products
    torch.add(first.add_(second), third, out=even)
    torch.sub(second.sub_(third), fourth, out=odd)


class WinogradSequence:
    """A replacement for `SplitGate`: a convolution of a sequence over three steps."""

    results_at_a_time = 2

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        combine = torch.tensor(_TAPS, dtype=torch.float64)
        taps = torch.einsum("it,oct->ioc", combine, weight.detach().double())
        # The second product is part of both results, so has the bias.
        self._products = [
            Linear(each, bias if i == 1 else None, dtype) for i, each in enumerate(taps)
        ]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve (1, C, 1, T+2) -> values and gates, each (1, O/2, 1, T); T must be even."""
        sequence = view_as_rows(x[0])[0]
        results = [
            product(combine(first, second))
            for (combine, first, second), product in zip(
                _combine_inputs(sequence, 0), self._products, strict=True
            )
        ]
        out = results[0].new_empty(len(results[0]), 2, results[0].shape[1])
        _combine_products(results, even=out[:, 0], odd=out[:, 1])
        values, gates = out.flatten(0, 1).t()[None, :, None].chunk(2, 1)
        return values, gates


class TwoTaps:
    """A convolution over two neighbors along the first axis: three products for two results.

    A result is `earlier` times an input plus `current` times the next one.
    """

    def __init__(
        self, earlier: Tensor, current: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self._earlier = Linear(earlier.contiguous(), None, dtype)
        self._current = Linear(current.contiguous(), None, dtype)
        self._both = Linear(earlier + current, bias, dtype)

    def write(self, x: Tensor, out: Tensor) -> None:
        """Convolve `x` (R+1, ..., C) to `out` (R, ..., O); O may be several axes."""
        even = len(out) // 2 * 2
        if even:
            before, at, behind = x[:even:2], x[1 : even + 1 : 2], x[2 : even + 1 : 2]
            shape = out[:even:2].shape
            shared = self._both(at).view(shape)
            torch.add(shared, self._earlier(before - at).view(shape), out=out[:even:2])
            torch.add(shared, self._current(behind - at).view(shape), out=out[1:even:2])
        if even < len(out):
            at, behind = x[-2:-1], x[-1:]
            last = self._both(at) + self._current(behind - at)
            out[even:] = last.view(out[even:].shape)
