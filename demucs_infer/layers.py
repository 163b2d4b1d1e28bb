"""The building blocks that the networks share.

Attribute names and positions in a `Sequential` are those of the released checkpoints.

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
"""Steps that an LSTM inside a residual branch sees at once."""


def group_norm(groups: int | None, channels: int) -> nn.Module:
    """A group norm, or the identity (which keeps its place in a `Sequential`) for None."""
    return nn.Identity() if groups is None else nn.GroupNorm(groups, channels)


class LayerScale(nn.Module):
    """One learnt gain a channel: (... C T), or (... T C) if `channel_last`."""

    def __init__(self, channels: int, init: float, channel_last: bool = False) -> None:
        super().__init__()
        self.channel_last = channel_last
        self.scale = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale if self.channel_last else self.scale[:, None]) * x


class BLSTM(nn.Module):
    """An LSTM in both directions and a projection back to C channels: (B C T) -> (B C T).

    With `max_steps` (a multiple of four), longer inputs are read in frames that overlap by half,
    of which the middle halves are kept.
    """

    def __init__(
        self, channels: int, layers: int, max_steps: int | None = None, skip: bool = False
    ) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.skip = skip
        self.lstm = nn.LSTM(channels, channels, num_layers=layers, bidirectional=True)
        self.linear = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.max_steps is None or x.shape[-1] <= self.max_steps:
            y = self._read(x)
        else:
            y = self._read_in_frames(x, self.max_steps)
        return y + x if self.skip else y

    def _read(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.lstm(x.permute(2, 0, 1))[0])  # (T B C)
        return y.permute(1, 2, 0)

    def _read_in_frames(self, x: Tensor, width: int) -> Tensor:
        batch, channels, length = x.shape
        stride, margin = width // 2, width // 4
        frames = math.ceil(length / stride)
        x = F.pad(x, (0, (frames - 1) * stride + width - length))
        x = x.unfold(-1, width, stride).permute(0, 2, 1, 3)  # (B frames C width)
        y = self._read(x.reshape(-1, channels, width)).reshape(batch, frames, channels, width)
        middles = y[..., margin:-margin].transpose(1, 2).flatten(2)
        return torch.cat([y[:, 0, :, :margin], middles, y[:, -1, :, -margin:]], -1)[..., :length]


class LocalState(nn.Module):
    """Attention that fades with distance, at a rate that each query learns: (B C T) -> (B C T)."""

    num_decays = 4

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"local attention splits {channels} hidden channels among {heads} heads: "
                "they must be a multiple; change dconv_comp or dconv_attn."
            )
        self.heads = heads
        self.content = nn.Conv1d(channels, channels, 1)
        self.query = nn.Conv1d(channels, channels, 1)
        self.key = nn.Conv1d(channels, channels, 1)
        self.query_decay = nn.Conv1d(channels, heads * self.num_decays, 1)
        self.proj = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, content, decays = (
            project(x).unflatten(1, (self.heads, -1))
            for project in (self.query, self.key, self.content, self.query_decay)
        )
        scores = torch.einsum("bhck,bhcq->bhkq", keys, queries)
        scores /= keys.shape[2] ** 0.5
        scores += torch.einsum("nkq,bhnq->bhkq", self._fading(x), torch.sigmoid(decays) / 2)
        # A step never attends to itself.
        itself = torch.eye(x.shape[-1], device=x.device, dtype=torch.bool)
        weights = torch.softmax(scores.masked_fill_(itself, -100), dim=2)
        result = torch.einsum("bhkq,bhck->bhcq", weights, content).flatten(1, 2)
        y: Tensor = x + self.proj(result)
        return y

    def _fading(self, x: Tensor) -> Tensor:
        """Penalty of key k for query q at each of the rates: (rates K Q)."""
        steps = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        rates = torch.arange(1, self.num_decays + 1, device=x.device, dtype=x.dtype)
        distance = (steps[:, None] - steps[None, :]).abs()
        penalty: Tensor = rates[:, None, None] * distance / self.num_decays**0.5
        return -penalty


@dataclass(frozen=True, slots=True, kw_only=True)
class DConvConfig:
    """What the residual branches of one level are made of."""

    depth: int
    """Number of branches; negative: without dilation."""
    compress: float
    """Factor between the channels outside and inside a branch."""
    init: float
    """What the layer scales of a fresh network start at."""
    lstm: bool = False
    attn: bool = False


class DConv(nn.Module):
    """Residual branches of dilated convolutions in few channels: (B C T) -> (B C T)."""

    def __init__(self, channels: int, config: DConvConfig) -> None:
        super().__init__()
        hidden = int(channels / config.compress)
        self.layers = nn.ModuleList(
            _branch(channels, hidden, 2**index if config.depth > 0 else 1, config)
            for index in range(abs(config.depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _branch(channels: int, hidden: int, dilation: int, config: DConvConfig) -> nn.Sequential:
    inner: list[nn.Module] = []
    if config.lstm:
        inner.append(BLSTM(hidden, layers=2, max_steps=_BLSTM_STEPS, skip=True))
    if config.attn:
        inner.append(LocalState(hidden))
    return nn.Sequential(
        nn.Conv1d(channels, hidden, 3, dilation=dilation, padding=dilation),
        nn.GroupNorm(1, hidden),
        nn.GELU(),
        *inner,
        nn.Conv1d(hidden, 2 * channels, 1),
        nn.GroupNorm(1, 2 * channels),
        nn.GLU(1),
        LayerScale(channels, config.init),
    )


class FrequencyEmbedding(nn.Module):
    """A learnt offset for every channel and bin, times a fixed `scale`: (C F)."""

    def __init__(self, bins: int, channels: int, scale: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(bins, channels)
        self.scale = scale

    def forward(self, bins: int) -> Tensor:
        return (self.embedding.weight[:bins] * self.scale).t()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What the encoder and the decoder layer at one level of one branch have in common."""

    over_frequency: bool
    """Strides over F of (B C F T); otherwise over T of (B C T)."""
    kernel_size: int
    stride: int
    padded: bool
    """The coarse side has exactly 1 / stride of the steps of the fine side."""
    norm_groups: int | None
    """None: no group norm."""
    rewrite: bool
    """Mix the channels once more before (decoder) or after (encoder) the strided convolution."""
    context_encoder: int
    context_decoder: int
    """Neighbours on each side that the rewriting convolution of the decoder sees."""
    context_across_bins: bool
    """The neighbours of the decoder are bins and frames, not only frames."""
    dconv_encoder: DConvConfig | None
    dconv_decoder: DConvConfig | None

    @property
    def padding(self) -> int:
        return self.kernel_size // 4 if self.padded else 0

    def down(self, channels_in: int, channels_out: int) -> nn.Module:
        """The convolution from the fine to the coarse side."""
        if self.over_frequency:
            size, stride, padding = (self.kernel_size, 1), (self.stride, 1), (self.padding, 0)
            return nn.Conv2d(channels_in, channels_out, size, stride, padding)
        return nn.Conv1d(channels_in, channels_out, self.kernel_size, self.stride, self.padding)

    def up(self, channels_in: int, channels_out: int) -> nn.Module:
        """The convolution from the coarse to the fine side, its padding not yet cut off."""
        if self.over_frequency:
            size, stride = (self.kernel_size, 1), (self.stride, 1)
            return nn.ConvTranspose2d(channels_in, channels_out, size, stride)
        return nn.ConvTranspose1d(channels_in, channels_out, self.kernel_size, self.stride)

    def mixer(self, channels: int, context: int, across_bins: bool = True) -> nn.Module:
        """The rewriting convolution, whose answer goes through a gate."""
        if not self.over_frequency:
            return nn.Conv1d(channels, 2 * channels, 1 + 2 * context, padding=context)
        beside = context if across_bins else 0
        size = (1 + 2 * beside, 1 + 2 * context)
        return nn.Conv2d(channels, 2 * channels, size, padding=(beside, context))


def _along_time(dconv: nn.Module, x: Tensor) -> Tensor:
    """`dconv` on every bin by itself: (B C F T) or (B C T) -> the same."""
    if x.dim() == 3:
        y: Tensor = dconv(x)
        return y
    batch, channels, bins, steps = x.shape
    y = dconv(x.permute(0, 2, 1, 3).reshape(-1, channels, steps))
    return y.view(batch, bins, channels, steps).permute(0, 2, 1, 3)


class EncoderLayer(nn.Module):
    """One step down: (B C F T) -> (B C' F/stride T), or (B C T) -> (B C' T/stride).

    An `empty` layer is its convolution only, the last one of the time branch: its answer has the
    shape of the other branch at that level and is injected there.
    """

    def __init__(
        self, channels_in: int, channels_out: int, config: LayerConfig, empty: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.empty = empty
        self.conv = config.down(channels_in, channels_out)
        if empty:
            return
        self.norm1 = group_norm(config.norm_groups, channels_out)
        self.rewrite: nn.Module | None = None
        if config.rewrite:
            self.rewrite = config.mixer(channels_out, config.context_encoder)
            self.norm2 = group_norm(config.norm_groups, 2 * channels_out)
        self.dconv: nn.Module | None = None
        if config.dconv_encoder is not None:
            self.dconv = DConv(channels_out, config.dconv_encoder)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(x if self.config.over_frequency else self._whole_strides(x))
        if self.empty:
            return y
        if inject is not None:
            y = y + (inject[:, :, None] if self.config.over_frequency else inject)
        y = F.gelu(self.norm1(y))
        if self.dconv is not None:
            y = _along_time(self.dconv, y)
        if self.rewrite is not None:
            y = F.glu(self.norm2(self.rewrite(y)), dim=1)
        return y

    def _whole_strides(self, x: Tensor) -> Tensor:
        """Without the axis of bins, and with silence up to a whole stride."""
        if x.dim() == 4:
            x = x.flatten(1, 2)
        missing = -x.shape[-1] % self.config.stride
        return F.pad(x, (0, missing)) if missing else x


class DecoderLayer(nn.Module):
    """One step up, the mirror of `EncoderLayer`; `last` leaves out the activation.

    An `empty` layer begins the time branch: it has no skip connection.
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
        self.conv_tr = config.up(channels_in, channels_out)
        self.norm2 = group_norm(config.norm_groups, channels_out)
        if empty:
            return
        self.rewrite: nn.Module | None = None
        if config.rewrite:
            self.rewrite = config.mixer(
                channels_in, config.context_decoder, config.context_across_bins
            )
            self.norm1 = group_norm(config.norm_groups, 2 * channels_in)
        self.dconv: nn.Module | None = None
        if config.dconv_decoder is not None:
            self.dconv = DConv(channels_in, config.dconv_decoder)

    def forward(self, x: Tensor, skip: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """The fine side, `length` steps of time, and what it was made of on the coarse side."""
        y = x if skip is None else self.blend(x, skip)
        z = self.trim(self.spread(y), length)
        return (z if self.last else F.gelu(z)), y

    def blend(self, x: Tensor, skip: Tensor) -> Tensor:
        """What comes from below and what comes across, mixed on the coarse side."""
        if self.config.over_frequency and x.dim() == 3:
            x = x.unflatten(1, (self.channels_in, -1))
        y = x + skip
        if self.rewrite is not None:
            y = F.glu(self.norm1(self.rewrite(y)), dim=1)
        if self.dconv is not None:
            y = _along_time(self.dconv, y)
        return y

    def spread(self, y: Tensor) -> Tensor:
        """From the coarse to the fine side, padding included."""
        z: Tensor = self.norm2(self.conv_tr(y))
        return z

    def trim(self, z: Tensor, length: int) -> Tensor:
        """Without the padding."""
        padding = self.config.padding
        if not self.config.over_frequency:
            return z[..., padding : padding + length]
        return z[..., padding:-padding, :] if padding else z


class BandEncoder(nn.Module):
    """Several encoder layers, each for one band of bins, next to each other without a seam."""

    def __init__(
        self, channels_in: int, channels_out: int, config: LayerConfig, ratios: Sequence[float]
    ) -> None:
        super().__init__()
        self.config = config
        self.ratios = tuple(ratios)
        inner = dataclasses.replace(config, padded=False)
        self.layers = nn.ModuleList(
            EncoderLayer(channels_in, channels_out, inner) for _ in range(len(self.ratios) + 1)
        )

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """(B C F T) -> (B C' F/stride T); nothing is ever injected into a band."""
        del inject
        padding = self.config.padding
        x = F.pad(x, (0, 0, padding, padding))
        bands = zip(self.layers, self._bands(x.shape[2]), strict=True)
        return torch.cat([layer(x[:, :, start:stop]) for layer, (start, stop) in bands], dim=2)

    def _bands(self, bins: int) -> list[tuple[int, int]]:
        """What each layer reads, in bins of the padded input: whole strides, one after another."""
        size, stride, padding = self.config.kernel_size, self.config.stride, self.config.padding
        start, bands = 0, []
        for ratio in self.ratios:
            wish = round((bins - 2 * padding) * ratio) + padding
            outputs = round((wish - start - size) / stride + 1)
            bands.append((start, start + (outputs - 1) * stride + size))
            start += outputs * stride
        return [*bands, (start, bins)]


class BandDecoder(nn.Module):
    """The mirror of `BandEncoder`: neighbouring bands are added where their kernels overlap."""

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
        inner = dataclasses.replace(config, padded=False, context_across_bins=False)
        self.layers = nn.ModuleList(
            DecoderLayer(channels_in, channels_out, inner, last=True)
            for _ in range(len(self.ratios) + 1)
        )

    def forward(self, x: Tensor, skip: Tensor, length: int) -> tuple[Tensor, None]:
        """The fine side; bands have no single coarse side that the time branch could begin at."""
        del length
        bins, stride = x.shape[2], self.config.stride
        edges = [0, *(round(bins * ratio) for ratio in self.ratios), bins]
        bands: list[Tensor] = []
        for module, (start, stop) in zip(self.layers, pairwise(edges), strict=True):
            layer = cast(DecoderLayer, module)
            y = layer.spread(layer.blend(x[:, :, start:stop], skip[:, :, start:stop]))
            if bands:  # the bias is already there once
                bias = cast(Tensor, layer.conv_tr.bias).view(1, -1, 1, 1)
                bands[-1][:, :, -stride:] += y[:, :, :stride] - bias
                y = y[:, :, stride:]
            bands.append(y)
        # Half a stride is rounded down in front and up behind.
        bands[0], bands[-1] = bands[0][:, :, stride // 2 :], bands[-1][:, :, : -stride // 2]
        z = torch.cat(bands, dim=2)
        return (z if self.last else F.gelu(z)), None
