"""The layers of the ladders, channels last and in tiles that stay in the cache.

Each stands in for the layer of the same name elsewhere, takes its weights, and accepts and answers
tensors of the same logical shape; only their order in memory differs.

Shapes: B batch, C channels, F bins, T steps of time.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.fast.kernels import Conv, Linear
from demucs_infer.fast.memory import (
    as_image,
    channels_last,
    empty_last,
    read_rows,
    rows_of,
    tiles,
    tiles_of_each,
)
from demucs_infer.fast.residual import FastDConv, plain
from demucs_infer.layers import DConv, DecoderLayer, EncoderLayer


def fits(layer: EncoderLayer | DecoderLayer) -> bool:
    """Whether a layer of a hybrid has a fast form."""
    config = layer.config
    return (
        not layer.empty
        and config.norm_groups is None
        and layer.rewrite is not None
        and config.context_encoder == 0
        and config.padded
        and plain(layer.dconv)
    )


def fits_waveform(layer: nn.Sequential) -> bool:
    """Whether a layer of the waveform network has one: no norms, and a gate."""
    kinds = {type(module) for module in layer}
    dconv = next((module for module in layer if isinstance(module, DConv)), None)
    return nn.GroupNorm not in kinds and nn.ReLU not in kinds and nn.GLU in kinds and plain(dconv)


def gate(wide: Tensor, out: Tensor) -> None:
    """The gated linear unit over the last axis, straight to where it belongs."""
    torch.ops.aten.glu.out(wide.to(out.dtype), -1, out=out)


def _fast(dconv: nn.Module | None) -> FastDConv | None:
    return None if dconv is None else FastDConv(cast(DConv, dconv))


class DownOverBins:
    """Strided convolution, branches, gate; in tiles of bins: (B C F T) -> (B C' F' T)."""

    def __init__(
        self, conv: nn.Conv2d, dconv: nn.Module | None, rewrite: nn.Conv2d, dtype: torch.dtype
    ) -> None:
        self._channels = conv.out_channels
        self._size, self._stride = conv.kernel_size[0], conv.stride[0]
        self._padding = cast(tuple[int, int], conv.padding)[0]
        self._conv = Conv(conv.weight, conv.bias, dtype, stride=(self._stride, 1))
        self._dconv = _fast(dconv)
        self._mix = Linear(rewrite.weight.flatten(1), rewrite.bias, dtype)

    def __call__(self, x: Tensor, inject: Tensor | None) -> Tensor:
        batch, _, bins, steps = x.shape
        bins = (bins + 2 * self._padding - self._size) // self._stride + 1
        out = empty_last((batch, self._channels, bins, steps))
        for item, start, stop in tiles_of_each(batch, bins, 8 * self._channels * steps):
            first = start * self._stride - self._padding
            last = first + (stop - start - 1) * self._stride + self._size
            window = read_rows(x[item : item + 1], first, last)
            y = self._conv(window, gelu=inject is None).float()
            if inject is not None:
                y = F.gelu(y + inject[item : item + 1, :, None])
            rows = rows_of(y[0])
            if self._dconv is not None:
                self._dconv.over_rows(rows)
            gate(self._mix(rows), rows_of(out[item])[start:stop])
        return out


class DownOverTime:
    """The same along the waveform: (B C T) -> (B C' T')."""

    def __init__(
        self, conv: nn.Conv1d, dconv: nn.Module | None, rewrite: nn.Conv1d, dtype: torch.dtype
    ) -> None:
        padding = cast(tuple[int], conv.padding)[0]
        stride = (1, conv.stride[0])
        weight = as_image(conv.weight)
        self._conv = Conv(weight, conv.bias, dtype, stride=stride, padding=(0, padding))
        self._dconv = _fast(dconv)
        self._mix = Linear(rewrite.weight.flatten(1), rewrite.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._conv(channels_last(x), gelu=True).float()
        batch, channels, _, steps = y.shape
        out = empty_last((batch, channels, 1, steps))
        for item in range(batch):
            whole, result = rows_of(y[item])[0], rows_of(out[item])[0]  # (T C)
            if self._dconv is not None:
                self._dconv.over_whole(whole)
            for start, stop in tiles(steps, 8 * channels):
                gate(self._mix(whole[start:stop]), result[start:stop])
        return out[:, :, 0]


class UpOverBins:
    """Convolution with its neighbours, gate, branches; in tiles of bins: (B C F T)."""

    def __init__(
        self,
        rewrite: nn.Conv2d,
        dconv: nn.Module | None,
        up: nn.ConvTranspose2d,
        dtype: torch.dtype,
    ) -> None:
        self._beside, across = cast(tuple[int, int], rewrite.padding)
        self._conv = Conv(rewrite.weight, rewrite.bias, dtype, padding=(0, across))
        self._dconv = _fast(dconv)
        self.spread = Spread(up, dtype)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        x, skip = channels_last(x), channels_last(skip)
        batch, channels, bins, steps = x.shape
        out = empty_last((batch, channels, bins, steps))
        for item, start, stop in tiles_of_each(batch, bins, 8 * channels * steps):
            edges = start - self._beside, stop + self._beside
            both = read_rows(x[item : item + 1], *edges) + read_rows(skip[item : item + 1], *edges)
            rows = rows_of(out[item])[start:stop]
            gate(rows_of(self._conv(both)[0]), rows)
            if self._dconv is not None:
                self._dconv.over_rows(rows)
        return out


class UpOverTime:
    """The same along the waveform: (B C T)."""

    def __init__(
        self,
        rewrite: nn.Conv1d,
        dconv: nn.Module | None,
        up: nn.ConvTranspose1d,
        dtype: torch.dtype,
    ) -> None:
        padding = cast(tuple[int], rewrite.padding)[0]
        self._conv = Conv(as_image(rewrite.weight), rewrite.bias, dtype, padding=(0, padding))
        self._dconv = _fast(dconv)
        self.spread = Spread(up, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        wide = self._conv(channels_last(x))
        batch, channels, _, steps = wide.shape
        out = empty_last((batch, channels // 2, 1, steps))
        for item in range(batch):
            both, whole = rows_of(wide[item])[0], rows_of(out[item])[0]  # (T C)
            for start, stop in tiles(steps, 4 * channels):
                gate(both[start:stop], whole[start:stop])
            if self._dconv is not None:
                self._dconv.over_whole(whole)
        return out[:, :, 0]


class Spread:
    """The transposed convolution: from the coarse to the fine side, padding included."""

    def __init__(self, up: nn.Module, dtype: torch.dtype) -> None:
        weight, bias = cast(Tensor, up.weight), cast(Tensor, up.bias)
        self._weight = as_image(weight.detach()).to(dtype, memory_format=torch.channels_last)
        self._bias = bias.detach().to(dtype)
        stride = cast(tuple[int, ...], up.stride)
        self._stride = stride if len(stride) == 2 else (1, *stride)

    def __call__(self, y: Tensor) -> Tensor:
        image = channels_last(y).to(self._weight.dtype)
        z = F.conv_transpose2d(image, self._weight, self._bias, self._stride).float()
        return z if y.dim() == 4 else z[:, :, 0]


class FastEncoder(nn.Module):
    """`EncoderLayer`."""

    def __init__(self, layer: EncoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        parts: Any = (layer.conv, layer.dconv, layer.rewrite, dtype)
        over_bins = layer.config.over_frequency
        self._over_bins = DownOverBins(*parts) if over_bins else None
        self._over_time = None if over_bins else DownOverTime(*parts)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        if self._over_bins is not None:
            return self._over_bins(channels_last(x), inject)
        if x.dim() == 4:
            x = x.flatten(1, 2)
        missing = -x.shape[-1] % self.config.stride
        assert self._over_time is not None
        y = self._over_time(F.pad(x, (0, missing)) if missing else x)
        return y if inject is None else y + inject


class FastDecoder(nn.Module):
    """`DecoderLayer`."""

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        self._layer = layer
        parts: Any = (layer.rewrite, layer.dconv, layer.conv_tr, dtype)
        self._up = (UpOverBins if layer.config.over_frequency else UpOverTime)(*parts)

    def forward(self, x: Tensor, skip: Tensor, length: int) -> tuple[Tensor, Tensor]:
        if isinstance(self._up, UpOverTime):
            y = self._up(x + skip)
        else:
            y = self._up(x.unflatten(1, (-1, skip.shape[2])) if x.dim() == 3 else x, skip)
        z = self._layer.trim(self._up.spread(y), length)
        return (z if self._layer.last else torch.ops.aten.gelu_(z)), y


class FastWaveEncoder(nn.Module):
    """An encoder of the waveform network."""

    def __init__(self, layer: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        conv, rewrite = (module for module in layer if isinstance(module, nn.Conv1d))
        dconv = next((module for module in layer if isinstance(module, DConv)), None)
        self._down = DownOverTime(conv, dconv, rewrite, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(x)


class FastWaveDecoder(nn.Module):
    """A decoder of the waveform network."""

    def __init__(self, layer: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        rewrite = next(module for module in layer if isinstance(module, nn.Conv1d))
        up = next(module for module in layer if isinstance(module, nn.ConvTranspose1d))
        dconv = next((module for module in layer if isinstance(module, DConv)), None)
        self._last = layer[-1] is up
        self._up = UpOverTime(rewrite, dconv, up, dtype)

    def forward(self, x: Tensor) -> Tensor:
        z = self._up.spread(self._up(x))
        return z if self._last else torch.ops.aten.gelu_(z)


class FastPointwise(nn.Module):
    """A 1x1 convolution: (B C N) -> (B O N)."""

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self._linear = Linear(conv.weight[:, :, 0], conv.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.transpose(1, 2).contiguous()).float().transpose(1, 2)
