"""Define the layers that the networks share.

Attribute names and positions in a `Sequential` match the state dicts of the released checkpoints.

Shapes: B batch, C channels, F bins, T steps of time (frames or samples), K keys, Q queries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BLSTM_STEPS = 200
"""Largest number of steps that the LSTM of a residual branch reads in one go."""


def group_norm(groups: int | None, channels: int) -> nn.Module:
    """Build a group norm; for None an identity, so that later modules keep their positions."""
    return nn.Identity() if groups is None else nn.GroupNorm(groups, channels)


class LayerScale(nn.Module):
    """A learned gain per channel: (..., C, T), or (..., T, C) if `channel_last`."""

    def __init__(self, channels: int, init: float = 0.0, channel_last: bool = False) -> None:
        super().__init__()
        self.channel_last = channel_last
        self.scale = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel."""
        return (self.scale if self.channel_last else self.scale[:, None]) * x


class BLSTM(nn.Module):
    """A bidirectional LSTM and a projection back to C channels: (B, C, T) -> (B, C, T).

    Inputs longer than `max_steps` (a multiple of four) are read in frames that overlap by half;
    the middle half of each frame is kept.
    """

    def __init__(
        self, dim: int, layers: int = 1, max_steps: int | None = None, skip: bool = False
    ) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.skip = skip
        self.lstm = nn.LSTM(dim, dim, num_layers=layers, bidirectional=True)
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Run the LSTM and the projection, plus the input if `skip`."""
        if self.max_steps is None or x.shape[-1] <= self.max_steps:
            y = self._run_lstm(x)
        else:
            y = self._run_lstm_in_frames(x, self.max_steps)
        return y + x if self.skip else y

    def _run_lstm(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.lstm(x.permute(2, 0, 1))[0])  # (T, B, C)
        return y.permute(1, 2, 0)

    def _run_lstm_in_frames(self, x: Tensor, width: int) -> Tensor:
        batch, channels, length = x.shape
        stride, margin = width // 2, width // 4
        frames = math.ceil(length / stride)
        x = F.pad(x, (0, (frames - 1) * stride + width - length))
        x = x.unfold(-1, width, stride).permute(0, 2, 1, 3)  # (B, frames, C, width)
        y = self._run_lstm(x.reshape(-1, channels, width)).reshape(batch, frames, channels, width)
        middles = y[..., margin:-margin].transpose(1, 2).flatten(2)
        return torch.cat([y[:, 0, :, :margin], middles, y[:, -1, :, -margin:]], -1)[..., :length]


class LocalState(nn.Module):
    """Self-attention that decays with distance, at a rate per query: (B, C, T) -> (B, C, T)."""

    num_decays = 4

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"local attention has {channels} hidden channels and {heads} heads: the channels "
                "must be a multiple of the heads; change dconv_comp or dconv_attn."
            )
        self.heads = heads
        self.content = nn.Conv1d(channels, channels, 1)
        self.query = nn.Conv1d(channels, channels, 1)
        self.key = nn.Conv1d(channels, channels, 1)
        self.query_decay = nn.Conv1d(channels, heads * self.num_decays, 1)
        self.proj = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add to each step what it attends to."""
        queries, keys, content, decays = (
            project(x).unflatten(1, (self.heads, -1))
            for project in (self.query, self.key, self.content, self.query_decay)
        )
        scores = torch.einsum("bhck,bhcq->bhkq", keys, queries)
        scores /= keys.shape[2] ** 0.5
        scores += torch.einsum("nkq,bhnq->bhkq", self._decay_penalty(x), torch.sigmoid(decays) / 2)
        # A step never attends to itself.
        diagonal = torch.eye(x.shape[-1], device=x.device, dtype=torch.bool)
        weights = torch.softmax(scores.masked_fill_(diagonal, -100), dim=2)
        attended = torch.einsum("bhkq,bhck->bhcq", weights, content).flatten(1, 2)
        y: Tensor = x + self.proj(attended)
        return y

    def _decay_penalty(self, x: Tensor) -> Tensor:
        """Return the penalty of key k for query q at each decay rate: (rates, K, Q)."""
        steps = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        rates = torch.arange(1, self.num_decays + 1, device=x.device, dtype=x.dtype)
        distance = (steps[:, None] - steps[None, :]).abs()
        penalty: Tensor = rates[:, None, None] * distance / self.num_decays**0.5
        return -penalty


@dataclass(frozen=True, kw_only=True)  # no slots: the compiler needs weak references
class DConvConfig:
    """The parameters of the residual branches of one stage."""

    depth: int
    """Number of branches; negative: without dilation."""
    compress: float
    """Channels outside a branch divided by those inside it."""
    init: float
    """Initial value of the layer scales."""
    lstm: bool = False
    attn: bool = False


class DConv(nn.Module):
    """Residual branches of dilated convolutions with few channels: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, config: DConvConfig) -> None:
        super().__init__()
        hidden = int(channels / config.compress)
        if config.depth and not hidden:
            raise ValueError(
                f"dconv_comp={config.compress} leaves none of {channels} channels inside the "
                f"residual branches: use at most {channels}."
            )
        self.layers = nn.ModuleList(
            _make_branch(channels, hidden, 2**index if config.depth > 0 else 1, config)
            for index in range(abs(config.depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add every branch in turn."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def _make_branch(channels: int, hidden: int, dilation: int, config: DConvConfig) -> nn.Sequential:
    memory: list[nn.Module] = []
    if config.lstm:
        memory.append(BLSTM(hidden, layers=2, max_steps=_BLSTM_STEPS, skip=True))
    if config.attn:
        memory.append(LocalState(hidden))
    return nn.Sequential(
        nn.Conv1d(channels, hidden, 3, dilation=dilation, padding=dilation),
        nn.GroupNorm(1, hidden),
        nn.GELU(),
        *memory,
        nn.Conv1d(hidden, 2 * channels, 1),
        nn.GroupNorm(1, 2 * channels),
        nn.GLU(1),
        LayerScale(channels, config.init),
    )


class FrequencyEmbedding(nn.Module):
    """A learned offset per channel and bin, times a fixed `scale`: (C, F)."""

    def __init__(self, bins: int, channels: int, scale: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(bins, channels)
        self.scale = scale

    def forward(self, bins: int) -> Tensor:
        """Return the offsets of the first `bins` bins."""
        return (self.embedding.weight[:bins] * self.scale).t()


@dataclass(frozen=True, kw_only=True)  # no slots: the compiler needs weak references
class LayerConfig:
    """The parameters that the encoder and decoder layers of one stage of one branch share."""

    over_frequency: bool
    """Whether the layer strides over the bins of (B, C, F, T), or over the time of (B, C, T)."""
    kernel_size: int
    stride: int
    padded: bool
    """Whether padding makes the encoder's output exactly 1 / stride as long as its input."""
    norm_groups: int | None
    """Groups of the group norm; None: no group norm."""
    rewrite: bool
    """Whether a second convolution precedes (decoder) or follows (encoder) the strided one."""
    context_encoder: int
    context_decoder: int
    """Neighbors on each side that the second convolution of the decoder reads."""
    context_across_bins: bool
    """Whether neighbors that the decoder reads are bins and frames, or only frames."""
    dconv_encoder: DConvConfig | None
    dconv_decoder: DConvConfig | None

    @property
    def padding(self) -> int:
        """Padding on each side of the strided axis."""
        return self.kernel_size // 4 if self.padded else 0

    def make_down_conv(self, channels_in: int, channels_out: int) -> nn.Module:
        """Build the strided convolution of an encoder."""
        if self.over_frequency:
            size, stride, padding = (self.kernel_size, 1), (self.stride, 1), (self.padding, 0)
            return nn.Conv2d(channels_in, channels_out, size, stride, padding)
        return nn.Conv1d(channels_in, channels_out, self.kernel_size, self.stride, self.padding)

    def make_up_conv(self, channels_in: int, channels_out: int) -> nn.Module:
        """Build the transposed convolution of a decoder, whose padding is cropped later."""
        if self.over_frequency:
            size, stride = (self.kernel_size, 1), (self.stride, 1)
            return nn.ConvTranspose2d(channels_in, channels_out, size, stride)
        return nn.ConvTranspose1d(channels_in, channels_out, self.kernel_size, self.stride)

    def make_rewrite_conv(self, channels: int, context: int, across_bins: bool = True) -> nn.Module:
        """Build the second convolution of a layer, which is followed by a GLU."""
        if not self.over_frequency:
            return nn.Conv1d(channels, 2 * channels, 1 + 2 * context, padding=context)
        beside = context if across_bins else 0
        size = (1 + 2 * beside, 1 + 2 * context)
        return nn.Conv2d(channels, 2 * channels, size, padding=(beside, context))


def _apply_per_bin(dconv: nn.Module, x: Tensor) -> Tensor:
    """Apply `dconv` to each bin on its own: (B, C, F, T) or (B, C, T) -> the same shape."""
    if x.dim() == 3:
        y: Tensor = dconv(x)
        return y
    batch, channels, bins, steps = x.shape
    y = dconv(x.permute(0, 2, 1, 3).reshape(-1, channels, steps))
    return y.view(batch, bins, channels, steps).permute(0, 2, 1, 3)


class EncoderLayer(nn.Module):
    """Encode one stage: (B, C, F, T) -> (B, C', F/stride, T), or (B, C, T) -> (B, C', T/stride).

    An `empty` layer, the last one of the time branch, is only a convolution. Its output is injected
    into the encoder layer of the frequency branch at the same stage.
    """

    def __init__(
        self, channels_in: int, channels_out: int, config: LayerConfig, empty: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.empty = empty
        self.conv = config.make_down_conv(channels_in, channels_out)
        if empty:
            return
        self.norm1 = group_norm(config.norm_groups, channels_out)
        self.rewrite: nn.Module | None = None
        if config.rewrite:
            self.rewrite = config.make_rewrite_conv(channels_out, config.context_encoder)
            self.norm2 = group_norm(config.norm_groups, 2 * channels_out)
        self.dconv: nn.Module | None = None
        if config.dconv_encoder is not None:
            self.dconv = DConv(channels_out, config.dconv_encoder)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Encode `x`, adding `inject` (the output of an empty layer) before the activation."""
        y: Tensor = self.conv(x if self.config.over_frequency else self._pad_to_stride(x))
        if self.empty:
            return y
        if inject is not None:
            y = y + (inject[:, :, None] if self.config.over_frequency else inject)
        y = F.gelu(self.norm1(y))
        if self.dconv is not None:
            y = _apply_per_bin(self.dconv, y)
        if self.rewrite is not None:
            y = F.glu(self.norm2(self.rewrite(y)), dim=1)
        return y

    def _pad_to_stride(self, x: Tensor) -> Tensor:
        """Drop an axis of one bin, and pad with silence to a whole number of strides."""
        if x.dim() == 4:
            x = x.flatten(1, 2)
        missing = -x.shape[-1] % self.config.stride
        return F.pad(x, (0, missing)) if missing else x


class DecoderLayer(nn.Module):
    """Decode one stage, mirroring `EncoderLayer`; the `last` one has no activation.

    An `empty` layer, the first one of the time branch, has no skip connection.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: LayerConfig,
        empty: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.empty = empty
        self.last = last
        self.channels_in = channels_in
        self.conv_tr = config.make_up_conv(channels_in, channels_out)
        self.norm2 = group_norm(config.norm_groups, channels_out)
        if empty:
            return
        self.rewrite: nn.Module | None = None
        if config.rewrite:
            self.rewrite = config.make_rewrite_conv(
                channels_in, config.context_decoder, config.context_across_bins
            )
            self.norm1 = group_norm(config.norm_groups, 2 * channels_in)
        self.dconv: nn.Module | None = None
        if config.dconv_decoder is not None:
            self.dconv = DConv(channels_in, config.dconv_decoder)

    def forward(self, x: Tensor, skip: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """Return the output (`length` steps of time) and the input of the upsampling."""
        y = x if skip is None else self.merge_skip(x, skip)
        z = self.crop(self.upsample(y), length)
        return (z if self.last else F.gelu(z)), y

    def merge_skip(self, x: Tensor, skip: Tensor) -> Tensor:
        """Combine the output of the next inner stage with the skip connection."""
        if self.config.over_frequency and x.dim() == 3:
            x = x.unflatten(1, (self.channels_in, -1))
        y = x + skip
        if self.rewrite is not None:
            y = F.glu(self.norm1(self.rewrite(y)), dim=1)
        if self.dconv is not None:
            y = _apply_per_bin(self.dconv, y)
        return y

    def upsample(self, y: Tensor) -> Tensor:
        """Apply the transposed convolution and its norm, without removing the padding."""
        z: Tensor = self.norm2(self.conv_tr(y))
        return z

    def crop(self, z: Tensor, length: int) -> Tensor:
        """Remove the padding of the transposed convolution from its output `z`."""
        padding = self.config.padding
        if not self.config.over_frequency:
            return z[..., padding : padding + length]
        return z[..., padding:-padding, :] if padding else z


class BandEncoder(nn.Module):
    """Encode each band of bins with its own layer; the outputs join without a seam."""

    def __init__(
        self, channels_in: int, channels_out: int, config: LayerConfig, ratios: Sequence[float]
    ) -> None:
        super().__init__()
        self.config = config
        self.ratios = tuple(ratios)
        band = dataclasses.replace(config, padded=False)
        self.layers = nn.ModuleList(
            EncoderLayer(channels_in, channels_out, band) for _ in range(len(self.ratios) + 1)
        )

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Encode (B, C, F, T) -> (B, C', F/stride, T); `inject` is never used with bands."""
        del inject
        padding = self.config.padding
        x = F.pad(x, (0, 0, padding, padding))
        bands = zip(self.layers, self._band_ranges(x.shape[2]), strict=True)
        return torch.cat([layer(x[:, :, start:stop]) for layer, (start, stop) in bands], dim=2)

    def _band_ranges(self, bins: int) -> list[tuple[int, int]]:
        """Return the range (start, stop) of padded input bins that each layer reads."""
        size, stride, padding = self.config.kernel_size, self.config.stride, self.config.padding
        start, bands = 0, []
        for ratio in self.ratios:
            target = round((bins - 2 * padding) * ratio) + padding
            outputs = round((target - start - size) / stride + 1)
            bands.append((start, start + (outputs - 1) * stride + size))
            start += outputs * stride
        return [*bands, (start, bins)]


class BandDecoder(nn.Module):
    """Decode the output of a `BandEncoder`; adjacent bands are summed where they overlap."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: LayerConfig,
        ratios: Sequence[float],
        last: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.ratios = tuple(ratios)
        self.last = last
        band = dataclasses.replace(config, padded=False, context_across_bins=False)
        self.layers = nn.ModuleList(
            DecoderLayer(channels_in, channels_out, band, last=True)
            for _ in range(len(self.ratios) + 1)
        )

    def forward(self, x: Tensor, skip: Tensor, length: int) -> tuple[Tensor, None]:
        """Return the output, and None instead of the input of the upsampling: it is not used."""
        del length
        bins, stride = x.shape[2], self.config.stride
        edges = [0, *(round(bins * ratio) for ratio in self.ratios), bins]
        bands: list[Tensor] = []
        for module, (start, stop) in zip(self.layers, pairwise(edges), strict=True):
            layer = cast(DecoderLayer, module)
            y = layer.upsample(layer.merge_skip(x[:, :, start:stop], skip[:, :, start:stop]))
            if bands:  # the previous band already added the bias here
                bias = cast(Tensor, layer.conv_tr.bias).view(1, -1, 1, 1)
                bands[-1][:, :, -stride:] += y[:, :, :stride] - bias
                y = y[:, :, stride:]
            bands.append(y)
        # Crop half a stride, rounded down at the start and up at the end.
        bands[0], bands[-1] = bands[0][:, :, stride // 2 :], bands[-1][:, :, : -stride // 2]
        z = torch.cat(bands, dim=2)
        return (z if self.last else F.gelu(z)), None
