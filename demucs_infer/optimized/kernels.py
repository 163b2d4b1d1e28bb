"""Compute matrix products and convolutions with oneDNN's packed kernels, channels last.

On many machines, PyTorch's float32 `linear` uses only half of the width of the CPU's vectors. The
kernels that `torch.compile` uses have the full width, and can be called without compiling. Where
they are missing, in float32 or in reduced precision, ordinary functions of PyTorch compute the same
more slowly.

Shapes: B batch, C channels in, O channels out, H rows, W columns, N rows of a matrix.
"""

import re
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.optimized.layout import TILE_BYTES
from demucs_infer.system.arena import empty

Pair = tuple[int, int]


@cache
def has_packed_kernels(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether this build of PyTorch and this processor have packed kernels for `dtype`.

    The kernels are tried, because the instruction sets that they need depend on the version. A
    processor may have them in float32 and not in reduced precision.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = (torch.ones(size, dtype=dtype) for size in ((1, 2), (2, 2), (2,)))
    image, kernel = x[:, :, None, None], weight[:, :, None, None]
    try:
        flat = _pack_linear(weight)
        packed = _pack_conv(kernel, (0, 0), (1, 1), image.shape)
        geometry = ((0, 0), (1, 1), (1, 1))
        results = [
            torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_fused_activation(gelu=False))
        ]
        for then in (_fused_activation(gelu=False), _fused_activation(gelu=True)):
            results += [
                torch.ops.mkldnn._linear_pointwise(x, flat, bias, *then),
                torch.ops.mkldnn._convolution_pointwise(image, packed, bias, *geometry, 1, *then),
            ]
    except (
        AttributeError,
        RuntimeError,
        TypeError,
    ):  # other versions have other names or arguments
        return False
    three = torch.full((2,), 3.0)
    expected = [three, three, three, F.gelu(three), F.gelu(three)]
    return all(
        torch.allclose(
            result.flatten().float(), answer, rtol=0.02
        )  # detects wrong results, not rounding
        for result, answer in zip(results, expected, strict=True)
    )


def _pack_linear(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1024)


def _pack_conv(weight: Tensor, padding: Pair, stride: Pair, size: torch.Size) -> Any:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, (1, 1), 1, list(size)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply `x` (N, C) by weights (O, C) that differ in every call, so are not packed."""
    if has_packed_kernels(x.dtype):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, *_fused_activation(gelu=False)
        )
        return y
    return F.linear(x, weight, bias)


def _fuses_gelu() -> bool:
    """Tell whether a GELU inside a packed kernel is as fast as PyTorch's own after it.

    With AVX2, that of the kernel takes three times as long: 1.9 ns for each number, not 0.6.
    """
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def _fused_activation(gelu: bool) -> tuple[str, list[Any], str]:
    """Return the kernel arguments for the activation after a product: none, or exact GELU."""
    return ("gelu", [], "none") if gelu else ("none", [], "")


class Linear:
    """A linear layer with packed weights, computed in `dtype`: (..., C) -> (..., O)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.num_outputs = len(weight)
        self._weight = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._packed = has_packed_kernels(dtype)
        if self._packed:
            self._weight = _pack_linear(self._weight)

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Multiply `x` by the weights, then apply a GELU if `gelu`."""
        x = x.to(self.dtype)
        is_fused = gelu and self._packed and _fuses_gelu()
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, *_fused_activation(is_fused)
            )
        else:
            y = F.linear(x, self._weight, self._bias)
        return torch.ops.aten.gelu_(y) if gelu and not is_fused else y


class Conv:
    """A channels-last convolution, computed in `dtype`: (B, C, H, W) -> (B, O, H', W')."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
    ) -> None:
        self.dtype = dtype
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self._stride, self._padding = stride, padding
        self._packed = has_packed_kernels(dtype)
        if self._packed:
            self._weight = _pack_conv(self._weight, padding, stride, _usual_size(weight, stride))

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Convolve `x`, then apply a GELU if `gelu`."""
        x = x.to(self.dtype, memory_format=torch.channels_last)
        is_fused = gelu and self._packed and _fuses_gelu()
        if self._packed:
            geometry = (self._padding, self._stride, (1, 1))
            y: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self._weight, self._bias, *geometry, 1, *_fused_activation(is_fused)
            )
        else:
            y = F.conv2d(x, self._weight, self._bias, self._stride, self._padding)
        return torch.ops.aten.gelu_(y) if gelu and not is_fused else y


def _usual_size(weight: Tensor, stride: Pair) -> torch.Size:
    """Return the size of an image in a tile of a network, for which weights are packed.

    For other sizes, oneDNN may want another layout, and pack the weights again in every call.
    """
    channels, rows, columns = weight.shape[1:]
    steps = 336  # htdemucs, hdemucs: 331 to 336 in a window of 7.8 s
    tile_rows = max(1, TILE_BYTES // (8 * channels * steps))
    height, width = rows + (tile_rows - 1) * stride[0], columns + (steps - 1) * stride[1]
    return torch.Size((1, channels, height, width))


class SplitGate:
    """Two products of the same input: the values and the gates of a GLU.

    A single product would return rows of values followed by gates. In the outermost stage neither
    fills a whole number of vectors, and the GLU would take three times as long.
    """

    results_at_a_time = 1
    """The number of rows, or of steps of a sequence, must be a multiple of it."""

    def __init__(
        self,
        make: type[Linear] | type[Conv],
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        **geometry: Any,
    ) -> None:
        self._dtype = dtype
        halves = [None, None] if bias is None else bias.chunk(2)
        self._products = [
            make(*half, dtype, **geometry) for half in zip(weight.chunk(2), halves, strict=True)
        ]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and gates."""
        x = x.to(self._dtype)
        values, gates = (product(x) for product in self._products)
        return values, gates


@lru_cache(maxsize=1)
def uses_half_width_vectors() -> bool:
    """Tell whether PyTorch's own float32 products use only half the width of the CPU's vectors.

    The model of the CPU decides and not a timing, so that a machine always computes the same bits.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # both have the same width
        return False
    try:
        return is_halved(Path("/proc/cpuinfo").read_text())
    except OSError:
        return False


def is_halved(cpuinfo: str) -> bool:
    """Tell whether MKL uses half of the vectors: on an AMD CPU of family 26 or later, AVX-512."""
    family = re.search(r"^cpu family\s*:\s*(\d+)$", cpuinfo, re.MULTILINE)
    return "AuthenticAMD" in cpuinfo and family is not None and int(family[1]) >= 26


def attends_in_rows(dtype: torch.dtype) -> bool:
    """Tell whether `attend` computes in rows with packed kernels, or with PyTorch's attention."""
    return has_packed_kernels(dtype) and (dtype != torch.float32 or uses_half_width_vectors())


def attend(q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Compute softmax(q kᵀ) v: (B, N, heads, C), (B, M, heads, C) -> (B, N, heads, C).

    `q` is already divided by the square root of C. PyTorch's own attention always multiplies in
    float32, so it is not used in reduced precision, or where `uses_half_width_vectors` is true.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if attends_in_rows(dtype):
        y = empty(*q.shape, dtype=dtype)
        for item in zip(q, k, v, y, strict=True):
            _attend_in_rows(*item)
        return y
    queries, keys, values = (each.transpose(1, 2) for each in (q, k, v))
    y = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    return y.transpose(1, 2)


def _attend_in_rows(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Run `attend` for one item, with as many queries at a time as fit in the cache."""
    rows = 192 if q.dtype == torch.float32 else 512
    for head in range(q.shape[1]):
        queries, keys, values = (each[:, head].contiguous() for each in (q, k, v))
        weigh = _make_value_product(values)
        for start in range(0, len(q), rows):
            scores = linear(queries[start : start + rows], keys)
            out[start : start + rows, head] = weigh(torch.softmax(scores, -1))


def _make_value_product(values: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies weights (N, M) by `values` (M, C).

    In reduced precision, PyTorch's own product is as fast and needs no transposed copy.
    """
    if values.dtype != torch.float32:
        return lambda weights: weights @ values
    transposed = values.t().contiguous()
    return lambda weights: linear(weights, transposed)
