"""Run the cross-domain transformer with products in reduced precision, and sums in float32.

Shapes: B batch, C channels, F bins, T frames, U steps of the waveform branch, N tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import LayerScale
from demucs_infer.optimized.gpu import fused
from demucs_infer.optimized.gpu.arithmetic import Arithmetic, Precision
from demucs_infer.transformer import Attention, CrossLayer, CrossTransformer, SelfLayer


def supports(network: CrossTransformer) -> bool:
    """Tell whether a transformer can be optimized: only released variants are covered."""
    config = network.config
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    return (
        config.norm_first
        and config.gelu
        and bool(config.norm_in)
        and not config.group_norm
        and all(norm.num_groups == 1 for norm in norms)
    )


class GpuAttention:
    """Optimized `Attention`, without the layer scale that follows it."""

    def __init__(self, attention: Attention, arithmetic: Arithmetic, *, crosses: bool) -> None:
        self._arithmetic = arithmetic
        self._heads, channels = attention.heads, attention.channels
        weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias.detach()
        # Self-attention: one product for queries, keys and values. Cross-attention: one for the
        # queries, one for the keys and values of the other sequence.
        split = channels if crosses else 3 * channels
        self._project = arithmetic.read_linear(weight[:split], bias[:split])
        self._project_memory = arithmetic.read_linear(weight[split:], bias[split:])
        self._project_out = arithmetic.read_linear(
            attention.out_proj.weight, attention.out_proj.bias
        )

    def __call__(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from `x` (B, N, C) to `memory` (B, M, C), or to `x` if `memory` is None."""
        multiply = self._arithmetic.multiply
        if memory is None:
            q, k, v = multiply(x, *self._project).chunk(3, dim=-1)
        else:
            q = multiply(x, *self._project)
            k, v = multiply(memory, *self._project_memory).chunk(2, dim=-1)
        q, k, v = (each.unflatten(-1, (self._heads, -1)).transpose(1, 2) for each in (q, k, v))
        attended = self._arithmetic.attend(q, k, v).transpose(1, 2).flatten(2)
        return multiply(attended, *self._project_out)


class GpuLayer:
    """Optimized `SelfLayer` or `CrossLayer` of a network with `norm_first`."""

    def __init__(self, layer: SelfLayer | CrossLayer, precision: Precision) -> None:
        self.crosses = isinstance(layer, CrossLayer)
        attention = layer.cross_attn if isinstance(layer, CrossLayer) else layer.self_attn
        self._attention_arithmetic = precision.choose("attention")
        self._arithmetic = precision.choose("perceptron")
        self._attention = GpuAttention(attention, self._attention_arithmetic, crosses=self.crosses)
        self._up = self._arithmetic.read_linear(layer.linear1.weight, layer.linear1.bias)
        self._down = self._arithmetic.read_linear(layer.linear2.weight, layer.linear2.bias)
        last = layer.norm3 if isinstance(layer, CrossLayer) else layer.norm2
        self._norm, self._norm_last = _read_norm(layer.norm1), _read_norm(last)
        self._norm_other = _read_norm(layer.norm2)
        self._scales = [
            _read_scale(layer.gamma_1, attention),
            _read_scale(layer.gamma_2, attention),
        ]
        norm_out = layer.norm_out
        self._norm_out = _read_norm(norm_out) if isinstance(norm_out, nn.GroupNorm) else None

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Apply attention and perceptron to (B, N, C); a cross layer attends to `other`."""
        out = self._attention_arithmetic
        unscaled = self._scales[0]  # ignored without a branch
        _, y = fused.add_and_normalize(x, None, unscaled, *self._norm, out)
        memory = None
        if other is not None:
            _, memory = fused.add_and_normalize(other, None, unscaled, *self._norm_other, out)
        branch = self._attention(y, memory)
        out = self._arithmetic
        x, y = fused.add_and_normalize(x, branch, self._scales[0], *self._norm_last, out)
        hidden = out.store(F.gelu(out.multiply(y, *self._up)))
        x = torch.addcmul(
            x, self._arithmetic.multiply(hidden, *self._down).float(), self._scales[1]
        )
        return x if self._norm_out is None else fused.normalize_rows(x, *self._norm_out)


def _read_norm(norm: Any) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float(), norm.bias.detach().float(), norm.eps


def _read_scale(scale: nn.Module, attention: Attention) -> Tensor:
    if isinstance(scale, LayerScale):
        return scale.scale.detach().float()
    return torch.ones(attention.channels, device=attention.in_proj_bias.device)


class GpuTransformer(nn.Module):
    """Optimized `CrossTransformer`: (B, C, F, T) and (B, C, U) -> the same shapes.

    Tokens are in their order in memory, bin by bin. Attention does not depend on their order, as
    long as the position embeddings have the same order.
    """

    def __init__(self, network: CrossTransformer, precision: Precision) -> None:
        super().__init__()
        self._network = network
        self._norms = _read_norm(network.norm_in), _read_norm(network.norm_in_t)
        self._layers = [GpuLayer(cast(Any, layer), precision) for layer in network.layers]
        self._layers_t = [GpuLayer(cast(Any, layer), precision) for layer in network.layers_t]

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Apply both stacks, layer by layer.

        A cross-attention layer attends to the input, not to the output, of the layer at the same
        depth in the other stack.
        """
        _, _, bins, frames = x.shape
        x = x.permute(0, 2, 3, 1).flatten(1, 2).float()  # (B, F*T, C)
        positions = self._network._positions(x, bins, frames)
        positions = positions.unflatten(1, (frames, bins)).transpose(1, 2).flatten(1, 2)
        x = _normalize_tokens(x, *self._norms[0]) + positions
        xt = xt.transpose(1, 2).float()
        xt = _normalize_tokens(xt, *self._norms[1]) + self._network._positions_t(xt)
        for layer, layer_t in zip(self._layers, self._layers_t, strict=True):
            x, xt = (layer(x, xt), layer_t(xt, x)) if layer.crosses else (layer(x), layer_t(xt))
        return x.unflatten(1, (bins, frames)).permute(0, 3, 1, 2), xt.transpose(1, 2)


def _normalize_tokens(x: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, shift, epsilon)
