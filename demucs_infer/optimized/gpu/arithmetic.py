"""Multiply and store in half precision, in TF32 or in float32; emulate all of them on a CPU.

The units of a GPU multiply numbers of 11 significant bits and add up in float32. A CPU that rounds
the factors in the same way and multiplies in float32 gets the same error, so that what a GPU will
lose is known without one.

Shapes: B batch, C channels in, O channels out, F bins, T steps, N tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["half", "tf32", "float32"]
Pair = tuple[int, int]

_TF32_DROPPED_BITS = 13
"""Bits of the 23 of a float32's fraction that TF32 does not have."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a layer multiplies, and how it stores its results.

    `half` multiplies and stores in float16. `tf32` multiplies numbers that are rounded to the 11
    bits of float16, but with the range of float32, and stores float32. `float32` rounds nothing.
    """

    kind: Kind
    emulated: bool = False
    """Store everything in float32, rounded as `kind` would: for tests on a CPU."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of stored tensors."""
        return torch.float16 if self.kind == "half" and not self.emulated else torch.float32

    def store(self, x: Tensor) -> Tensor:
        """Return `x` as results are stored."""
        if self.kind == "half" and self.emulated:
            return x.half().float()
        return x.to(self.dtype)

    def convolve(
        self, x: Tensor, weight: Tensor, *, stride: Pair, padding: Pair, dilation: Pair = (1, 1)
    ) -> Tensor:
        """Convolve (B C F T) with (O C kF kT); the bias is the business of the next step."""
        x, weight = self._round_factor(x), self._round_factor(weight)
        if x.is_cuda:
            y = torch.cudnn_convolution(
                x, weight, padding, stride, dilation, 1, False, False, self.kind == "tf32"
            )
        else:
            y = F.conv2d(x, weight, None, stride, padding, dilation)
        return self.store(y)

    def convolve_transposed(
        self, x: Tensor, weight: Tensor, *, stride: Pair, padding: Pair
    ) -> Tensor:
        """Convolve (B C F T) with (C O kF kT), transposed; without bias."""
        x, weight = self._round_factor(x), self._round_factor(weight)
        if x.is_cuda:
            y = torch.cudnn_convolution_transpose(
                x, weight, padding, (0, 0), stride, (1, 1), 1, False, False, self.kind == "tf32"
            )
        else:
            y = F.conv_transpose2d(x, weight, None, stride, padding)
        return self.store(y)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply (... C) by (O C)."""
        x, weight = self._round_factor(x), self._round_factor(weight)
        return self.store(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Compute softmax(q kᵀ / sqrt(C)) v: (B heads N C), (B heads M C) -> (B heads N C)."""
        q, k, v = (self._round_factor(x) for x in (queries, keys, values))
        if not self.emulated or self.kind == "float32":
            return F.scaled_dot_product_attention(q, k, v)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp_()
        # The sum is that of the unrounded weights, in float32, as flash attention takes it.
        total = weights.sum(-1, keepdim=True)
        return self.store((self._round_factor(weights) @ v) / total)

    def _round_factor(self, x: Tensor) -> Tensor:
        if self.kind == "tf32" and self.emulated:
            return round_to_tf32(x.float())
        return self.store(x)


def round_to_tf32(x: Tensor) -> Tensor:
    """Round float32 to the 11 significant bits of TF32, to the nearest, ties away from zero."""
    half = 1 << (_TF32_DROPPED_BITS - 1)
    bits = (x.view(torch.int32) + half) >> _TF32_DROPPED_BITS << _TF32_DROPPED_BITS
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


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
"""Classes of layers that lose digits alike. "outer" is the stage of the spectrogram that faces the
audio, "wave" the branch of the waveform, and branches are the residual ones of every stage."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The arithmetic of each class of layers; spectra, statistics and sums are always float32."""

    default: Kind
    exceptions: dict[LayerClass, Kind] = field(default_factory=dict)
    emulated: bool = False

    def choose(self, layer: LayerClass) -> Arithmetic:
        """Return the arithmetic of a class of layers."""
        return Arithmetic(self.exceptions.get(layer, self.default), self.emulated)


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("float32"),
    # What stays in float32 was measured (`docs/gpu.md`). A burst in silence makes the residual
    # branches of the waveform see numbers far above their spread, and their gates turn the relative
    # error of those into an absolute one. The outer stages are the last to add their error.
    "fp16": Precision(
        "half",
        {
            "wave encoder": "float32",
            "wave decoder": "float32",
            "wave branches": "float32",
            "outer encoder": "tf32",
            "outer decoder": "tf32",
        },
    ),
}
"""The arithmetic for each precision that a user can ask for."""


@contextmanager
def exact_sums() -> Iterator[None]:
    """Let PyTorch add up in float32, and use no TF32 where it would choose that by itself.

    The settings are those of the process: another thread sees them until they are restored.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        before = (
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_tf32,
            cudnn.allow_tf32,
        )
    except RuntimeError:  # set through old and new names at once: the caller knows better
        yield
        return
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before[0]
        matmul.allow_tf32, cudnn.allow_tf32 = before[1:]
