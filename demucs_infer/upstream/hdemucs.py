"""Offer the layers of upstream's `demucs.hdemucs`."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import (
    BandDecoder,
    BandEncoder,
    DecoderLayer,
    EncoderLayer,
    FrequencyEmbedding,
    LayerConfig,
)
from demucs_infer.spec import pad_reflect
from demucs_infer.upstream import LayerFront
from demucs_infer.upstream.demucs import make_dconv_config


def pad1d(
    x: Tensor, paddings: tuple[int, int], mode: str = "constant", value: float = 0.0
) -> Tensor:
    """Pad the last axis; "reflect" works for short signals too."""
    return pad_reflect(x, *paddings) if mode == "reflect" else F.pad(x, paddings, mode, value)


class ScaledEmbedding(FrequencyEmbedding, metaclass=LayerFront):
    """An embedding whose stored values are multiplied by `scale`.

    With `smooth`, the initial values change little from one index to the next.
    """

    layers_of_networks = FrequencyEmbedding

    def __init__(
        self, num_embeddings: int, embedding_dim: int, scale: float = 10.0, smooth: bool = False
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scale)
        weight = self.embedding.weight.data
        if smooth:
            counts = torch.arange(1, num_embeddings + 1, dtype=weight.dtype, device=weight.device)
            weight.copy_(weight.cumsum(0) / counts.sqrt()[:, None])
        weight /= scale

    @property
    def weight(self) -> Tensor:
        """The stored values times `scale`."""
        return self.embedding.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Look up indices: (...) -> (..., embedding_dim)."""
        y: Tensor = self.embedding(x) * self.scale
        return y


def _make_config(
    *,
    kernel_size: int,
    stride: int,
    norm_groups: int,
    freq: bool,
    dconv: bool,
    norm: bool,
    context: int,
    dconv_kw: Mapping[str, Any],
    pad: bool,
    rewrite: bool,
    context_freq: bool = True,
) -> LayerConfig:
    residual = make_dconv_config(**dconv_kw) if dconv else None
    return LayerConfig(
        over_frequency=freq,
        kernel_size=kernel_size,
        stride=stride,
        padded=pad,
        norm_groups=norm_groups if norm else None,
        rewrite=rewrite,
        context_encoder=context,
        context_decoder=context,
        context_across_bins=context_freq,
        dconv_encoder=residual,
        dconv_decoder=residual,
    )


class HEncLayer(EncoderLayer, metaclass=LayerFront):
    """An encoder layer over frequency (B, C, F, T), or with `freq=False` over time (B, C, T)."""

    layers_of_networks = EncoderLayer

    def __init__(
        self,
        chin: int,
        chout: int,
        kernel_size: int = 8,
        stride: int = 4,
        norm_groups: int = 1,
        empty: bool = False,
        freq: bool = True,
        dconv: bool = True,
        norm: bool = True,
        context: int = 0,
        dconv_kw: Mapping[str, Any] = {},
        pad: bool = True,
        rewrite: bool = True,
    ) -> None:
        config = _make_config(
            kernel_size=kernel_size,
            stride=stride,
            norm_groups=norm_groups,
            freq=freq,
            dconv=dconv,
            norm=norm,
            context=context,
            dconv_kw=dconv_kw,
            pad=pad,
            rewrite=rewrite,
        )
        super().__init__(chin, chout, config, empty)


class HDecLayer(DecoderLayer, metaclass=LayerFront):
    """A decoder layer that mirrors `HEncLayer`; the `last` one has no activation."""

    layers_of_networks = DecoderLayer

    def __init__(
        self,
        chin: int,
        chout: int,
        last: bool = False,
        kernel_size: int = 8,
        stride: int = 4,
        norm_groups: int = 1,
        empty: bool = False,
        freq: bool = True,
        dconv: bool = True,
        norm: bool = True,
        context: int = 1,
        dconv_kw: Mapping[str, Any] = {},
        pad: bool = True,
        context_freq: bool = True,
        rewrite: bool = True,
    ) -> None:
        config = _make_config(
            kernel_size=kernel_size,
            stride=stride,
            norm_groups=norm_groups,
            freq=freq,
            dconv=dconv,
            norm=norm,
            context=context,
            dconv_kw=dconv_kw,
            pad=pad,
            rewrite=rewrite,
            context_freq=context_freq,
        )
        super().__init__(chin, chout, config, empty, last)


class MultiWrap(nn.Module, metaclass=LayerFront):
    """A layer for each band of bins: a `BandEncoder` or `BandDecoder` with new weights."""

    layers_of_networks = BandEncoder, BandDecoder

    def __new__(  # type: ignore[misc]
        cls, layer: EncoderLayer | DecoderLayer, split_ratios: Sequence[float]
    ) -> BandEncoder | BandDecoder:
        """Build layers like `layer`, which must be over frequency, padded and without a norm."""
        config = layer.config
        if not config.over_frequency or not config.padded or config.norm_groups is not None:
            raise ValueError("MultiWrap needs a layer with freq=True, pad=True and norm=False")
        if isinstance(layer, EncoderLayer):
            conv = cast(nn.Conv2d, layer.conv)
            return BandEncoder(conv.in_channels, conv.out_channels, config, split_ratios)
        if config.context_across_bins:
            raise ValueError("MultiWrap needs a decoder layer with context_freq=False")
        channels_out = cast(nn.ConvTranspose2d, layer.conv_tr).out_channels
        return BandDecoder(layer.channels_in, channels_out, config, split_ratios, layer.last)
