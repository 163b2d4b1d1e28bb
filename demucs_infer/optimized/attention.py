"""The cross-domain transformer with packed products and scores that stay in the cache.

Shapes: B batch, C channels, F bins, T frames, U steps of the waveform branch, N tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from demucs_infer.layers import LayerScale
from demucs_infer.optimized.kernels import Linear, attend
from demucs_infer.transformer import Attention, CrossLayer, CrossTransformer, SelfLayer


def supports(network: CrossTransformer) -> bool:
    """Whether the fast form exists: what was released, not every variant that can be built."""
    return network.config.norm_first and network.config.gelu


class FastAttention:
    """`Attention` with the layer scale after it folded into its last product."""

    def __init__(
        self, attention: Attention, scale: nn.Module, dtype: torch.dtype, *, crosses: bool
    ) -> None:
        self._dtype = dtype
        self._heads = attention.heads
        size = attention.channels
        weight = attention.in_proj_weight.detach().clone()
        bias = attention.in_proj_bias.detach().clone()
        shrink = (size / attention.heads) ** -0.5
        weight[:size] *= shrink
        bias[:size] *= shrink
        # To itself: one product makes all three. To another: what is read has two.
        own = size if crosses else 3 * size
        self._own = Linear(weight[:own], bias[:own], dtype)
        self._memory = Linear(weight[own:], bias[own:], dtype) if crosses else None
        self._out = scaled(attention.out_proj, scale, dtype)

    def __call__(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if memory is None or self._memory is None:
            q, k, v = self._own(x).chunk(3, dim=-1)
        else:
            q = self._own(x)
            k, v = self._memory(memory).chunk(2, dim=-1)
        q, k, v = (each.unflatten(-1, (self._heads, -1)) for each in (q, k, v))
        return self._out(attend(q, k, v, dtype=self._dtype).flatten(2)).float()


def scaled(linear: nn.Linear, scale: nn.Module, dtype: torch.dtype) -> Linear:
    """A product whose every output is then multiplied by a learnt gain."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if isinstance(scale, LayerScale):
        gain = scale.scale.detach()
        weight, bias = weight * gain[:, None], bias * gain
    return Linear(weight, bias, dtype)


class FastLayer:
    """`SelfLayer` or `CrossLayer`, norms first; answers into a tensor that it may keep."""

    def __init__(self, layer: SelfLayer | CrossLayer, dtype: torch.dtype) -> None:
        self._layer = layer
        self.crosses = isinstance(layer, CrossLayer)
        attention = layer.cross_attn if isinstance(layer, CrossLayer) else layer.self_attn
        self._attention = FastAttention(attention, layer.gamma_1, dtype, crosses=self.crosses)
        self._up = Linear(layer.linear1.weight, layer.linear1.bias, dtype)
        self._down = scaled(layer.linear2, layer.gamma_2, dtype)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        norms = cast(Any, self._layer)
        if other is None:
            x = x + self._attention(norms.norm1(x))
            x += self._feed_forward(norms.norm2(x))
        else:
            x = x + self._attention(norms.norm1(x), norms.norm2(other))
            x += self._feed_forward(norms.norm3(x))
        return _norm_all(norms.norm_out, x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._down(self._up(x, gelu=True)).float()


def _norm_all(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over all tokens and channels of an item, without moving the channels about."""
    if not isinstance(norm, nn.GroupNorm) or norm.num_groups != 1:
        y: Tensor = norm(x)
        return y
    x = x - x.mean(dim=(1, 2), keepdim=True)
    gain = norm.weight * torch.rsqrt(x.square().mean(dim=(1, 2), keepdim=True) + norm.eps)
    return torch.addcmul(norm.bias, x, gain)


class FastTransformer(nn.Module):
    """`CrossTransformer`: (B C F T) and (B C U) -> the same."""

    def __init__(self, network: CrossTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self._network = network
        self._layers = [FastLayer(cast(Any, layer), dtype) for layer in network.layers]
        self._layers_t = [FastLayer(cast(Any, layer), dtype) for layer in network.layers_t]

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        _, _, bins, frames = x.shape
        x = x.permute(0, 3, 2, 1).flatten(1, 2).contiguous()
        x = self._network.norm_in(x) + self._network._positions(x, bins, frames)
        xt = xt.transpose(1, 2).contiguous()
        xt = self._network.norm_in_t(xt) + self._network._positions_t(xt)
        for layer, layer_t in zip(self._layers, self._layers_t, strict=True):
            x, xt = (layer(x, xt), layer_t(xt, x)) if layer.crosses else (layer(x), layer_t(xt))
        return x.unflatten(1, (frames, bins)).permute(0, 3, 2, 1), xt.transpose(1, 2)
