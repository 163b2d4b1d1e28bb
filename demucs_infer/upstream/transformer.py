"""Offer the layers of upstream's `demucs.transformer`.

Shapes: B batch, C channels, F bins, T frames, N tokens.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.transformer import (
    CrossLayer,
    CrossTransformer,
    PositionTable,
    SelfLayer,
    TokenGroupNorm,
    TransformerConfig,
    positions_1d,
    positions_2d,
)
from demucs_infer.upstream import LayerFront, require

MyGroupNorm = TokenGroupNorm

Activation = Callable[[Tensor], Tensor] | str


def create_sin_embedding(
    length: int,
    dim: int,
    shift: int = 0,
    device: torch.device | str = "cpu",
    max_period: float = 10000,
) -> Tensor:
    """Return the position embedding of the waveform: (length, 1, dim)."""
    table = _positions_1d(dim, shift + length, max_period, False, device)
    return table[shift:, None]


def create_2d_sin_embedding(
    d_model: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
    max_period: float = 10000,
) -> Tensor:
    """Return the position embedding of a spectrogram: (1, d_model, height, width)."""
    if d_model % 4:
        raise ValueError(f"{d_model = } must be a multiple of 4")
    table = positions_2d(
        d_model, height, width, max_period, 1.0, torch.float32, torch.device(device)
    )
    grid: Tensor = table.unflatten(1, (width, height))
    return grid.permute(0, 3, 2, 1).contiguous()


def create_sin_embedding_cape(
    length: int,
    dim: int,
    batch_size: int,
    mean_normalize: bool,
    augment: bool,
    max_global_shift: float = 0.0,  # noqa: ARG001 (for the augmentation)
    max_local_shift: float = 0.0,  # noqa: ARG001
    max_scale: float = 1.0,  # noqa: ARG001
    device: torch.device | str = "cpu",
    max_period: float = 10000.0,
) -> Tensor:
    """Return the position embedding of the waveform: (length, batch_size, dim)."""
    require("augment", augment, False)
    table = _positions_1d(dim, length, max_period, mean_normalize, device)
    return table[:, None].repeat(1, batch_size, 1)


def _positions_1d(
    dim: int, steps: int, max_period: float, centered: bool, device: torch.device | str
) -> Tensor:
    table = positions_1d(dim, steps, max_period, 1.0, centered, torch.float32, torch.device(device))
    return table[0].clone()  # the cached table is shared with the networks


def get_causal_mask(length: int) -> Tensor:
    """Return a mask (length, length) that is true above the diagonal: for later tokens."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class ScaledEmbedding(PositionTable, metaclass=LayerFront):
    """An embedding whose stored values are multiplied by `boost`."""

    layers_of_networks = PositionTable

    def __init__(
        self, num_embeddings: int, embedding_dim: int, scale: float = 1.0, boost: float = 3.0
    ) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.boost = boost
        self.embedding.weight.data *= scale / boost

    @property
    def weight(self) -> Tensor:
        """The stored values times `boost`."""
        return self.embedding.weight * self.boost

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Look up indices: (...) -> (..., embedding_dim)."""
        y: Tensor = self.embedding(x) * self.boost
        return y


def _make_config(
    d_model: int,
    nhead: int,
    dim_feedforward: int,
    activation: Activation,
    *,
    layer_scale: bool,
    norm_first: bool,
    group_norm: int,
    norm_out: int,
    layer_norm_eps: float,
    batch_first: bool,
    sparse: bool,
) -> TransformerConfig:
    require("sparse", sparse, False)
    require("layer_norm_eps", layer_norm_eps, 1e-5)
    if not batch_first and (group_norm or norm_out):
        raise ValueError(
            "group_norm and norm_out normalize over all tokens, which needs batch_first=True"
        )
    functions: dict[Activation, bool] = {F.gelu: True, "gelu": True, F.relu: False, "relu": False}
    if activation not in functions:
        raise ValueError(f"unsupported {activation=}: expected relu or gelu")
    return TransformerConfig(
        dim=d_model,
        emb="sin",
        hidden_scale=cast(float, Fraction(dim_feedforward, d_model)),  # exact
        heads=nhead,
        layers=1,
        cross_first=False,
        max_positions=1,
        norm_in=False,
        norm_in_group=0,
        group_norm=group_norm,
        norm_first=norm_first,
        norm_out=norm_out,
        max_period=10000.0,
        layer_scale=layer_scale,
        gelu=functions[activation],
        weight_pos_embed=1.0,
        cape_mean_normalize=True,
    )


class MyTransformerEncoderLayer(SelfLayer, metaclass=LayerFront):
    """A layer with self-attention: (N, B, C), or (B, N, C) with `batch_first`."""

    layers_of_networks = SelfLayer

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,  # noqa: ARG002 (only acts in training)
        activation: Activation = F.relu,
        group_norm: int = 0,
        norm_first: bool = False,
        norm_out: int = False,
        layer_norm_eps: float = 1e-5,
        layer_scale: bool = False,
        init_values: float = 1e-4,  # noqa: ARG002 (of new weights)
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sparse: bool = False,
        mask_type: str = "diag",  # noqa: ARG002 (of sparse attention, as those below)
        mask_random_seed: int = 42,  # noqa: ARG002
        sparse_attn_window: int = 500,  # noqa: ARG002
        global_window: int = 50,  # noqa: ARG002
        auto_sparsity: bool = False,  # noqa: ARG002
        sparsity: float = 0.95,  # noqa: ARG002
        batch_first: bool = False,
    ) -> None:
        config = _make_config(
            d_model,
            nhead,
            dim_feedforward,
            activation,
            layer_scale=layer_scale,
            norm_first=norm_first,
            group_norm=group_norm,
            norm_out=norm_out,
            layer_norm_eps=layer_norm_eps,
            batch_first=batch_first,
            sparse=sparse,
        )
        super().__init__(config)
        self.batch_first = batch_first
        self.to(device=device, dtype=dtype)

    def forward(
        self, src: Tensor, src_mask: None = None, src_key_padding_mask: None = None
    ) -> Tensor:
        """Apply the layer; masks are not supported."""
        require("src_mask", src_mask, None)
        require("src_key_padding_mask", src_key_padding_mask, None)
        if self.batch_first:
            return super().forward(src)
        return super().forward(src.transpose(0, 1)).transpose(0, 1)


class CrossTransformerEncoderLayer(CrossLayer, metaclass=LayerFront):
    """A layer with cross-attention: (N, B, C), or (B, N, C) with `batch_first`."""

    layers_of_networks = CrossLayer

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,  # noqa: ARG002 (only acts in training)
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        layer_scale: bool = False,
        init_values: float = 1e-4,  # noqa: ARG002 (of new weights)
        norm_first: bool = False,
        group_norm: int = False,
        norm_out: int = False,
        sparse: bool = False,
        mask_type: str = "diag",  # noqa: ARG002 (of sparse attention, as those below)
        mask_random_seed: int = 42,  # noqa: ARG002
        sparse_attn_window: int = 500,  # noqa: ARG002
        global_window: int = 50,  # noqa: ARG002
        sparsity: float = 0.95,  # noqa: ARG002
        auto_sparsity: bool | None = None,  # noqa: ARG002
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_first: bool = False,
    ) -> None:
        config = _make_config(
            d_model,
            nhead,
            dim_feedforward,
            activation,
            layer_scale=layer_scale,
            norm_first=norm_first,
            group_norm=group_norm,
            norm_out=norm_out,
            layer_norm_eps=layer_norm_eps,
            batch_first=batch_first,
            sparse=sparse,
        )
        super().__init__(config)
        self.batch_first = batch_first
        self.to(device=device, dtype=dtype)

    def forward(self, q: Tensor, k: Tensor, mask: None = None) -> Tensor:
        """Apply the layer; a mask is not supported."""
        require("mask", mask, None)
        if self.batch_first:
            return super().forward(q, k)
        return super().forward(q.transpose(0, 1), k.transpose(0, 1)).transpose(0, 1)


class CrossTransformerEncoder(CrossTransformer, metaclass=LayerFront):
    """The stacks of layers for the spectrogram (B, C, F, T) and for the waveform (B, C, N)."""

    layers_of_networks = CrossTransformer

    def __init__(
        self,
        dim: int,
        emb: str = "sin",
        hidden_scale: float = 4.0,
        num_heads: int = 8,
        num_layers: int = 6,
        cross_first: bool = False,
        dropout: float = 0.0,
        max_positions: int = 1000,
        norm_in: bool = True,
        norm_in_group: int = False,
        group_norm: int = False,
        norm_first: bool = False,
        norm_out: int = False,
        max_period: float = 10000.0,
        weight_decay: float = 0.0,
        lr: float | None = None,
        layer_scale: bool = False,
        gelu: bool = True,
        sin_random_shift: int = 0,
        weight_pos_embed: float = 1.0,
        cape_mean_normalize: bool = True,
        cape_augment: bool = True,
        cape_glob_loc_scale: Sequence[float] = (5000.0, 1.0, 1.4),
        sparse_self_attn: bool = False,
        sparse_cross_attn: bool = False,
        mask_type: str = "diag",
        mask_random_seed: int = 42,
        sparse_attn_window: int = 500,
        global_window: int = 50,
        auto_sparsity: bool = False,
        sparsity: float = 0.95,
    ) -> None:
        arguments: dict[str, Any] = {f"t_{name}": value for name, value in locals().items()}
        require("sparse_self_attn", sparse_self_attn, False)
        require("sparse_cross_attn", sparse_cross_attn, False)
        arguments |= {"t_heads": num_heads, "t_layers": num_layers}
        super().__init__(TransformerConfig.from_arguments(dim, arguments))
