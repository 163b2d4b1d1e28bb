"""Define Triton kernels for the functions of `fused`; importing this module requires Triton.

Every kernel reads its input once or twice and computes in float32. A row that is normalized is cut
into pieces, so that the few long rows of the waveform also occupy the whole GPU: one kernel
measures the pieces, the next one joins their moments and applies the norm. The arguments of
kernels have no annotations, because Triton would compile them, too. Numbers that do not help to
load several values at once are not specialized, so that fewer variants are compiled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Numbers that a Triton program processes at a time."""

_PIECE = 8 * _BLOCK
"""Largest piece of a row for one program, except for rows with more than `_MOST_PIECES`."""

_MOST_PIECES = 512


def _choose_piece(length: int) -> int:
    """Return the length, a power of two, of the pieces of a row of `length` numbers."""
    least: int = triton.next_power_of_2(triton.cdiv(length, _MOST_PIECES))
    whole: int = triton.next_power_of_2(length)
    return max(_BLOCK, least, min(_PIECE, whole))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["count", "channels"])
def _bias_gelu_kernel(
    x, bias, inject, out, count, channels,
    has_inject: tl.constexpr, gelu: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * block
    at = start + tl.arange(0, block)
    inside = at < count
    channel = ((start % channels).to(tl.int32) + tl.arange(0, block)) % channels
    y = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(bias + channel, inside, 0.0)
    if has_inject:
        y += tl.load(inject + at, inside, 0.0).to(tl.float32)
    if gelu:
        y = _gelu(y)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["count", "channels", "steps", "bins"])
def _gate_kernel(
    x, bias, offset, out, count, channels, steps, bins,
    has_offset: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * block
    at = start + tl.arange(0, block)
    inside = at < count
    lane = (start % channels).to(tl.int32) + tl.arange(0, block)
    channel = lane % channels
    row = start // channels + lane // channels
    first = row * 2 * channels + channel
    values = tl.load(x + first, inside, 0.0).to(tl.float32)
    values += tl.load(bias + channel, inside, 0.0)
    gates = tl.load(x + first + channels, inside, 0.0).to(tl.float32)
    gates += tl.load(bias + channels + channel, inside, 0.0)
    y = values * _sigmoid(gates)
    if has_offset:
        y += tl.load(offset + (row // steps) % bins * channels + channel, inside, 0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["channels", "stride"])
def _measure_kernel(
    x, bias, moments, length, stride, channels,
    has_bias: tl.constexpr, piece: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Store the mean of a piece of a row, and its sum of squared deviations.

    Of each run of `stride` numbers, the first `channels` count.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = part * piece
    lanes = tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    numbers = tl.zeros((block,), tl.float32)
    for offset in range(0, piece, block):
        at = start + offset + lanes
        channel = at % stride
        inside = (at < length) & (channel < channels)
        y = tl.load(x + row * length + at, inside, 0.0).to(tl.float32)
        if has_bias:
            y += tl.load(bias + channel, inside, 0.0)
        total += tl.where(inside, y, 0.0)
        numbers += tl.where(inside, 1.0, 0.0)
    count = tl.sum(numbers, 0)
    mean = tl.sum(total, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros((block,), tl.float32)
    for offset in range(0, piece, block):
        at = start + offset + lanes
        channel = at % stride
        inside = (at < length) & (channel < channels)
        y = tl.load(x + row * length + at, inside, 0.0).to(tl.float32)
        if has_bias:
            y += tl.load(bias + channel, inside, 0.0)
        squares += tl.where(inside, (y - mean) * (y - mean), 0.0)
    target = moments + (row * tl.num_programs(1) + part) * 3
    tl.store(target, count)
    tl.store(target + 1, mean)
    tl.store(target + 2, tl.sum(squares, 0))


@triton.jit
def _join_moments(moments, row, parts, epsilon, most: tl.constexpr):
    """Return mean and inverse deviation of a row from the moments of its pieces."""
    part = tl.arange(0, most)
    inside = part < parts
    source = moments + (row * parts + part) * 3
    count = tl.load(source, inside, 0.0)
    means = tl.load(source + 1, inside, 0.0)
    squares = tl.load(source + 2, inside, 0.0)
    total = tl.sum(count, 0)
    mean = tl.sum(count * means, 0) / total
    spread = tl.sum(squares + count * (means - mean) * (means - mean), 0) / total
    return mean, 1.0 / tl.sqrt(spread + epsilon)


@triton.jit(do_not_specialize=["stride", "parts"])
def _norm_gelu_kernel(
    x, bias, gain, shift, moments, out, length, stride,
    parts, epsilon,
    has_bias: tl.constexpr, gelu: tl.constexpr, most: tl.constexpr, piece: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mean, scale = _join_moments(moments, row, parts, epsilon, most)
    for offset in range(0, piece, block):
        at = part * piece + offset + tl.arange(0, block)
        inside = at < length
        channel = at % stride
        y = tl.load(x + row * length + at, inside, 0.0).to(tl.float32)
        if has_bias:
            y += tl.load(bias + channel, inside, 0.0)
        y = (y - mean) * (scale * tl.load(gain + channel, inside, 0.0))
        y += tl.load(shift + channel, inside, 0.0)
        if gelu:
            y = _gelu(y)
        tl.store(out + row * length + at, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["channels", "parts"])
def _norm_gate_kernel(
    x, gain, shift, moments, scales, stream, out, length,
    channels, parts, epsilon,
    most: tl.constexpr, piece: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mean, scale = _join_moments(moments, row, parts, epsilon, most)
    for offset in range(0, piece, block):
        at = part * piece + offset + tl.arange(0, block)
        inside = at < length
        channel = at % channels
        first = row * 2 * length + at // channels * 2 * channels + channel
        values = tl.load(x + first, inside, 0.0).to(tl.float32)
        gates = tl.load(x + first + channels, inside, 0.0).to(tl.float32)
        values = (values - mean) * (scale * tl.load(gain + channel, inside, 0.0))
        values += tl.load(shift + channel, inside, 0.0)
        gates = (gates - mean) * (scale * tl.load(gain + channels + channel, inside, 0.0))
        gates += tl.load(shift + channels + channel, inside, 0.0)
        y = tl.load(scales + channel, inside, 0.0) * values * _sigmoid(gates)
        y += tl.load(stream + row * length + at, inside, 0.0).to(tl.float32)
        tl.store(out + row * length + at, y.to(out.dtype.element_ty), inside)


@triton.jit
def _add_norm_kernel(
    x, branch, scales, gain, shift, total, out, channels,
    epsilon, has_branch: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    inside = channel < channels
    at = row * channels + channel
    y = tl.load(x + at, inside, 0.0).to(tl.float32)
    if has_branch:
        y += tl.load(branch + at, inside, 0.0).to(tl.float32) * tl.load(
            scales + channel, inside, 0.0
        )
        tl.store(total + at, y, inside)
    mean = tl.sum(tl.where(inside, y, 0.0), 0) / channels
    centered = tl.where(inside, y - mean, 0.0)
    spread = tl.sum(centered * centered, 0) / channels
    y = centered * (1.0 / tl.sqrt(spread + epsilon)) * tl.load(gain + channel, inside, 0.0)
    y += tl.load(shift + channel, inside, 0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["count", "channels", "parts"])
def _split_kernel(x, out, count, channels, parts, dropped: tl.constexpr, block: tl.constexpr):
    """Store the high digits of numbers, the low ones, and perhaps the high ones once more."""
    start = tl.program_id(0).to(tl.int64) * block
    at = start + tl.arange(0, block)
    inside = at < count
    lane = (start % channels).to(tl.int32) + tl.arange(0, block)
    first = (start // channels + lane // channels) * parts * channels + lane % channels
    y = tl.load(x + at, inside, 0.0).to(tl.float32)
    bits = y.to(tl.int32, bitcast=True) + (1 << (dropped - 1))
    high = (bits >> dropped << dropped).to(tl.float32, bitcast=True)
    tl.store(out + first, high, inside)
    tl.store(out + first + channels, y - high, inside)
    if parts == 3:
        tl.store(out + first + 2 * channels, high, inside)


def split_digits(x: Tensor, parts: int, dropped_bits: int) -> Tensor:
    """Do what `arithmetic.split_digits` does, for the last axis."""
    x = x.contiguous()
    channels = x.shape[-1]
    shape = (*x.shape[:-1], parts * channels)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _split_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
        x, out, x.numel(), channels, parts, dropped=dropped_bits, block=_BLOCK
    )
    return out


def add_bias_and_gelu(
    x: Tensor, bias: Tensor, dtype: torch.dtype, *, gelu: bool, inject: Tensor | None
) -> Tensor:
    """Do what `fused.add_bias_and_gelu` does."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    inject = None if inject is None else inject.contiguous()
    _bias_gelu_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
        x, bias, x if inject is None else inject, out, x.numel(), x.shape[-1],
        has_inject=inject is not None, gelu=gelu, block=_BLOCK,
    )  # fmt: skip
    return out


def gate(x: Tensor, bias: Tensor, dtype: torch.dtype, offset: Tensor | None) -> Tensor:
    """Do what `fused.gate` does: (..., F, T, 2C), or (..., T, 2C) without an offset."""
    x = x.contiguous()
    channels = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], channels), dtype=dtype, device=x.device)
    bins, steps = (1, 1) if offset is None else (x.shape[-3], x.shape[-2])
    table = bias if offset is None else offset.contiguous()
    _gate_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        x, bias, table, out, out.numel(), channels, steps, bins,
        has_offset=offset is not None, block=_BLOCK,
    )  # fmt: skip
    return out


def _measure(x: Tensor, bias: Tensor | None, channels: int) -> tuple[Tensor, int]:
    """Return the moments of the pieces of (R, T, C), and how many pieces a row has."""
    rows, length = len(x), x.shape[1] * x.shape[2]
    piece = _choose_piece(length)
    parts = triton.cdiv(length, piece)
    moments = torch.empty((rows, parts, 3), dtype=torch.float32, device=x.device)
    _measure_kernel[(rows, parts)](
        x, x if bias is None else bias, moments, length, x.shape[2], channels,
        has_bias=bias is not None, piece=piece, block=_BLOCK,
    )  # fmt: skip
    return moments, parts


def normalize(
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    channels: int,
    *,
    gelu: bool,
) -> Tensor:
    """Do what `fused.normalize_and_gelu` does, or `normalize_rows` without bias and GELU."""
    x = x.contiguous()
    moments, parts = _measure(x, bias, channels)
    out = torch.empty_like(x, dtype=dtype)
    length = x.shape[1] * x.shape[2]
    _norm_gelu_kernel[(len(x), parts)](
        x, x if bias is None else bias, gain, shift, moments, out, length, x.shape[2], parts,
        epsilon, has_bias=bias is not None, gelu=gelu, most=triton.next_power_of_2(parts),
        piece=_choose_piece(length), block=_BLOCK,
    )  # fmt: skip
    return out


def normalize_and_gate(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    scale: Tensor,
    stream: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Do what `fused.normalize_and_gate` does."""
    x, stream = x.contiguous(), stream.contiguous()
    moments, parts = _measure(x, None, x.shape[2])
    length = stream.shape[1] * stream.shape[2]
    out, piece = torch.empty_like(stream, dtype=dtype), _choose_piece(length)
    _norm_gate_kernel[(len(x), triton.cdiv(length, piece))](
        x, gain, shift, moments, scale, stream, out, length, stream.shape[2], parts, epsilon,
        most=triton.next_power_of_2(parts), piece=piece, block=_BLOCK,
    )  # fmt: skip
    return out


def add_and_normalize(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Do what `fused.add_and_normalize` does."""
    x = x.contiguous()
    channels = x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    total = x if branch is None else torch.empty_like(x)
    _add_norm_kernel[(x.numel() // channels,)](
        x, x if branch is None else branch.contiguous(), scale, gain, shift, total, out, channels,
        epsilon, has_branch=branch is not None, block=triton.next_power_of_2(channels),
    )  # fmt: skip
    return total, out
