"""The cross-domain transformer between the two halves of HTDemucs.

Two stacks of layers, one for the spectrogram and one for the waveform; every other layer of each
attends to the other stack. Dropout, position shifts and augmentation act in training only.

Shapes: B batch, C channels, F bins, T frames, U steps of the waveform branch, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import LayerScale

_SCALE_INIT = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """What decides the shape of a transformer, under the names that trainings gave it."""

    dim: int
    emb: str
    """Positions of the waveform branch: "sin", "cape" or "scaled" (a learnt table)."""
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
                f"the transformer has {self.dim} channels for t_heads={self.heads}: "
                "the channels must be a multiple of the heads."
            )
        if self.dim % 4:
            raise ValueError(
                f"the transformer has {self.dim} channels: its table of positions needs a "
                "multiple of 4."
            )
        if self.emb not in ("sin", "cape", "scaled"):
            raise ValueError(f"t_emb={self.emb!r} must be 'sin', 'cape' or 'scaled'.")


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
    """Where each token of a spectrogram is, frame by frame: (1 T*F C)."""
    # An inference tensor in the cache would poison every later use under autograd.
    with torch.inference_mode(False):
        rates = torch.arange(0.0, channels // 2, 2, device="cpu")
        rates = torch.exp(rates * -(math.log(max_period) / (channels // 2)))
        of_frames, of_bins = (_waves(count, rates) for count in (frames, bins))
        table = torch.cat(
            [
                of_frames[:, None].expand(-1, bins, -1),
                of_bins[None, :].expand(frames, -1, -1),
            ],
            dim=-1,
        )
        return (weight * table.flatten(0, 1)[None]).to(device, dtype)


def _waves(count: int, rates: Tensor) -> Tensor:
    """Sines and cosines in turn of `count` positions: (count 2*rates)."""
    angles = torch.arange(0.0, count, device="cpu")[:, None] * rates
    return torch.stack([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(1)


@lru_cache(maxsize=8)
def positions_1d(
    channels: int,
    steps: int,
    max_period: float,
    weight: float,
    centred: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Where each step of the waveform branch is, counted from the middle if `centred`: (1 U C)."""
    with torch.inference_mode(False):
        where = torch.arange(0.0, steps, device="cpu")[:, None]
        if centred:
            where = where - where.mean()
        half = channels // 2
        angles = where / (max_period ** (torch.arange(half, device="cpu") / (half - 1)))
        table = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return (weight * table[None]).to(device, dtype)


class PositionTable(nn.Module):
    """Learnt positions: (1 U C)."""

    boost = 3.0
    """Factor between the stored table and the positions."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, channels)

    def forward(self, steps: int) -> Tensor:
        if steps > self.embedding.num_embeddings:
            raise ValueError(
                f"the window has {steps} positions and the network learnt "
                f"{self.embedding.num_embeddings} (t_max_positions): use a shorter segment."
            )
        return self.embedding.weight[None, :steps] * self.boost


class TokenGroupNorm(nn.GroupNorm):
    """A group norm over all tokens of an item: (B N C) -> (B N C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def _token_norm(groups: int, channels: int) -> nn.Module:
    """Over all tokens in so many groups, or over the channels of each token for zero."""
    return TokenGroupNorm(int(groups), channels) if groups else nn.LayerNorm(channels)


class Attention(nn.Module):
    """Attention of one sequence to another, or to itself, with `nn.MultiheadAttention`'s weights.

    Its own module because the built-in one holds the whole matrix of scores on a processor.
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
        """(B N C), and (B M C) to attend to (None: itself) -> (B N C)."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if memory is None:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        else:
            c = self.channels
            q = F.linear(query, weight[:c], bias[:c])
            k, v = F.linear(memory, weight[c:], bias[c:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B heads N C/heads)
        y: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return y


class TransformerLayer(nn.Module):
    """What a layer that attends to itself and one that attends elsewhere have in common."""

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    gamma_1: nn.Module
    gamma_2: nn.Module

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.activation = F.gelu if config.gelu else F.relu

    def _build(self, config: TransformerConfig, norms: int) -> None:
        """Everything after the attention, in the order in which checkpoints list it."""
        dim = config.dim
        hidden = int(dim * config.hidden_scale)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        for index in range(1, norms + 1):
            self.add_module(f"norm{index}", _token_norm(config.group_norm, dim))
        # `&`: an even number of groups at the way out meant none, as trained.
        groups = bool(config.norm_first) & config.norm_out
        self.norm_out = TokenGroupNorm(int(groups), dim) if groups else nn.Identity()
        self.gamma_1, self.gamma_2 = (
            LayerScale(dim, _SCALE_INIT, channel_last=True) if config.layer_scale else nn.Identity()
            for _ in range(2)
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear2(self.activation(self.linear1(x)))
        return y


class SelfLayer(TransformerLayer):
    """(B N C) -> (B N C)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.dim, config.heads)
        self._build(config, norms=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.gamma_1(self.self_attn(self.norm1(x)))
            x = x + self.gamma_2(self.feed_forward(self.norm2(x)))
            x = self.norm_out(x)
        else:
            x = self.norm1(x + self.gamma_1(self.self_attn(x)))
            x = self.norm2(x + self.gamma_2(self.feed_forward(x)))
        return x


class CrossLayer(TransformerLayer):
    """(B N C), and (B M C) to attend to -> (B N C)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.cross_attn = Attention(config.dim, config.heads)
        self._build(config, norms=3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.gamma_1(self.cross_attn(self.norm1(x), self.norm2(other)))
            x = x + self.gamma_2(self.feed_forward(self.norm3(x)))
            x = self.norm_out(x)
        else:
            x = self.norm1(x + self.gamma_1(self.cross_attn(x, other)))
            x = self.norm2(x + self.gamma_2(self.feed_forward(x)))
        return x


class CrossTransformer(nn.Module):
    """(B C F T) and (B C U) -> the same."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        if config.emb == "scaled":
            self.position_embeddings = PositionTable(config.max_positions, config.dim)
        self.norm_in = self._norm_in()
        self.norm_in_t = self._norm_in()
        self.layers = self._stack()
        self.layers_t = self._stack()

    def _norm_in(self) -> nn.Module:
        if not self.config.norm_in and not self.config.norm_in_group:
            return nn.Identity()
        return _token_norm(0 if self.config.norm_in else self.config.norm_in_group, self.config.dim)

    def _stack(self) -> nn.ModuleList:
        crosses = (index % 2 != int(self.config.cross_first) for index in range(self.config.layers))
        return nn.ModuleList(
            CrossLayer(self.config) if cross else SelfLayer(self.config) for cross in crosses
        )

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        _, _, bins, frames = x.shape
        x = x.permute(0, 3, 2, 1).flatten(1, 2)  # (B T*F C)
        x = self.norm_in(x) + self._positions(x, bins, frames)
        xt = xt.transpose(1, 2)  # (B U C)
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
            learnt: Tensor = self.position_embeddings(xt.shape[1])
            return config.weight_pos_embed * learnt
        return positions_1d(
            config.dim,
            xt.shape[1],
            config.max_period,
            config.weight_pos_embed,
            config.emb == "cape" and config.cape_mean_normalize,
            xt.dtype,
            xt.device,
        )
