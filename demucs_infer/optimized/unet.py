"""Run the layers of the U-Nets in channels-last memory, in tiles that fit in the cache.

A class `FastX` replaces the layer X with the same weights. Its inputs and outputs have the same
shapes, but another order in memory.

Shapes: B batch, C channels, F bins, T steps of time.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import DConv, DecoderLayer, EncoderLayer
from demucs_infer.optimized import winograd
from demucs_infer.optimized.dconv import FastDConv
from demucs_infer.optimized.dconv import supports as dconv_supports
from demucs_infer.optimized.kernels import Conv, Linear, SplitGate
from demucs_infer.optimized.layout import (
    as_image,
    channels_last,
    empty_channels_last,
    slice_bins,
    slice_steps,
    tiles,
    tiles_of_each,
    view_as_rows,
)
from demucs_infer.optimized.winograd import TwoTaps, WinogradConv, WinogradSequence
from demucs_infer.system.arena import empty


def supports(layer: EncoderLayer | DecoderLayer) -> bool:
    """Tell whether a layer of a hybrid network can be optimized."""
    config = layer.config
    return (
        not layer.empty
        and config.norm_groups is None
        and layer.rewrite is not None
        and config.context_encoder == 0
        and config.padded
        and dconv_supports(layer.dconv)
    )


def supports_waveform(layer: nn.Sequential) -> bool:
    """Tell whether a layer of `Demucs` can be optimized: it must have a GLU and no norms."""
    kinds = {type(module) for module in layer}
    dconv = next((module for module in layer if isinstance(module, DConv)), None)
    return (
        nn.GroupNorm not in kinds
        and nn.ReLU not in kinds
        and nn.GLU in kinds
        and dconv_supports(dconv)
    )


def gate(values: Tensor, gates: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
    """Write `values` times the sigmoid of `gates`, plus `offset`, to `out`."""
    values, gates = values.to(out.dtype), gates.to(out.dtype).sigmoid_()
    if offset is None:
        torch.mul(values, gates, out=out)
    else:
        torch.addcmul(offset, values, gates, out=out)


def _optimize_dconv(dconv: nn.Module | None) -> FastDConv | None:
    return None if dconv is None else FastDConv(cast(DConv, dconv))


class FrequencyEncoder:
    """Encode a stage of the spectrogram in tiles of bins: (B, C, F, T) -> (B, C', F', T).

    A strided convolution, residual branches, and a 1x1 convolution with a gate.
    """

    offset: Tensor | None = None
    """A constant that is added to the output, such as the frequency embedding: (F', C')."""

    def __init__(
        self, conv: nn.Conv2d, dconv: nn.Module | None, rewrite: nn.Conv2d, dtype: torch.dtype
    ) -> None:
        self._channels = conv.out_channels
        self._size, self._stride = conv.kernel_size[0], conv.stride[0]
        self._padding = cast(tuple[int, int], conv.padding)[0]
        self._conv = Conv(conv.weight, conv.bias, dtype, stride=(self._stride, 1))
        self._dconv = _optimize_dconv(dconv)
        self._rewrite = SplitGate(Linear, rewrite.weight.flatten(1), rewrite.bias, dtype)

    def __call__(self, x: Tensor, inject: Tensor | None) -> Tensor:
        """Encode `x`, adding `inject` (B, C', T) before the activation."""
        batch, _, bins, steps = x.shape
        bins = (bins + 2 * self._padding - self._size) // self._stride + 1
        if self.offset is not None and len(self.offset) < bins:
            raise ValueError(
                f"the spectrogram has {bins} bins after the first stage, but the network has "
                f"frequency embeddings for {len(self.offset)}."
            )
        out = empty_channels_last((batch, self._channels, bins, steps))
        for item, start, stop in tiles_of_each(batch, bins, 8 * self._channels * steps):
            first = start * self._stride - self._padding
            last = first + (stop - start - 1) * self._stride + self._size
            window = slice_bins(x[item : item + 1], first, last)
            y = self._conv(window, gelu=inject is None).float()
            if inject is not None:
                y = F.gelu(y + inject[item : item + 1, :, None])
            rows = view_as_rows(y[0])
            if self._dconv is not None:
                self._dconv.add_to(rows)
            offset = None if self.offset is None else self.offset[start:stop, None]
            gate(*self._rewrite(rows), view_as_rows(out[item])[start:stop], offset)
        return out


class TimeEncoder:
    """Encode a stage of the waveform: (B, C, T) -> (B, C', T').

    A strided convolution, residual branches, and a 1x1 convolution with a gate.
    """

    def __init__(
        self, conv: nn.Conv1d, dconv: nn.Module | None, rewrite: nn.Conv1d, dtype: torch.dtype
    ) -> None:
        self._channels = conv.out_channels
        self._size, self._stride = conv.kernel_size[0], conv.stride[0]
        self._padding = cast(tuple[int], conv.padding)[0]
        self._conv = Conv(as_image(conv.weight), conv.bias, dtype, stride=(1, self._stride))
        self._dconv = _optimize_dconv(dconv)
        self._rewrite = SplitGate(Linear, rewrite.weight.flatten(1), rewrite.bias, dtype)

    def __call__(self, x: Tensor, missing: int = 0) -> Tensor:
        """Encode `x`, padded with `missing` silent steps at the end."""
        x = channels_last(x)
        batch, _, _, steps = x.shape
        steps = (steps + missing + 2 * self._padding - self._size) // self._stride + 1
        y = empty_channels_last((batch, self._channels, 1, steps))
        for item, start, stop in tiles_of_each(batch, steps, 8 * self._channels):
            first = start * self._stride - self._padding
            last = first + (stop - start - 1) * self._stride + self._size
            window = slice_steps(x[item : item + 1], first, last)
            y[item : item + 1, ..., start:stop] = self._conv(window, gelu=True)
        for item in range(batch):
            sequence = view_as_rows(y[item])[0]  # (T, C)
            if self._dconv is not None:
                self._dconv.add_to(sequence[None])
            for start, stop in tiles(steps, 8 * self._channels):
                gate(*self._rewrite(sequence[start:stop]), sequence[start:stop])
        return y[:, :, 0]


class FrequencyDecoder:
    """Decode a stage of the spectrogram in tiles of bins: (B, C, F, T) -> (B, C', F', T).

    A convolution with a gate, residual branches, and a transposed convolution.
    """

    def __init__(
        self,
        rewrite: nn.Conv2d,
        dconv: nn.Module | None,
        up: nn.ConvTranspose2d,
        dtype: torch.dtype,
        *,
        last: bool,
    ) -> None:
        self._bin_padding, time_padding = cast(tuple[int, int], rewrite.padding)
        weight, bias = rewrite.weight, rewrite.bias
        self._rewrite = (
            WinogradConv(weight, bias, dtype)
            if winograd.supports(weight, dtype)
            else SplitGate(Conv, weight, bias, dtype, padding=(0, time_padding))
        )
        self._dconv = _optimize_dconv(dconv)
        self._upsample = TransposedConv(up, dtype, last=last)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        """Decode the sum of `x` and `skip`."""
        x, skip = channels_last(x), channels_last(skip)
        batch, channels, bins, steps = x.shape
        lookback, stride = self._upsample.lookback, self._upsample.stride
        size = (batch, self._upsample.channels, (bins + lookback) * stride, steps)
        z = empty_channels_last(size)
        previous_rows = silent_rows = torch.zeros(lookback, steps, channels)
        for item, start, stop in tiles_of_each(batch, bins, 8 * channels * steps):
            # A tile also needs the last rows of the tile before it, or silence at the edges.
            previous_rows = previous_rows if start else silent_rows
            trailing_rows = silent_rows[: lookback if stop == bins else 0]
            block = empty(lookback + stop - start + len(trailing_rows), steps, channels)
            block[:lookback], block[lookback + stop - start :] = previous_rows, trailing_rows
            self._merge_skip(block[lookback : lookback + stop - start], x[item], skip[item], start)
            previous_rows = block[stop - start :][:lookback]
            target = view_as_rows(z[item])[
                start * stride : (start + len(block) - lookback) * stride
            ]
            self._upsample.upsample_rows(block, target)
        return z[:, :, : self._upsample.length(bins)]

    def _merge_skip(self, rows: Tensor, x: Tensor, skip: Tensor, start: int) -> None:
        """Write the input of the transposed convolution from bin `start` on to `rows`."""
        stop = start + len(rows) + -len(rows) % self._rewrite.results_at_a_time
        edges = start - self._bin_padding, stop + self._bin_padding
        gate_halves = self._rewrite(slice_bins(x[None], *edges) + slice_bins(skip[None], *edges))
        values, gates = (view_as_rows(half[0])[: len(rows)] for half in gate_halves)
        gate(values, gates, rows)
        if self._dconv is not None:
            self._dconv.add_to(rows)


class TimeDecoder:
    """Decode a stage of the waveform: (B, C, T) -> (B, C', T').

    A convolution with a gate, residual branches, and a transposed convolution.
    """

    def __init__(
        self,
        rewrite: nn.Conv1d,
        dconv: nn.Module | None,
        up: nn.ConvTranspose1d,
        dtype: torch.dtype,
        *,
        last: bool,
    ) -> None:
        self._padding = cast(tuple[int], rewrite.padding)[0]
        weight, bias = rewrite.weight, rewrite.bias
        self._rewrite = (
            WinogradSequence(weight, bias, dtype)
            if weight.shape[2] == 3 and winograd.has_enough_channels(weight.shape[1], dtype)
            else SplitGate(Conv, as_image(weight), bias, dtype)
        )
        self._dconv = _optimize_dconv(dconv)
        self._upsample = TransposedConv(up, dtype, last=last)

    def __call__(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Decode the sum of `x` and `skip`."""
        x = channels_last(x)
        skip = None if skip is None else channels_last(skip)
        batch, channels, _, steps = x.shape
        y = empty_channels_last((batch, channels, 1, steps))
        for item in range(batch):
            sequence = view_as_rows(y[item])[0]  # (T, C)
            for start, stop in tiles(steps, 8 * channels):
                excess = -(stop - start) % self._rewrite.results_at_a_time
                edges = start - self._padding, stop + excess + self._padding
                window = slice_steps(x[item : item + 1], *edges)
                if skip is not None:
                    window = window + slice_steps(skip[item : item + 1], *edges)
                halves = self._rewrite(window)
                values, gates = (view_as_rows(half[0])[0, : stop - start] for half in halves)
                gate(values, gates, sequence[start:stop])
            if self._dconv is not None:
                self._dconv.add_to(sequence[None])
        return self._upsample.upsample_time(y)


class TransposedConv:
    """A transposed convolution, computed as an ordinary one, with a GELU unless it is the `last`.

    Each `stride` output steps depend on one input step and the `lookback` steps before it.
    """

    def __init__(self, up: nn.Module, dtype: torch.dtype, *, last: bool) -> None:
        weight, bias = cast(Tensor, up.weight).detach(), cast(Tensor, up.bias).detach()
        channels = len(weight)
        self.stride, self.channels = cast(tuple[int, ...], up.stride)[0], weight.shape[1]
        over_bins, weight = weight.dim() == 4, weight.flatten(2)
        self.lookback = -(-weight.shape[2] // self.stride) - 1
        self._excess = (self.lookback + 1) * self.stride - weight.shape[2]
        taps = F.pad(weight, (0, self._excess)).unflatten(2, (-1, self.stride)).flip(2)
        kernel = taps.permute(3, 1, 0, 2).flatten(0, 1)  # (stride*C', C, lookback+1)
        bias = bias.repeat(self.stride)
        self._conv: Conv | TwoTaps
        if self.lookback == 1 and winograd.has_enough_channels(channels, dtype):
            self._conv = TwoTaps(kernel[..., 0], kernel[..., 1], bias, dtype)
        else:
            self._conv = Conv(kernel[..., None] if over_bins else as_image(kernel), bias, dtype)
        self._last = last

    def length(self, input_steps: int) -> int:
        """Return the number of output steps."""
        return (input_steps + self.lookback) * self.stride - self._excess

    def upsample_rows(self, block: Tensor, out: Tensor) -> None:
        """Upsample R rows, after `lookback` of context: (lookback+R, T, C) -> (R*stride, T, C')."""
        target = out.unflatten(0, (-1, self.stride)).transpose(1, 2)  # (R, T, stride, C')
        if isinstance(self._conv, TwoTaps):
            self._conv.write(block, target)
        else:
            output = view_as_rows(self._conv(block.permute(2, 0, 1)[None])[0])
            target.copy_(output.unflatten(2, (self.stride, -1)))
        if not self._last:
            torch.ops.aten.gelu_(out)

    def upsample_time(self, y: Tensor) -> Tensor:
        """Upsample steps of time: (B, C, 1, T) -> (B, C', T')."""
        batch, channels, _, steps = y.shape
        size = (batch, self.channels, 1, (steps + self.lookback) * self.stride)
        out = empty_channels_last(size)
        for item, start, stop in tiles_of_each(batch, steps + self.lookback, 8 * channels):
            window = slice_steps(y[item : item + 1], start - self.lookback, stop)
            target = view_as_rows(out[item])[0, start * self.stride : stop * self.stride]
            wide = target.view(stop - start, -1)  # (T, stride*C')
            if isinstance(self._conv, TwoTaps):
                self._conv.write(view_as_rows(window[0])[0], wide)
            else:
                wide.copy_(view_as_rows(self._conv(window)[0])[0])
            if not self._last:
                torch.ops.aten.gelu_(target)
        return out[:, :, 0, : self.length(steps)]


class FastEncoder(nn.Module):
    """Optimized `EncoderLayer` of a hybrid network."""

    def __init__(self, layer: EncoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        parts: Any = (layer.conv, layer.dconv, layer.rewrite, dtype)
        over_frequency = layer.config.over_frequency
        self.frequency = FrequencyEncoder(*parts) if over_frequency else None
        self._time = None if over_frequency else TimeEncoder(*parts)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Encode like the layer it replaces."""
        if self.frequency is not None:
            return self.frequency(channels_last(x), inject)
        if x.dim() == 4:
            x = x.flatten(1, 2)
        assert self._time is not None
        y = self._time(x, -x.shape[-1] % self.config.stride)
        return y if inject is None else y + inject


class FastDecoder(nn.Module):
    """Optimized `DecoderLayer` of a hybrid network, with an empty tensor as second result.

    The original returns the input of its upsampling, which is used only where the time branch
    begins; `supports` excludes those layers.
    """

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        self._layer = layer
        parts: Any = (layer.rewrite, layer.dconv, layer.conv_tr, dtype)
        over_frequency = layer.config.over_frequency
        self._frequency = FrequencyDecoder(*parts, last=layer.last) if over_frequency else None
        self._time = None if over_frequency else TimeDecoder(*parts, last=layer.last)

    def forward(self, x: Tensor, skip: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Decode like the layer it replaces."""
        if self._time is not None:
            z = self._time(x, skip)
        else:
            assert self._frequency is not None
            z = self._frequency(x.unflatten(1, (-1, skip.shape[2])) if x.dim() == 3 else x, skip)
        return self._layer.crop(z, length), x.new_empty(0)


class FastWaveEncoder(nn.Module):
    """Optimized encoder layer of `Demucs`."""

    def __init__(self, layer: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        conv, rewrite = (module for module in layer if isinstance(module, nn.Conv1d))
        dconv = next((module for module in layer if isinstance(module, DConv)), None)
        self._down = TimeEncoder(conv, dconv, rewrite, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, C, T)."""
        return self._down(x)


class FastWaveDecoder(nn.Module):
    """Optimized decoder layer of `Demucs`."""

    def __init__(self, layer: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        rewrite = next(module for module in layer if isinstance(module, nn.Conv1d))
        up = next(module for module in layer if isinstance(module, nn.ConvTranspose1d))
        dconv = next((module for module in layer if isinstance(module, DConv)), None)
        self._up = TimeDecoder(rewrite, dconv, up, dtype, last=layer[-1] is up)

    def forward(self, x: Tensor) -> Tensor:
        """Decode (B, C, T)."""
        return self._up(x)


class FastPointwise(nn.Module):
    """Optimized 1x1 convolution: (B, C, N) -> (B, O, N)."""

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self._linear = Linear(conv.weight[:, :, 0], conv.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        return self._linear(x.transpose(1, 2).contiguous()).float().transpose(1, 2)
