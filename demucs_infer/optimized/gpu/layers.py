"""Run the layers of the U-Nets with channels last in memory, so that no step rearranges data.

A class `GpuX` replaces the layer X, with the same weights and shapes. In memory, each bin is a
matrix (steps, channels): convolutions read it as a row of an image, products as a matrix, and the
norms of the residual branches as consecutive numbers.

Shapes: B batch, C channels, F bins, T steps of time; R = B*F rows.
"""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import DConv, DecoderLayer, EncoderLayer
from demucs_infer.optimized.gpu import fused
from demucs_infer.optimized.gpu.arithmetic import Arithmetic, Pair, Precision
from demucs_infer.optimized.layout import as_image, channels_last

_ALIGNMENT = 8
"""Half-precision products are only fast with a multiple of this many channels."""


def view_as_matrix(x: Tensor) -> Tensor:
    """View channels-last (B, C, F, T) in the order of its memory: (B*F, T, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 1)


def view_as_planes(rows: Tensor, batch: int) -> Tensor:
    """View (B*F, T, C) as channels-last (B, C, F, T)."""
    planes: Tensor = rows.unflatten(0, (batch, -1))
    return planes.permute(0, 3, 1, 2)


class Convolution:
    """A convolution without its bias, which the next step adds."""

    def __init__(
        self,
        conv: nn.Module,
        arithmetic: Arithmetic,
        *,
        padding: Pair,
        stride: Pair = (1, 1),
        dilation: Pair = (1, 1),
    ) -> None:
        weight, bias = cast(Tensor, conv.weight).detach(), cast("Tensor | None", conv.bias)
        self.arithmetic = arithmetic
        self._is_transposed = isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d)
        axis = 0 if self._is_transposed else 1
        self.weight = channels_last(arithmetic.read_weight(as_image(weight), axis))
        self.bias = weight.new_zeros(_count_outputs(conv)) if bias is None else bias.detach()
        self.bias = self.bias.float()
        self._geometry = stride, padding, dilation

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve (B, C, F, T)."""
        stride, padding, dilation = self._geometry
        x = channels_last(x)
        if self._is_transposed:
            y = self.arithmetic.convolve_transposed(x, self.weight, stride=stride, padding=padding)
        else:
            y = self.arithmetic.convolve(
                x, self.weight, stride=stride, padding=padding, dilation=dilation
            )
        return channels_last(y)


def _count_outputs(conv: nn.Module) -> int:
    return cast(int, conv.out_channels)


class GpuBranch:
    """One residual branch: convolution, norm, GELU, 1x1 convolution, norm, GLU and layer scale."""

    def __init__(self, layer: nn.Sequential, arithmetic: Arithmetic) -> None:
        conv, norm, _, mix, mix_norm, _, scale = cast(Any, tuple(layer))
        (dilation,) = conv.dilation
        self._arithmetic = arithmetic
        self._hidden = conv.out_channels
        missing = -self._hidden % _ALIGNMENT
        self._conv = Convolution(conv, arithmetic, padding=(0, dilation), dilation=(1, dilation))
        self._conv.weight = channels_last(F.pad(self._conv.weight, (0,) * 7 + (missing,)))
        self._conv.bias = F.pad(self._conv.bias, (0, missing))
        gain, shift = (F.pad(x.detach().float(), (0, missing)) for x in (norm.weight, norm.bias))
        self._norm = gain, shift, norm.eps
        weight = F.pad(mix.weight.detach()[:, :, 0], (0, missing))
        self._mix = arithmetic.read_linear(weight, mix.bias)
        self._mix_norm = mix_norm.weight.detach().float(), mix_norm.bias.detach().float()
        self._mix_epsilon = mix_norm.eps
        self._scale = scale.scale.detach().float()

    def apply(self, y: Tensor, stream: Arithmetic) -> Tensor:
        """Return `y` (B, C, F, T) plus the output of the branch, in the precision of `stream`."""
        hidden = fused.normalize_and_gelu(
            view_as_matrix(self._conv(y)),
            self._conv.bias,
            *self._norm,
            self._arithmetic,
            self._hidden,
        )
        wide = self._arithmetic.multiply(hidden, *self._mix)
        rows = fused.normalize_and_gate(
            wide,
            *self._mix_norm,
            self._mix_epsilon,
            self._scale,
            view_as_matrix(y),
            stream,
        )
        return view_as_planes(rows, len(y))


class GpuDConv:
    """Optimized `DConv`: the residual branches of a stage."""

    def __init__(self, dconv: nn.Module | None, arithmetic: Arithmetic) -> None:
        layers: Any = [] if dconv is None else cast(DConv, dconv).layers
        self._branches = [GpuBranch(cast(nn.Sequential, layer), arithmetic) for layer in layers]

    def apply(self, y: Tensor, stream: Arithmetic) -> Tensor:
        """Add the output of every branch in turn to `y` (B, C, F, T), and return the sum."""
        for branch in self._branches:
            y = branch.apply(y, stream)
        return y


class GpuDown:
    """Encode a stage: strided convolution, GELU, residual branches, 1x1 convolution and gate."""

    offset: Tensor | None = None
    """A constant that is added to the output, such as the frequency embedding: (F', C')."""

    def __init__(
        self,
        conv: nn.Module,
        dconv: nn.Module | None,
        rewrite: nn.Module,
        precision: Precision,
        *,
        outer: bool,
    ) -> None:
        stride, padding = _read_pair(conv.stride), _read_pair(conv.padding)
        if isinstance(conv, nn.Conv2d):
            self._arithmetic = precision.choose("outer encoder" if outer else "encoder")
            branches = precision.choose("branches")
        else:
            stride, padding = (1, stride[-1]), (0, padding[-1])
            self._arithmetic = precision.choose("wave encoder")
            branches = precision.choose("wave branches")
        self._conv = Convolution(conv, self._arithmetic, stride=stride, padding=padding)
        self._dconv = GpuDConv(dconv, branches)
        weight, bias = cast(Tensor, rewrite.weight), cast(Tensor, rewrite.bias)
        self._rewrite = self._arithmetic.read_weight(weight.flatten(1), 1)
        self._rewrite_bias = bias.detach().float()

    def apply(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Encode (B, C, F, T); `inject` (B, C', F', T') is added before the activation."""
        y = self._conv(x)
        rows = fused.add_bias_and_gelu(
            view_as_matrix(y),
            self._conv.bias,
            self._arithmetic,
            inject=None if inject is None else view_as_matrix(inject.expand_as(y)),
        )
        y = self._dconv.apply(view_as_planes(rows, len(x)), self._arithmetic)
        wide = self._arithmetic.multiply(view_as_matrix(y), self._rewrite)
        offset = None if self.offset is None else self.offset[: y.shape[2], None]
        gated = fused.gate(
            wide.unflatten(0, (len(x), -1)), self._rewrite_bias, self._arithmetic, offset
        ).flatten(0, 1)
        return view_as_planes(gated, len(x))


def _read_pair(value: object) -> Pair:
    values = cast("tuple[int, ...]", value)
    return values[0], values[-1]


class GpuUp:
    """Decode a stage: convolution, gate, residual branches and transposed convolution."""

    def __init__(
        self,
        rewrite: nn.Module,
        dconv: nn.Module | None,
        up: nn.Module,
        precision: Precision,
        *,
        crop: int,
        last: bool,
    ) -> None:
        """Build the layer; `crop` is removed from both sides of the axis that is upsampled."""
        padding, stride = _read_pair(rewrite.padding), _read_pair(up.stride)
        if isinstance(up, nn.ConvTranspose2d):
            cropped = (crop, 0)
            self._arithmetic = precision.choose("outer decoder" if last else "decoder")
            branches = precision.choose("branches")
        else:
            padding, stride, cropped = (0, padding[-1]), (1, stride[-1]), (0, crop)
            self._arithmetic = precision.choose("wave decoder")
            branches = precision.choose("wave branches")
        self._rewrite = Convolution(rewrite, self._arithmetic, padding=padding)
        self._dconv = GpuDConv(dconv, branches)
        self._up = Convolution(up, self._arithmetic, stride=stride, padding=cropped)
        self._last = last

    def apply(self, x: Tensor) -> Tensor:
        """Decode (B, C, F, T)."""
        batch = len(x)
        wide = view_as_matrix(self._rewrite(x))
        y = view_as_planes(fused.gate(wide, self._rewrite.bias, self._arithmetic), batch)
        z = self._up(self._dconv.apply(y, self._arithmetic))
        out = Arithmetic("float32") if self._last else self._arithmetic
        rows = fused.add_bias_and_gelu(view_as_matrix(z), self._up.bias, out, gelu=not self._last)
        return view_as_planes(rows, batch)


class GpuEncoder(nn.Module):
    """Optimized `EncoderLayer` of a hybrid network."""

    def __init__(self, layer: EncoderLayer, precision: Precision, *, outer: bool) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        parts: Any = (layer.conv, layer.dconv, layer.rewrite, precision)
        self.down = GpuDown(*parts, outer=outer)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Encode like the layer it replaces."""
        if self.config.over_frequency:
            return self.down.apply(x, None if inject is None else inject[:, :, None])
        if x.dim() == 4:
            x = x.flatten(1, 2)
        missing = -x.shape[-1] % self.config.stride
        x = F.pad(x, (0, missing)) if missing else x
        return self.down.apply(x[:, :, None], None if inject is None else inject[:, :, None])[
            :, :, 0
        ]


class GpuDecoder(nn.Module):
    """A `DecoderLayer` of a hybrid, which does not return the input of its upsampling."""

    def __init__(self, layer: DecoderLayer, precision: Precision) -> None:
        super().__init__()
        self.config = layer.config
        self.empty = False
        parts: Any = (layer.rewrite, layer.dconv, layer.conv_tr, precision)
        self._up = GpuUp(*parts, crop=layer.config.padding, last=layer.last)
        self._channels_in = layer.channels_in

    def forward(self, x: Tensor, skip: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Decode like the layer it replaces."""
        if self.config.over_frequency and x.dim() == 3:
            x = x.unflatten(1, (self._channels_in, -1))
        y = x + skip  # rounded once: PyTorch adds half precision in float32
        if self.config.over_frequency:
            return self._up.apply(y), x.new_empty(0)
        return self._up.apply(y[:, :, None])[:, :, 0, :length], x.new_empty(0)


class GpuWaveEncoder(nn.Module):
    """Optimized encoder layer of `Demucs`."""

    def __init__(self, layer: nn.Sequential, precision: Precision, *, outer: bool) -> None:
        super().__init__()
        conv, rewrite = (module for module in layer if isinstance(module, nn.Conv1d))
        dconv = next((module for module in layer if isinstance(module, DConv)), None)
        self._down = GpuDown(conv, dconv, rewrite, precision, outer=outer)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, C, T)."""
        return self._down.apply(x[:, :, None])[:, :, 0]


class GpuWaveDecoder(nn.Module):
    """Optimized decoder layer of `Demucs`."""

    def __init__(self, layer: nn.Sequential, precision: Precision) -> None:
        super().__init__()
        rewrite = next(module for module in layer if isinstance(module, nn.Conv1d))
        up = next(module for module in layer if isinstance(module, nn.ConvTranspose1d))
        dconv = next((module for module in layer if isinstance(module, DConv)), None)
        self._up = GpuUp(rewrite, dconv, up, precision, crop=0, last=layer[-1] is up)

    def forward(self, x: Tensor) -> Tensor:
        """Decode (B, C, T)."""
        return self._up.apply(x[:, :, None])[:, :, 0]


class GpuPointwise(nn.Module):
    """Optimized 1x1 convolution: (B, C, N) -> (B, O, N)."""

    def __init__(self, conv: nn.Conv1d, precision: Precision) -> None:
        super().__init__()
        self._arithmetic = precision.choose("bottleneck")
        self._product = self._arithmetic.read_linear(conv.weight[:, :, 0], conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        y = self._arithmetic.multiply(x.transpose(1, 2), *self._product)
        return y.transpose(1, 2)
