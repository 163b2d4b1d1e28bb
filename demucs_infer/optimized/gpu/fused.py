"""Compute the steps between the products of a network, in one or two passes over the input.

On a GPU with Triton, each function runs a kernel of `triton_kernels`; elsewhere, plain PyTorch
gives the same result. All functions compute in float32 and store in the precision of `out`.

Shapes: R rows that are normalized independently, T steps, C channels, F bins; `...` any axes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.optimized.gpu.arithmetic import Arithmetic
from demucs_infer.optimized.gpu.kernel_loader import find_kernels


def add_bias_and_gelu(
    x: Tensor, bias: Tensor, out: Arithmetic, *, gelu: bool = True, inject: Tensor | None = None
) -> Tensor:
    """Return gelu(x + bias + inject) of (..., C); `inject` has the shape of `x`."""
    if kernels := find_kernels(x):
        y: Tensor = kernels.add_bias_and_gelu(x, bias, out.dtype, gelu=gelu, inject=inject)
        return y
    y = x.float() + bias
    if inject is not None:
        y = y + inject.float()
    return out.store(F.gelu(y) if gelu else y)


def gate(x: Tensor, bias: Tensor, out: Arithmetic, offset: Tensor | None = None) -> Tensor:
    """Return values * sigmoid(gates), (B, F, T, 2C) -> (B, F, T, C), plus an offset (F, 1, C)."""
    if kernels := find_kernels(x):
        y: Tensor = kernels.gate(x, bias, out.dtype, offset)
        return y
    values, gates = (x.float() + bias).chunk(2, -1)
    y = values * gates.sigmoid()
    return out.store(y if offset is None else y + offset)


def normalize_and_gelu(
    x: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    out: Arithmetic,
    channels: int,
) -> Tensor:
    """Return gelu(norm(x + bias)) of (R, T, C).

    The norm is over all steps and channels of a row, with `gain` and `shift` per channel. All but
    the first `channels` channels are padding, and stay 0.
    """
    if kernels := find_kernels(x):
        y: Tensor = kernels.normalize(x, bias, gain, shift, epsilon, out.dtype, channels, gelu=True)
        return y
    y = x.float() + bias
    variance, mean = _measure_rows(y[..., :channels])
    y = (y - mean) * (torch.rsqrt(variance + epsilon) * gain) + shift
    return out.store(F.gelu(y))


def normalize_and_gate(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    scale: Tensor,
    stream: Tensor,
    out: Arithmetic,
) -> Tensor:
    """Return stream + scale * glu(norm(x)): (R, T, 2C) and (R, T, C) -> (R, T, C)."""
    if kernels := find_kernels(x):
        total: Tensor = kernels.normalize_and_gate(
            x, gain, shift, epsilon, scale, stream, out.dtype
        )
        return total
    y = x.float()
    variance, mean = _measure_rows(y)
    y = (y - mean) * (torch.rsqrt(variance + epsilon) * gain) + shift
    values, gates = y.chunk(2, -1)
    return out.store(stream.float() + scale * values * gates.sigmoid())


def normalize_rows(x: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """Normalize (R, T, C) over all steps and channels of a row, in float32."""
    if kernels := find_kernels(x):
        y: Tensor = kernels.normalize(
            x, None, gain, shift, epsilon, torch.float32, x.shape[-1], gelu=False
        )
        return y
    variance, mean = _measure_rows(x)
    return (x - mean) * (torch.rsqrt(variance + epsilon) * gain) + shift


def add_and_normalize(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    out: Arithmetic,
) -> tuple[Tensor, Tensor]:
    """Return x + scale * branch, in float32, and its norm over the channels of each token."""
    if kernels := find_kernels(x):
        total, y = kernels.add_and_normalize(x, branch, scale, gain, shift, epsilon, out.dtype)
        return total, y
    if branch is not None:
        x = torch.addcmul(x, branch.float(), scale)
    return x, out.store(F.layer_norm(x, x.shape[-1:], gain, shift, epsilon))


def _measure_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean of (R, T, C) over steps and channels, (R, 1, 1)."""
    return torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
