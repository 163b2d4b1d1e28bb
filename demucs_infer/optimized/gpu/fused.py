"""Steps between the products of a network, each in one pass over its input.

On a GPU each is a kernel of `triton_kernels`, if Triton is there; the functions here give the same
result in plain PyTorch, anywhere. All of them compute in float32 and store in the type of their
input, rounded by `store` where half precision is emulated.

Shapes: R rows that are normalized independently, T steps, C channels, N = any leading axes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Store = Callable[[Tensor], Tensor]


def add_bias_and_gelu(
    x: Tensor, bias: Tensor, store: Store, *, gelu: bool = True, inject: Tensor | None = None
) -> Tensor:
    """Return gelu(x + bias + inject) of (N C); `inject` has the shape of `x`."""
    y = x.float() + bias
    if inject is not None:
        y = y + inject.float()
    return store(F.gelu(y) if gelu else y)


def gate(x: Tensor, bias: Tensor, store: Store, offset: Tensor | None = None) -> Tensor:
    """Return values * sigmoid(gates) + offset: (N 2C) -> (N C), `offset` broadcast."""
    values, gates = (x.float() + bias).chunk(2, -1)
    y = values * gates.sigmoid()
    return store(y if offset is None else y + offset)


def normalize_and_gelu(
    x: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    store: Store,
    channels: int,
) -> Tensor:
    """Return gelu(norm(x + bias)) of (R T C); channels from `channels` on are padding, and stay 0.

    The norm is over all steps and channels of a row, with `gain` and `shift` per channel.
    """
    y = x.float() + bias
    variance, mean = _measure_rows(y[..., :channels])
    y = (y - mean) * (torch.rsqrt(variance + epsilon) * gain) + shift
    return store(F.gelu(y))


def normalize_and_gate(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    scale: Tensor,
    stream: Tensor,
    store: Store,
) -> Tensor:
    """Return stream + scale * glu(norm(x)): (R T 2C) and (R T C) -> (R T C)."""
    y = x.float()
    variance, mean = _measure_rows(y)
    y = (y - mean) * (torch.rsqrt(variance + epsilon) * gain) + shift
    values, gates = y.chunk(2, -1)
    return store(stream.float() + scale * values * gates.sigmoid())


def normalize_rows(x: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """Normalize (R T C) over all steps and channels of a row, in float32."""
    variance, mean = _measure_rows(x)
    return (x - mean) * (torch.rsqrt(variance + epsilon) * gain) + shift


def add_and_normalize(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    store: Store,
) -> tuple[Tensor, Tensor]:
    """Return x + scale * branch, in float32, and its norm over the channels of each token."""
    if branch is not None:
        x = torch.addcmul(x, branch.float(), scale)
    return x, store(F.layer_norm(x, x.shape[-1:], gain, shift, epsilon))


def _measure_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean of (R T C) over steps and channels, (R 1 1)."""
    return torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
