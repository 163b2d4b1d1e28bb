"""Run modules of a network piece by piece, so that what they compute in between stays small.

It takes less memory then, and stays in the processor's cache. Some modules treat items
independently of each other; the others that are here are known by their structure. Sums are the
same, some in another order.

Shapes: B items or windows, C channels, H rows, W columns, `...` any other axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_VALUES = 2**19
"""Numbers in the input of a piece that has more than one item."""

MAX_ROW_VALUES = 2**20
"""The same for pieces of rows, which are computed again where they overlap."""

MAX_LINE_VALUES = 2**21
"""The same for pieces that run step by step, each of which takes time of its own."""

Affine: TypeAlias = tuple[Tensor, Tensor] | None
"""Factor and offset of each channel, (B, C, 1, 1)."""


def run_in_pieces(module: nn.Module) -> None:
    """Let `module`, which maps (B, ...) to (B, ...) item by item, run a few items at a time."""
    forward = type(module).forward.__get__(module)
    module.__dict__["forward"] = partial(_run, forward)


def _run(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    count = max(1, MAX_VALUES // max(1, x[:1].numel()))
    if len(x) <= count:
        return forward(x)
    first = forward(x[:count])
    result = first.new_empty(len(x), *first.shape[1:])
    result[:count] = first
    for start in range(count, len(x), count):
        result[start : start + count] = forward(x[start : start + count])
    return result


def run_fusion(module: Any, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """Run the fusion layer of an SCNet: a gated convolution of two copies of `x` + `skip`.

    As both copies are the same, it is a convolution of one with the sum of their weights.
    """
    weight = module.conv.weight.unflatten(1, (2, -1)).sum(1)

    def read(start: int, stop: int) -> Tensor:
        rows = x[:, :, start:stop]
        return rows if skip is None else rows + skip[:, :, start:stop]

    result = x.new_empty(len(x), len(weight) // 2, *x.shape[2:])
    for start, stop, rows in _convolve(read, x, weight, module.conv.bias):
        result[:, :, start:stop] = F.glu(rows, dim=1)
    return result


def run_dual_path(module: Any, x: Tensor) -> Tensor:
    """Run two recurrent layers, along the rows and along the columns, on a few lines at a time."""
    lstms, linears, norms = module.lstm_layers, module.linear_layers, module.norm_layers
    result = x
    for lstm, linear, norm, axes in zip(lstms, linears, norms, ((0, 3, 2, 1), (0, 2, 3, 1))):
        lines = norm(result).permute(axes)  # (B, lines, steps, C)
        result = result.clone() if result is x else result
        target = result.permute(axes)
        count = max(1, MAX_LINE_VALUES // max(1, lines[:, :1].numel()))
        for start in range(0, lines.shape[1], count):
            piece = lines[:, start : start + count]
            output = linear(lstm(piece.flatten(0, 1))[0])
            target[:, start : start + count] += output.unflatten(0, piece.shape[:2])
    return result


def run_tfc_tdf(module: Any, x: Tensor) -> Tensor:
    """Run the blocks of an MDX23C: convolutions, and linear layers over each line of columns."""
    for block in module.blocks:
        first, second = block.tfc1, block.tfc2
        inner = _normalize_and_convolve(first, x)
        _add_linear_layers(block.tdf, inner)
        x = _normalize_and_convolve(second, inner, (block.shortcut, x))
    return x


def run_scale(module: Any, x: Tensor) -> Tensor:
    """Run norm, activation and a convolution of an MDX23C that changes the size."""
    norm, activation, conv = module.conv
    is_transposed = isinstance(conv, nn.ConvTranspose2d)
    height, width = conv.stride
    affine = _measure_norm(norm, x)
    rows = x.shape[2] * height if is_transposed else x.shape[2] // height
    columns = x.shape[3] * width if is_transposed else x.shape[3] // width
    result = x.new_empty(len(x), conv.out_channels, rows, columns)
    for start, stop in _split_rows(x, 1 if is_transposed else height):
        piece = conv(activation(_apply(affine, x[:, :, start:stop])))
        first = start * height if is_transposed else start // height
        result[:, :, first : first + piece.shape[2]] = piece
    return result


def _normalize_and_convolve(
    layers: Any, x: Tensor, shortcut: tuple[nn.Module, Tensor] | None = None
) -> Tensor:
    """Run norm, activation and convolution, and add the shortcut of another tensor."""
    norm, activation, conv = layers
    affine = _measure_norm(norm, x)
    result = x.new_empty(len(x), conv.out_channels, *x.shape[2:])

    def read(start: int, stop: int) -> Tensor:
        return cast(Tensor, activation(_apply(affine, x[:, :, start:stop])))

    for start, stop, rows in _convolve(read, x, conv.weight, conv.bias):
        if shortcut is not None:
            layer, other = shortcut
            rows = rows.add_(layer(other[:, :, start:stop]))
        result[:, :, start:stop] = rows
    return result


def _add_linear_layers(layers: Any, x: Tensor) -> None:
    """Add to `x` what norm, activation and linear layer, twice, make of it."""
    norm1, activation1, linear1, norm2, activation2, linear2 = layers
    inner = x.new_empty(*x.shape[:3], linear1.out_features)
    affine = _measure_norm(norm1, x)
    for start, stop in _split_rows(x):
        inner[:, :, start:stop] = linear1(activation1(_apply(affine, x[:, :, start:stop])))
    affine = _measure_norm(norm2, inner)
    for start, stop in _split_rows(x):
        x[:, :, start:stop] += linear2(activation2(_apply(affine, inner[:, :, start:stop])))


def _split_rows(x: Tensor, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the rows of each piece, whose number is a `multiple`."""
    count = max(1, MAX_ROW_VALUES // max(1, multiple * x[:, :, :1].numel())) * multiple
    for start in range(0, x.shape[2] // multiple * multiple, count):
        yield start, min(start + count, x.shape[2])


def _convolve(
    read: Callable[[int, int], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Convolve with zeros around; yield start, stop and output of each piece of the rows of `x`.

    `read` returns the rows between two indices of what is convolved, which is as tall as `x`.
    """
    border, side = weight.shape[2] // 2, weight.shape[3] // 2
    for start, stop in _split_rows(x):
        first, last = max(0, start - border), min(x.shape[2], stop + border)
        rows = read(first, last)
        above, below = border - (start - first), border - (last - stop)
        if above or below:
            rows = F.pad(rows, (0, 0, above, below))
        yield start, stop, F.conv2d(rows, weight, bias, padding=(0, side))


def _apply(affine: Affine, x: Tensor) -> Tensor:
    return x if affine is None else torch.addcmul(affine[1], x, affine[0])


def _measure_norm(norm: nn.Module, x: Tensor) -> Affine:
    """Return what `norm` multiplies each channel of `x` by, and adds to it."""
    if isinstance(norm, nn.Identity):
        return None
    assert isinstance(norm, nn.InstanceNorm2d | nn.BatchNorm2d | nn.GroupNorm)
    channels = x.shape[1]
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    else:
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else channels
        mean, variance = _measure_groups(x.unflatten(1, (groups, -1)).flatten(0, 1))
        mean, variance = (
            values.reshape(-1, groups, 1).expand(-1, -1, channels // groups).flatten(1)
            for values in (mean, variance)
        )
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    offset = -mean * factor
    if norm.bias is not None:
        offset = offset + norm.bias
    return factor.view(-1, channels, 1, 1), offset.view(-1, channels, 1, 1)


def _measure_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each group, (groups, channels, H, W)."""
    mean, variance = x.new_empty(len(x)), x.new_empty(len(x))
    axes = (1, 2, 3)
    count = max(1, MAX_VALUES // max(1, x[:1].numel()))
    for start in range(0, len(x), count):
        piece = x[start : start + count]
        center = piece.mean(axes, keepdim=True)
        mean[start : start + count] = center.flatten()
        variance[start : start + count] = (piece - center).square_().mean(axes)
    return mean, variance


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "FusionLayer": run_fusion,
    "DualPathRNN": run_dual_path,
    "TFC_TDF": run_tfc_tdf,
    "Upscale": run_scale,
    "Downscale": run_scale,
}
"""Functions that do the same as the modules of these classes, by name."""


def supports(module: nn.Module) -> bool:
    """Return whether a function of `FORWARDS` does the same as `module`."""
    name = type(module).__name__
    parts: Any = module
    if name == "FusionLayer":
        return _is_plain(parts.conv)
    if name == "DualPathRNN":
        return all(lstm.batch_first and lstm.num_layers == 1 for lstm in parts.lstm_layers)
    if name in ("Upscale", "Downscale"):
        return isinstance(parts.conv, nn.Sequential) and _is_scale(*parts.conv)
    if name != "TFC_TDF":
        return False
    layers = [layer for block in parts.blocks for layer in (block.tfc1, block.tfc2)]
    norms = [layer[0] for layer in layers]
    norms += [layer for block in parts.blocks for layer in (block.tdf[0], block.tdf[3])]
    return all(_is_plain(layer[2]) for layer in layers) and all(map(_is_known_norm, norms))


def _is_plain(conv: nn.Module) -> bool:
    """Return whether a convolution keeps the size and has no options."""
    if not isinstance(conv, nn.Conv2d) or isinstance(conv.padding, str):
        return False
    same = all(size == 2 * pad + 1 for size, pad in zip(conv.kernel_size, conv.padding))
    return same and conv.stride == conv.dilation == (1, 1) and conv.groups == 1


def _is_scale(norm: nn.Module, _activation: nn.Module, conv: nn.Module) -> bool:
    """Return whether a convolution has no overlap and no options."""
    if not isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) or conv.padding != (0, 0):
        return False
    options = conv.output_padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1
    return options and conv.kernel_size == conv.stride and _is_known_norm(norm)


def _is_known_norm(norm: nn.Module) -> bool:
    if isinstance(norm, nn.InstanceNorm2d):
        return not norm.track_running_stats
    return isinstance(norm, nn.BatchNorm2d | nn.GroupNorm | nn.Identity)
