"""Multiply and store in half precision, in TF32 or in float32; emulate all of them on a CPU.

The matrix units of a GPU multiply numbers of 11 significant bits and sum in float32. A CPU that
rounds the factors in the same way and multiplies in float32 gets the same error, so that the loss
of precision on a GPU can be tested without one. A number of 22 bits is the sum of two numbers of 11
bits, a high and a low one: its products are sums of theirs, which these units compute several times
as fast as a product of float32. Weights that are exact in half precision, as all released ones are,
have no low part.

Shapes: B batch, C channels in, O channels out, F bins, T steps, N tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.optimized.gpu.kernel_loader import find_kernels

Kind = Literal["half", "tf32", "split", "float32"]
Pair = tuple[int, int]

_TF32_DROPPED_BITS = 13
"""How many of the 23 bits of the fraction of a float32 are missing in TF32."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a layer multiplies, and how it stores its results.

    `half` multiplies and stores in float16. `tf32` rounds factors to the 11 bits of float16, but
    keeps the range of float32, and stores float32. `split` multiplies the high and the low digits
    of factors separately, in TF32, and stores float32. `float32` does not round.
    """

    kind: Kind
    emulated: bool = False
    """Whether to store float32 that is rounded as in `kind`, for tests on a CPU."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of stored tensors."""
        return torch.float16 if self.kind == "half" and not self.emulated else torch.float32

    def store(self, x: Tensor) -> Tensor:
        """Convert `x` to the precision in which results are stored."""
        if self.kind == "half" and self.emulated:
            return x.half().float()
        return x.to(self.dtype)

    @property
    def uses_tf32(self) -> bool:
        """Whether products are left to the units for TF32."""
        return self.kind in ("tf32", "split")

    def read_weight(self, weight: Tensor, axis: int) -> Tensor:
        """Return a weight as products take it; `axis` is that of the channels they sum over."""
        weight = self._round_factor(weight.detach())
        if self.kind != "split":
            return weight
        high = round_to_tf32(weight)
        low = weight - high
        has_low = not weight.is_meta and bool(low.any())
        return torch.cat([high, high, low] if has_low else [high, high], dim=axis)

    def read_linear(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the parameters of a product as `multiply` takes them."""
        bias = None if bias is None else bias.detach().to(self.dtype)
        return self.read_weight(weight, 1), bias

    def convolve(
        self, x: Tensor, weight: Tensor, *, stride: Pair, padding: Pair, dilation: Pair = (1, 1)
    ) -> Tensor:
        """Convolve (B, C, F, T) with (O, C, kF, kT), without a bias, which the next step adds."""
        x = self._read_factor(x, weight.shape[1])
        if x.is_cuda:  # not timed, deterministic, and independent of settings of the process
            y = torch.cudnn_convolution(
                x, weight, padding, stride, dilation, 1, False, True, self.uses_tf32
            )
        else:
            y = F.conv2d(x, weight, None, stride, padding, dilation)
        return self.store(y)

    def convolve_transposed(
        self, x: Tensor, weight: Tensor, *, stride: Pair, padding: Pair
    ) -> Tensor:
        """Convolve (B, C, F, T) with (C, O, kF, kT), transposed; without bias."""
        x = self._read_factor(x, weight.shape[0])
        if x.is_cuda:
            y = torch.cudnn_convolution_transpose(
                x, weight, padding, (0, 0), stride, (1, 1), 1, False, True, self.uses_tf32
            )
        else:
            y = F.conv_transpose2d(x, weight, None, stride, padding)
        return self.store(y)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply `x` (..., C) by `weight` (O, C), and add `bias`, both from `read_linear`."""
        x = self._read_factor(x.movedim(-1, 1), weight.shape[1]).movedim(1, -1)
        with tf32_products() if x.is_cuda and self.uses_tf32 else nullcontext():
            return self.store(F.linear(x, weight, bias))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Compute softmax(q kᵀ / sqrt(C)) v, with q (B, heads, N, C), k and v (B, heads, M, C)."""
        q, k, v = (self._round_factor(x) for x in (queries, keys, values))
        if not self.emulated or self.kind == "float32":
            return F.scaled_dot_product_attention(q, k, v)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp_()
        # The sum of the unrounded weights, in float32, is what flash attention divides by.
        total = weights.sum(-1, keepdim=True)
        return self.store((self._round_factor(weights) @ v) / total)

    def _round_factor(self, x: Tensor) -> Tensor:
        if self.kind == "tf32" and self.emulated:
            return round_to_tf32(x.float())
        return self.store(x)

    def _read_factor(self, x: Tensor, channels: int) -> Tensor:
        """Return (B C ...) as products take it; weights with parts have more `channels`."""
        if self.kind != "split":
            return self._round_factor(x)
        return split_digits(x.float(), channels // x.shape[1], emulated=self.emulated)


def round_to_tf32(x: Tensor) -> Tensor:
    """Round float32 to the 11 significant bits of TF32, to the nearest, ties away from zero."""
    half = 1 << (_TF32_DROPPED_BITS - 1)
    bits = (x.view(torch.int32) + half) >> _TF32_DROPPED_BITS << _TF32_DROPPED_BITS
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def split_digits(x: Tensor, parts: int, *, emulated: bool = False) -> Tensor:
    """Return high and low digits of (B C ...) side by side, then the high ones again for 3 `parts`.

    The units round the low digits, which is done here where they are `emulated`.
    """
    if kernels := find_kernels(x):
        split: Tensor = kernels.split_digits(x.movedim(1, -1), parts, _TF32_DROPPED_BITS)
        return split.movedim(-1, 1)
    high = round_to_tf32(x)
    low = x - high
    low = round_to_tf32(low) if emulated else low
    return torch.cat([high, low, high][:parts], dim=1)


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let PyTorch multiply matrices in TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


LayerClass = Literal[
    "encoder",
    "decoder",
    "outer encoder",
    "outer decoder",
    "branches",
    "wave encoder",
    "wave decoder",
    "wave branches",
    "bottleneck",
    "attention",
    "perceptron",
]
"""Classes of layers that need the same precision. "outer" is the outermost stage of the
spectrogram, "wave" the branch of the waveform, and "branches" are the residual branches of every
stage."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The arithmetic of each class of layers; spectra, statistics and sums are always float32."""

    default: Kind
    exceptions: dict[LayerClass, Kind] = field(default_factory=dict)
    emulated: bool = False

    def choose(self, layer: LayerClass) -> Arithmetic:
        """Return the arithmetic of a class of layers."""
        return Arithmetic(self.exceptions.get(layer, self.default), self.emulated)


# The exceptions follow from measurements (`docs/gpu.md`). For a burst in silence, values in the
# residual branches of the waveform are far larger than their standard deviation, and gates turn the
# relative error of these values into an absolute one. Outer stages add their error last.
PRECISIONS: dict[str, Precision] = {
    # The units that multiply TF32 cut off sums instead of rounding them, which adds up in the long
    # sums of convolutions; those of the transformer are shorter, and count less.
    "fp32": Precision(
        "float32", {"attention": "split", "perceptron": "split", "bottleneck": "split"}
    ),
    "fp16": Precision(
        "half",
        {
            "wave encoder": "split",
            "wave decoder": "split",
            "wave branches": "split",
            "outer encoder": "tf32",
            "outer decoder": "tf32",
        },
    ),
}
"""The arithmetic for each precision that a user can ask for."""


def choose_arithmetic(precision: str, *, has_tf32: bool) -> Precision:
    """Return the arithmetic of a precision, on a GPU with units for TF32 or an older one."""
    chosen = PRECISIONS[precision]
    if has_tf32:
        return chosen
    slow: dict[Kind, Kind] = {"split": "float32", "tf32": "float32"}
    return Precision(
        slow.get(chosen.default, chosen.default),
        {layer: slow.get(kind, kind) for layer, kind in chosen.exceptions.items()},
    )


@contextmanager
def exact_sums() -> Iterator[None]:
    """Make PyTorch sum in float32, and not use TF32 by itself, inside the context.

    These settings are global: they affect other threads, too, until they are restored.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        before = (
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_tf32,
            cudnn.allow_tf32,
        )
    except RuntimeError:  # the caller has set them by old and new names: leave them
        yield
        return
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before[0]
        matmul.allow_tf32, cudnn.allow_tf32 = before[1:]
