"""Define the cross-domain transformer at the bottleneck of HTDemucs.

There are two stacks of layers, one for the spectrogram and one for the waveform; every other layer
attends to the other stack. Dropout, position shifts and augmentation only act in training.

Shapes: B batch, C channels, F bins, T frames, U steps of the waveform branch, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import LayerScale
from demucs_infer.system.lazy import make_getattr

_SCALE_INIT = 1e-4

_UPSTREAM = (
    "CrossTransformerEncoder",
    "CrossTransformerEncoderLayer",
    "MyGroupNorm",
    "MyTransformerEncoderLayer",
    "ScaledEmbedding",
    "create_2d_sin_embedding",
    "create_sin_embedding",
    "create_sin_embedding_cape",
    "get_causal_mask",
)
LEFT_OUT = dict.fromkeys(
    (
        "MultiheadAttention",
        "dynamic_sparse_attention",
        "get_elementary_mask",
        "get_mask",
        "scaled_dot_product_attention",
        "scaled_query_key_softmax",
    ),
    "it is for sparse attention, which needs xformers and which no released network uses",
)
"""Names of upstream's module that this module leaves out, and why."""

__getattr__ = make_getattr(
    __name__, dict.fromkeys(_UPSTREAM, "demucs_infer.upstream.transformer"), LEFT_OUT
)


@dataclass(frozen=True, kw_only=True)  # no slots: the compiler needs weak references
class TransformerConfig:
    """The arguments of `HTDemucs` for its transformer, without the prefix `t_` of their names."""

    dim: int
    emb: str
    """Position embedding of the waveform branch: "sin", "cape" or "scaled" (learned)."""
    hidden_scale: float
    heads: int
    layers: int
    cross_first: bool
    max_positions: int
    norm_in: bool
    norm_in_group: int
    group_norm: int
    norm_first: bool
    norm_out: int
    max_period: float
    layer_scale: bool
    gelu: bool
    weight_pos_embed: float
    cape_mean_normalize: bool

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(
                f"the transformer has {self.dim} channels and t_heads={self.heads}: "
                "the channels must be a multiple of the heads."
            )
        if self.dim % 4:
            raise ValueError(
                f"the transformer has {self.dim} channels: its position embedding needs a "
                "multiple of 4."
            )
        if self.emb not in ("sin", "cape", "scaled"):
            raise ValueError(f"unsupported t_emb={self.emb!r}: expected 'sin', 'cape' or 'scaled'.")

    @classmethod
    def from_arguments(cls, dim: int, arguments: Mapping[str, Any]) -> TransformerConfig:
        """Select the fields from the arguments (`locals()`) of the `__init__` of a network."""
        names = [field.name for field in fields(cls) if field.name != "dim"]
        return cls(dim=dim, **{name: arguments[f"t_{name}"] for name in names})


@lru_cache(maxsize=8)
def positions_2d(
    channels: int,
    bins: int,
    frames: int,
    max_period: float,
    weight: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the position embedding of a spectrogram, frame by frame: (1, T*F, C)."""
    # A tensor that is cached in inference mode could not be used with autograd later.
    with torch.inference_mode(False):
        rates = torch.arange(0.0, channels // 2, 2, device="cpu")
        rates = torch.exp(rates * -(math.log(max_period) / (channels // 2)))
        frame_table, bin_table = (_sinusoids(count, rates) for count in (frames, bins))
        table = torch.cat(
            [
                frame_table[:, None].expand(-1, bins, -1),
                bin_table[None, :].expand(frames, -1, -1),
            ],
            dim=-1,
        )
        return (weight * table.flatten(0, 1)[None]).to(device, dtype)


def _sinusoids(count: int, rates: Tensor) -> Tensor:
    """Interleave the sines and cosines of `count` positions: (count, 2*rates)."""
    angles = torch.arange(0.0, count, device="cpu")[:, None] * rates
    return torch.stack([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(1)


@lru_cache(maxsize=8)
def positions_1d(
    channels: int,
    steps: int,
    max_period: float,
    weight: float,
    centered: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the position embedding of the waveform (1, U, C), zero in the middle if `centered`."""
    with torch.inference_mode(False):
        positions = torch.arange(0.0, steps, device="cpu")[:, None]
        if centered:
            positions = positions - positions.mean()
        half = channels // 2
        angles = positions / (max_period ** (torch.arange(half, device="cpu") / (half - 1)))
        table = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return (weight * table[None]).to(device, dtype)


class PositionTable(nn.Module):
    """A learned position embedding: (1, U, C)."""

    boost = 3.0
    """Factor by which the stored table is multiplied."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, channels)

    def forward(self, steps: int) -> Tensor:
        """Return the first `steps` positions; raise `ValueError` if there are fewer."""
        if steps > self.embedding.num_embeddings:
            raise ValueError(
                f"the window has {steps} positions, but the network was trained on "
                f"{self.embedding.num_embeddings} (t_max_positions): use a shorter segment."
            )
        return self.embedding.weight[None, :steps] * self.boost


class TokenGroupNorm(nn.GroupNorm):
    """A group norm over all tokens of an item: (B, N, C) -> (B, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each item."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def _token_norm(groups: int, channels: int) -> nn.Module:
    """Build a group norm over all tokens of an item; for 0 groups, a layer norm of each token."""
    return TokenGroupNorm(int(groups), channels) if groups else nn.LayerNorm(channels)


class Attention(nn.Module):
    """Self- or cross-attention with the weights of `nn.MultiheadAttention`.

    The built-in module would keep the whole matrix of scores in memory on a CPU.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.channels = channels
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from `query` (B, N, C) to `memory` (B, M, C), or for None to `query` itself."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if memory is None:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        else:
            c = self.channels
            q = F.linear(query, weight[:c], bias[:c])
            k, v = F.linear(memory, weight[c:], bias[c:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
        y: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return y


class TransformerLayer(nn.Module):
    """The parts that self- and cross-attention layers share."""

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    gamma_1: nn.Module
    gamma_2: nn.Module

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.activation = F.gelu if config.gelu else F.relu

    def _add_feed_forward(self, config: TransformerConfig, norms: int) -> None:
        """Add the modules after the attention, in the order of the state dicts."""
        dim = config.dim
        hidden = int(dim * config.hidden_scale)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        for index in range(1, norms + 1):
            self.add_module(f"norm{index}", _token_norm(config.group_norm, dim))
        # `&`, as in upstream: if `norm_out` is even, there is no norm.
        groups = bool(config.norm_first) & config.norm_out
        self.norm_out = TokenGroupNorm(int(groups), dim) if groups else nn.Identity()
        self.gamma_1, self.gamma_2 = (
            LayerScale(dim, _SCALE_INIT, channel_last=True) if config.layer_scale else nn.Identity()
            for _ in range(2)
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the two-layer perceptron."""
        y: Tensor = self.linear2(self.activation(self.linear1(x)))
        return y


class SelfLayer(TransformerLayer):
    """A layer with self-attention: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.dim, config.heads)
        self._add_feed_forward(config, norms=2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and perceptron, each with its norm and residual connection."""
        if self.norm_first:
            x = x + self.gamma_1(self.self_attn(self.norm1(x)))
            x = x + self.gamma_2(self.feed_forward(self.norm2(x)))
            x = self.norm_out(x)
        else:
            x = self.norm1(x + self.gamma_1(self.self_attn(x)))
            x = self.norm2(x + self.gamma_2(self.feed_forward(x)))
        return x


class CrossLayer(TransformerLayer):
    """A layer with cross-attention from (B, N, C) to another sequence (B, M, C) -> (B, N, C)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.cross_attn = Attention(config.dim, config.heads)
        self._add_feed_forward(config, norms=3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Attend to `other`, then apply the perceptron, each with norm and residual connection."""
        if self.norm_first:
            x = x + self.gamma_1(self.cross_attn(self.norm1(x), self.norm2(other)))
            x = x + self.gamma_2(self.feed_forward(self.norm3(x)))
            x = self.norm_out(x)
        else:
            x = self.norm1(x + self.gamma_1(self.cross_attn(x, other)))
            x = self.norm2(x + self.gamma_2(self.feed_forward(x)))
        return x


class CrossTransformer(nn.Module):
    """The stacks of layers for the spectrogram (B, C, F, T) and for the waveform (B, C, U)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        if config.emb == "scaled":
            self.position_embeddings = PositionTable(config.max_positions, config.dim)
        self.norm_in = self._make_norm_in()
        self.norm_in_t = self._make_norm_in()
        self.layers = self._make_layers()
        self.layers_t = self._make_layers()

    def _make_norm_in(self) -> nn.Module:
        if not self.config.norm_in and not self.config.norm_in_group:
            return nn.Identity()
        return _token_norm(0 if self.config.norm_in else self.config.norm_in_group, self.config.dim)

    def _make_layers(self) -> nn.ModuleList:
        crosses = (index % 2 != int(self.config.cross_first) for index in range(self.config.layers))
        return nn.ModuleList(
            CrossLayer(self.config) if cross else SelfLayer(self.config) for cross in crosses
        )

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Apply both stacks, layer by layer.

        A cross-attention layer attends to the input, not to the output, of the layer at the same
        depth in the other stack.
        """
        _, _, bins, frames = x.shape
        x = x.permute(0, 3, 2, 1).flatten(1, 2)  # (B, T*F, C)
        x = self.norm_in(x) + self._positions(x, bins, frames)
        xt = xt.transpose(1, 2)  # (B, U, C)
        xt = self.norm_in_t(xt) + self._positions_t(xt)
        for layer, layer_t in zip(self.layers, self.layers_t, strict=True):
            if isinstance(layer, CrossLayer):
                x, xt = layer(x, xt), layer_t(xt, x)
            else:
                x, xt = layer(x), layer_t(xt)
        return x.unflatten(1, (frames, bins)).permute(0, 3, 2, 1), xt.transpose(1, 2)

    def _positions(self, x: Tensor, bins: int, frames: int) -> Tensor:
        config = self.config
        return positions_2d(
            config.dim, bins, frames, config.max_period, config.weight_pos_embed, x.dtype, x.device
        )

    def _positions_t(self, xt: Tensor) -> Tensor:
        config = self.config
        if config.emb == "scaled":
            learned: Tensor = self.position_embeddings(xt.shape[1])
            return config.weight_pos_embed * learned
        return positions_1d(
            config.dim,
            xt.shape[1],
            config.max_period,
            config.weight_pos_embed,
            config.emb == "cape" and config.cape_mean_normalize,
            xt.dtype,
            xt.device,
        )
