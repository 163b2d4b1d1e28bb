"""The layers of the ladders, channels last and in tiles that stay in the cache.

Each stands in for the layer of the same name elsewhere, takes its weights, and accepts and answers
tensors of the same logical shape; only their order in memory differs.

Shapes: B batch, C channels, F bins, T steps of time.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import DConv, DecoderLayer, EncoderLayer
from demucs_infer.optimized import winograd as pairs
from demucs_infer.optimized.dconv import FastDConv, plain
from demucs_infer.optimized.kernels import Conv, Linear, SplitGate
from demucs_infer.optimized.layout import (
    as_image,
    channels_last,
    empty_last,
    read_rows,
    rows_of,
    tiles,
    tiles_of_each,
)
from demucs_infer.optimized.winograd import WinogradConv


def supports(layer: EncoderLayer | DecoderLayer) -> bool:
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


def gate(values: Tensor, gates: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
    """The gated linear unit, plus an offset, straight to where it belongs."""
    values, gates = values.to(out.dtype), gates.to(out.dtype).sigmoid_()
    if offset is None:
        torch.mul(values, gates, out=out)
    else:
        torch.addcmul(offset, values, gates, out=out)


def _fast(dconv: nn.Module | None) -> FastDConv | None:
    return None if dconv is None else FastDConv(cast(DConv, dconv))


class DownOverBins:
    """Strided convolution, branches, gate; in tiles of bins: (B C F T) -> (B C' F' T)."""

    offset: Tensor | None = None
    """What is added in the end, whatever the input: (F' C')."""

    def __init__(
        self, conv: nn.Conv2d, dconv: nn.Module | None, rewrite: nn.Conv2d, dtype: torch.dtype
    ) -> None:
        self._channels = conv.out_channels
        self._size, self._stride = conv.kernel_size[0], conv.stride[0]
        self._padding = cast(tuple[int, int], conv.padding)[0]
        self._conv = Conv(conv.weight, conv.bias, dtype, stride=(self._stride, 1))
        self._dconv = _fast(dconv)
        self._mix = SplitGate(Linear, rewrite.weight.flatten(1), rewrite.bias, dtype)

    def __call__(self, x: Tensor, inject: Tensor | None) -> Tensor:
        batch, _, bins, steps = x.shape
        bins = (bins + 2 * self._padding - self._size) // self._stride + 1
        if self.offset is not None and len(self.offset) < bins:
            raise ValueError(f"{bins} bins, and embeddings for {len(self.offset)}")
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
                self._dconv.add_to(rows)
            offset = None if self.offset is None else self.offset[start:stop, None]
            gate(*self._mix(rows), rows_of(out[item])[start:stop], offset)
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
        self._mix = SplitGate(Linear, rewrite.weight.flatten(1), rewrite.bias, dtype)

    def __call__(self, x: Tensor, missing: int = 0) -> Tensor:
        """`missing` steps at the end are silence."""
        x = channels_last(x).to(self._conv.dtype)
        y = self._conv(F.pad(x, (0, missing)) if missing else x, gelu=True).float()
        batch, channels, _, steps = y.shape
        out = empty_last((batch, channels, 1, steps))
        for item in range(batch):
            whole, result = rows_of(y[item])[0], rows_of(out[item])[0]  # (T C)
            if self._dconv is not None:
                self._dconv.add_to(whole[None])
            for start, stop in tiles(steps, 8 * channels):
                gate(*self._mix(whole[start:stop]), result[start:stop])
        return out[:, :, 0]


class UpOverBins:
    """Convolution with its neighbours, gate, branches, spread; in tiles of bins: (B C F T)."""

    def __init__(
        self,
        rewrite: nn.Conv2d,
        dconv: nn.Module | None,
        up: nn.ConvTranspose2d,
        dtype: torch.dtype,
        *,
        last: bool,
    ) -> None:
        self._beside, across = cast(tuple[int, int], rewrite.padding)
        weight, bias = rewrite.weight, rewrite.bias
        self._mix = (
            WinogradConv(weight, bias, dtype, across)
            if pairs.supports(weight, dtype)
            else SplitGate(Conv, weight, bias, dtype, padding=(0, across))
        )
        self._dconv = _fast(dconv)
        self._spread = TransposedConv(up, dtype, last=last)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        x, skip = channels_last(x), channels_last(skip)
        batch, channels, bins, steps = x.shape
        reach, stride = self._spread.reach, self._spread.stride
        size = (batch, self._spread.channels, (bins + reach) * stride, steps)
        z = empty_last(size)
        before = silence = torch.zeros(reach, steps, channels)
        for item, start, stop in tiles_of_each(batch, bins, 8 * channels * steps):
            # What lies beside a tile reaches into it: rows that were made before, or silence.
            before = before if start else silence
            after = silence[: reach if stop == bins else 0]
            block = torch.empty(reach + stop - start + len(after), steps, channels)
            block[:reach], block[reach + stop - start :] = before, after
            self._fill(block[reach : reach + stop - start], x[item], skip[item], start)
            before = block[stop - start :][:reach]
            target = rows_of(z[item])[start * stride : (start + len(block) - reach) * stride]
            self._spread.over_rows(block, target)
        return z[:, :, : self._spread.length(bins)]

    def _fill(self, rows: Tensor, x: Tensor, skip: Tensor, start: int) -> None:
        """What is to be spread, from bin `start` on."""
        stop = start + len(rows) + -len(rows) % self._mix.together
        edges = start - self._beside, stop + self._beside
        halves = self._mix(read_rows(x[None], *edges) + read_rows(skip[None], *edges))
        values, gates = (rows_of(half[0])[: len(rows)] for half in halves)
        gate(values, gates, rows)
        if self._dconv is not None:
            self._dconv.add_to(rows)


class UpOverTime:
    """The same along the waveform: (B C T)."""

    def __init__(
        self,
        rewrite: nn.Conv1d,
        dconv: nn.Module | None,
        up: nn.ConvTranspose1d,
        dtype: torch.dtype,
        *,
        last: bool,
    ) -> None:
        padding = cast(tuple[int], rewrite.padding)[0]
        weight = as_image(rewrite.weight)
        self._mix = SplitGate(Conv, weight, rewrite.bias, dtype, padding=(0, padding))
        self._dconv = _fast(dconv)
        self._spread = TransposedConv(up, dtype, last=last)

    def __call__(self, x: Tensor) -> Tensor:
        return self._spread.over_time(self._coarse(x))

    def _coarse(self, x: Tensor) -> Tensor:
        """What is to be spread; here, so that what it is made of is gone by then: (B C 1 T)."""
        halves = self._mix(channels_last(x))
        batch, channels, _, steps = halves[0].shape
        out = empty_last((batch, channels, 1, steps))
        for item in range(batch):
            values, gates = (rows_of(half[item])[0] for half in halves)  # (T C)
            whole = rows_of(out[item])[0]
            for start, stop in tiles(steps, 8 * channels):
                gate(values[start:stop], gates[start:stop], whole[start:stop])
            if self._dconv is not None:
                self._dconv.add_to(whole[None])
        return out


class TransposedConv:
    """A transposed convolution as a plain one, and the GELU after it unless it is the `last`.

    `stride` fine steps that begin at the same coarse step hear that one and `reach` before it.
    """

    def __init__(self, up: nn.Module, dtype: torch.dtype, *, last: bool) -> None:
        weight, bias = cast(Tensor, up.weight).detach(), cast(Tensor, up.bias).detach()
        self.stride, self.channels = cast(tuple[int, ...], up.stride)[0], weight.shape[1]
        over_bins, weight = weight.dim() == 4, weight.flatten(2)
        self.reach = -(-weight.shape[2] // self.stride) - 1
        self._surplus = (self.reach + 1) * self.stride - weight.shape[2]
        taps = F.pad(weight, (0, self._surplus)).unflatten(2, (-1, self.stride)).flip(2)
        plain = taps.permute(3, 1, 0, 2).flatten(0, 1)  # (stride*C' C reach+1)
        plain = plain[..., None] if over_bins else as_image(plain)
        padding = (0, 0 if over_bins else self.reach)
        self._conv = Conv(plain, bias.repeat(self.stride), dtype, padding=padding)
        self._last = last

    def length(self, coarse: int) -> int:
        """Fine steps that as many coarse ones reach."""
        return (coarse + self.reach) * self.stride - self._surplus

    def over_rows(self, block: Tensor, out: Tensor) -> None:
        """Rows (reach+R T C), the first of which are only heard, into (R*stride T C')."""
        fine = rows_of(self._conv(block.permute(2, 0, 1)[None])[0])
        fine = fine.unflatten(2, (self.stride, -1)).transpose(1, 2)
        out.unflatten(0, (-1, self.stride)).copy_(fine)
        if not self._last:
            torch.ops.aten.gelu_(out)

    def over_time(self, y: Tensor) -> Tensor:
        """(B C 1 T) -> (B C' T')."""
        fine = self._conv(y).float().permute(0, 2, 3, 1).reshape(len(y), -1, self.channels)
        fine = fine[:, : self.length(y.shape[3])]
        return (fine if self._last else torch.ops.aten.gelu_(fine)).transpose(1, 2)


class FastEncoder(nn.Module):
    """`EncoderLayer`."""

    def __init__(self, layer: EncoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        parts: Any = (layer.conv, layer.dconv, layer.rewrite, dtype)
        over_bins = layer.config.over_frequency
        self.over_bins = DownOverBins(*parts) if over_bins else None
        self._over_time = None if over_bins else DownOverTime(*parts)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        if self.over_bins is not None:
            return self.over_bins(channels_last(x), inject)
        if x.dim() == 4:
            x = x.flatten(1, 2)
        assert self._over_time is not None
        y = self._over_time(x, -x.shape[-1] % self.config.stride)
        return y if inject is None else y + inject


class FastDecoder(nn.Module):
    """`DecoderLayer`; what lies before the transposed convolution is not kept.

    Only levels that merge are asked for that, and they have no fast form.
    """

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        self._layer = layer
        parts: Any = (layer.rewrite, layer.dconv, layer.conv_tr, dtype)
        over_bins = layer.config.over_frequency
        self._over_bins = UpOverBins(*parts, last=layer.last) if over_bins else None
        self._over_time = None if over_bins else UpOverTime(*parts, last=layer.last)

    def forward(self, x: Tensor, skip: Tensor, length: int) -> tuple[Tensor, Tensor]:
        if self._over_time is not None:
            z = self._over_time(x + skip)
        else:
            assert self._over_bins is not None
            z = self._over_bins(x.unflatten(1, (-1, skip.shape[2])) if x.dim() == 3 else x, skip)
        return self._layer.trim(z, length), x.new_empty(0)


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
        self._up = UpOverTime(rewrite, dconv, up, dtype, last=layer[-1] is up)

    def forward(self, x: Tensor) -> Tensor:
        return self._up(x)


class FastPointwise(nn.Module):
    """A 1x1 convolution: (B C N) -> (B O N)."""

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self._linear = Linear(conv.weight[:, :, 0], conv.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.transpose(1, 2).contiguous()).float().transpose(1, 2)
