"""Run the cross-domain transformer with packed matrix products, in pieces that fit in the cache.

Shapes: B batch, C channels, F bins, T frames, U steps of the waveform branch, N tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from demucs_infer.layers import LayerScale
from demucs_infer.optimized.kernels import Linear, attend
from demucs_infer.optimized.layout import tiles
from demucs_infer.system.arena import empty
from demucs_infer.transformer import Attention, CrossLayer, CrossTransformer, SelfLayer


def supports(network: CrossTransformer) -> bool:
    """Tell whether a transformer can be optimized: only released variants are covered."""
    config = network.config
    # oneDNN cannot pack a matrix without rows.
    has_hidden_channels = int(config.dim * config.hidden_scale) > 0
    return config.norm_first and config.gelu and has_hidden_channels


class FastAttention:
    """Optimized `Attention`, whose output projection includes the layer scale that follows it."""

    def __init__(
        self, attention: Attention, scale: nn.Module, dtype: torch.dtype, *, crosses: bool
    ) -> None:
        self._dtype = dtype
        self._heads = attention.heads
        channels = attention.channels
        weight = attention.in_proj_weight.detach().clone()
        bias = attention.in_proj_bias.detach().clone()
        query_scale = (channels / attention.heads) ** -0.5
        weight[:channels] *= query_scale
        bias[:channels] *= query_scale
        # Self-attention: one product for queries, keys and values. Cross-attention: one for the
        # queries, one for the keys and values of the other sequence.
        split = channels if crosses else 3 * channels
        self._project = Linear(weight[:split], bias[:split], dtype)
        self._project_memory = Linear(weight[split:], bias[split:], dtype) if crosses else None
        self._project_out = _make_scaled_linear(attention.out_proj, scale, dtype)

    def attend(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Return (B, N, C) plus its attention to itself, after `norm`."""
        return self._add(x, *self._split_heads(_project(self._project, norm, x), 3))

    def attend_to(
        self, memory: Tensor, memory_norm: nn.Module, x: Tensor, norm: nn.Module
    ) -> Tensor:
        """Return `x` (B, N, C) plus its attention to `memory` (B, M, C), each after its norm."""
        assert self._project_memory is not None
        queries = self._split_heads(_project(self._project, norm, x), 1)
        projected = _project(self._project_memory, memory_norm, memory)
        return self._add(x, *queries, *self._split_heads(projected, 2))

    def _split_heads(self, x: Tensor, count: int) -> list[Tensor]:
        return [part.unflatten(-1, (self._heads, -1)) for part in x.chunk(count, dim=-1)]

    def _add(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = attend(q, k, v, dtype=self._dtype).flatten(2).flatten(0, 1)
        sums = empty(*x.shape)
        inputs, outputs = x.flatten(0, 1), sums.view(-1, x.shape[-1])
        for start, stop in tiles(len(inputs), 8 * x.shape[-1]):
            rows = slice(start, stop)
            torch.add(self._project_out(attended[rows]), inputs[rows], out=outputs[rows])
        return sums


def _project(linear: Linear, norm: nn.Module, x: Tensor) -> Tensor:
    """Multiply `norm(x)` (B, N, C) by the weights, as many tokens at a time as fit in the cache."""
    if not isinstance(norm, nn.LayerNorm):  # it needs all tokens
        return linear(norm(x))
    rows, size = x.flatten(0, 1), linear.num_outputs
    products = empty(len(rows), size, dtype=linear.dtype)
    for start, stop in tiles(len(rows), 4 * (x.shape[-1] + size)):
        products[start:stop] = linear(norm(rows[start:stop]))
    return products.view(*x.shape[:2], size)


def _make_scaled_linear(linear: nn.Linear, scale: nn.Module, dtype: torch.dtype) -> Linear:
    """Build a `Linear` that also multiplies its output by `scale`, if that is a `LayerScale`."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if isinstance(scale, LayerScale):
        gain = scale.scale.detach()
        weight, bias = weight * gain[:, None], bias * gain
    return Linear(weight, bias, dtype)


class FastLayer:
    """Optimized `SelfLayer` or `CrossLayer` of a network with `norm_first`."""

    def __init__(self, layer: SelfLayer | CrossLayer, dtype: torch.dtype) -> None:
        self._layer = layer
        self.crosses = isinstance(layer, CrossLayer)
        attention = layer.cross_attn if isinstance(layer, CrossLayer) else layer.self_attn
        self._attention = FastAttention(attention, layer.gamma_1, dtype, crosses=self.crosses)
        self._hidden = layer.linear1.out_features
        self._up = Linear(layer.linear1.weight, layer.linear1.bias, dtype)
        self._down = _make_scaled_linear(layer.linear2, layer.gamma_2, dtype)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Apply attention and perceptron to (B, N, C); a cross layer attends to `other`."""
        norms = cast(Any, self._layer)
        if other is None:
            x = self._attention.attend(x, norms.norm1)
            self._add_feed_forward(x, norms.norm2)
        else:
            x = self._attention.attend_to(other, norms.norm2, x, norms.norm1)
            self._add_feed_forward(x, norms.norm3)
        return _normalize_items(norms.norm_out, x)

    def _add_feed_forward(self, x: Tensor, norm: nn.Module) -> None:
        """Add the perceptron to `x` (B, N, C), as many tokens at a time as fit in the cache."""
        rows = x.flatten(0, 1)
        is_layer_norm = isinstance(norm, nn.LayerNorm)
        inputs = rows if is_layer_norm else norm(x).flatten(0, 1)
        for start, stop in tiles(len(rows), 4 * self._hidden):
            tile = inputs[start:stop]
            hidden = self._up(norm(tile) if is_layer_norm else tile, gelu=True)
            rows[start:stop] += self._down(hidden).float()


def _normalize_items(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply `norm` to (B, N, C), maybe in place; one group needs no transposed copy."""
    if not isinstance(norm, nn.GroupNorm) or norm.num_groups != 1:
        y: Tensor = norm(x)
        return y
    x -= x.mean(dim=(1, 2), keepdim=True)
    gain = norm.weight * torch.rsqrt(x.square().mean(dim=(1, 2), keepdim=True) + norm.eps)
    return torch.addcmul(norm.bias, x, gain, out=x)


class FastTransformer(nn.Module):
    """Optimized `CrossTransformer`: (B, C, F, T) and (B, C, U) -> the same shapes."""

    def __init__(self, network: CrossTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self._network = network
        self._layers = [FastLayer(cast(Any, layer), dtype) for layer in network.layers]
        self._layers_t = [FastLayer(cast(Any, layer), dtype) for layer in network.layers_t]

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Apply both stacks, layer by layer.

        A cross-attention layer attends to the input, not to the output, of the layer at the same
        depth in the other stack.
        """
        _, _, bins, frames = x.shape
        x = x.permute(0, 3, 2, 1).flatten(1, 2).contiguous()
        x = self._network.norm_in(x) + self._network._positions(x, bins, frames)
        xt = xt.transpose(1, 2).contiguous()
        xt = self._network.norm_in_t(xt) + self._network._positions_t(xt)
        for layer, layer_t in zip(self._layers, self._layers_t, strict=True):
            x, xt = (layer(x, xt), layer_t(xt, x)) if layer.crosses else (layer(x), layer_t(xt))
        return x.unflatten(1, (frames, bins)).permute(0, 3, 2, 1), xt.transpose(1, 2)
