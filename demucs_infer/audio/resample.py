"""Resample a stream block by block, with upstream's windowed sinc or with soxr.

Shapes: C channels, T samples of a block, P phases (outputs of one period), K taps of a filter.

The rates are divided by their greatest common divisor: `old` input samples and `new` output samples
are one period. Output `n * new + p` is a dot product of the input around `n * old + p * old / new`
with filter `p`, so a convolution with stride `old` and one output channel per phase computes all
outputs. It runs on pieces at fixed positions of the track, so the result does not depend on the
sizes of the blocks.

The resampler is written here because julius, which upstream uses, has no streaming interface.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demucs_infer.options import Resampler

_ZEROS = 24
"""Zero crossings of the sinc on each side."""
_ROLLOFF = 0.945
"""Cut-off, as a fraction of the lower Nyquist frequency."""
_PIECE = 1 << 16
"""Most input or output samples of one convolution, to limit its memory."""
_MAX_FULL_WEIGHTS = 1 << 20
"""Up to this many weights, one convolution computes all phases, bit-identical to upstream's."""
_MAX_CACHED_WEIGHTS = 1 << 23
"""Up to this many weights (32 MiB) filters are cached; beyond, they are made for each piece."""
_PUSH = 1 << 17
"""Samples that `resample` pushes at a time."""


class _ResampleStream(Protocol):
    def push(self, block: Tensor) -> Tensor: ...

    def finish(self) -> Tensor: ...


class StreamResampler:
    """Resamples blocks (C, t) of any size: `push` each, then `finish`, and join the results.

    `method="julius"` is upstream's kernel and gives `floor(T * to / from)` samples. With two or
    more channels at the usual rates it is bit-identical to upstream; if the reduced rates are
    large (44056 and 44100 Hz), taps beyond the filter's support, below 1e-15, are left out.
    `method="soxr"` is the steeper filter of the soxr package at its best quality, and gives
    `round(T * to / from)` samples.
    """

    def __init__(
        self, from_rate: int, to_rate: int, channels: int, method: Resampler = "julius"
    ) -> None:
        if not (from_rate >= 1 and to_rate >= 1):
            raise ValueError(f"sample rates must be at least 1 Hz, got {from_rate} and {to_rate}")
        if not channels >= 1:
            raise ValueError(f"{channels = } must be at least 1")
        if method not in ("julius", "soxr"):
            raise ValueError(f"{method = } must be 'julius' or 'soxr'")
        self._channels = channels
        self._stream: _ResampleStream
        if from_rate == to_rate:
            self._stream = _PassThrough(channels)
        elif method == "soxr":
            self._stream = _SoxrStream(from_rate, to_rate, channels)
        else:
            self._stream = _SincStream(_FilterBank(from_rate, to_rate), channels)

    def push(self, block: Tensor) -> Tensor:
        """Return the output (C, t') that is complete after `block` (C, t), possibly none."""
        if block.ndim != 2 or block.shape[0] != self._channels:
            raise ValueError(
                f"a block must have {self._channels} channels (C, t), got {tuple(block.shape)}"
            )
        return self._stream.push(block)

    def finish(self) -> Tensor:
        """Return the rest (C, t') of the output; nothing may be pushed afterwards."""
        return self._stream.finish()


def resample(wav: Tensor, from_rate: int, to_rate: int, method: Resampler = "julius") -> Tensor:
    """Resample a whole track: (..., T) -> (..., T'), with the same result as a stream."""
    if from_rate == to_rate:
        return wav
    flat = wav.reshape(-1, wav.shape[-1])
    stream = StreamResampler(from_rate, to_rate, max(flat.shape[0], 1), method)
    if not flat.shape[0]:
        return wav.new_zeros(*wav.shape[:-1], wav.shape[-1] * to_rate // from_rate)
    parts = [stream.push(part) for part in torch.split(flat, _PUSH, dim=-1)]
    parts.append(stream.finish())
    return torch.cat(parts, dim=-1).reshape(*wav.shape[:-1], -1)


class _PassThrough:
    def __init__(self, channels: int) -> None:
        self._empty = torch.zeros(channels, 0)

    def push(self, block: Tensor) -> Tensor:
        return block

    def finish(self) -> Tensor:
        return self._empty


class _SoxrStream:
    def __init__(self, from_rate: int, to_rate: int, channels: int) -> None:
        try:
            import soxr
        except ImportError as error:
            raise ImportError(
                "resampling with soxr needs the soxr package: pip install soxr, "
                "or resample with the default method"
            ) from error
        self._channels = channels
        self._stream = soxr.ResampleStream(from_rate, to_rate, channels, "float32", "VHQ")

    def push(self, block: Tensor, *, is_last: bool = False) -> Tensor:
        frames = np.ascontiguousarray(block.detach().t().float().cpu().numpy())
        output = np.asarray(self._stream.resample_chunk(frames, last=is_last))
        return torch.from_numpy(output.reshape(-1, self._channels)).t().to(block)

    def finish(self) -> Tensor:
        return self.push(torch.zeros(self._channels, 0), is_last=True)


@dataclass(frozen=True, slots=True, eq=False)
class _PhaseGroup:
    """Neighboring phases that one convolution computes."""

    skip: int
    """Samples between the first one that a period reads and the first tap of the group."""
    filters: Tensor
    """(P, 1, K)"""


class _FilterBank:
    """The filters that convert one rate to another."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        divisor = math.gcd(from_rate, to_rate)
        self.old, self.new = from_rate // divisor, to_rate // divisor
        self.cutoff = min(self.old, self.new) * _ROLLOFF
        self.width = math.ceil(_ZEROS * self.old / self.cutoff)
        self.reach = 2 * self.width + self.old
        """Input samples that one period of output reads; the first `width` of them precede it."""
        # With this many phases, the support of a filter is half of the taps of its group.
        self._phases = max(1, 2 * self.width * self.new // self.old)
        self._cached: list[_PhaseGroup] | None = None
        if self.new * self.reach <= _MAX_FULL_WEIGHTS:
            self._cached = [
                _PhaseGroup(0, self._filters(0, self.new, -self.width, self.width + self.old))
            ]
        elif 4 * self.width * self.new <= _MAX_CACHED_WEIGHTS:
            self._cached = list(self._make_groups())

    def groups(self) -> Iterator[_PhaseGroup]:
        """Yield all phases in groups."""
        yield from self._make_groups() if self._cached is None else self._cached

    def _make_groups(self) -> Iterator[_PhaseGroup]:
        for first in range(0, self.new, self._phases):
            stop = min(first + self._phases, self.new)
            low = first * self.old // self.new - self.width
            high = min(math.ceil(stop * self.old / self.new), self.old) + self.width
            yield _PhaseGroup(low + self.width, self._filters(first, stop, low, high))

    def _filters(self, first: int, stop: int, low: int, high: int) -> Tensor:
        """Make the filters (P, 1, K) of the phases [first, stop) at the samples [low, high).

        The float32 operations are in upstream's order, so that the last bit is equal.
        """
        phases = [-i / self.new for i in range(first, stop)]
        phase = torch.tensor(phases, dtype=torch.float32)[:, None]
        t = (phase + torch.arange(low, high).float() / self.old) * self.cutoff
        t = t.clamp_(-_ZEROS, _ZEROS) * math.pi
        weights = torch.where(t == 0, torch.ones(()), torch.sin(t) / t)
        weights *= torch.cos(t / _ZEROS / 2) ** 2
        # Row by row: summing a matrix along rows may use another order.
        for row in weights:
            row /= row.sum()
        return weights[:, None]


class _SincStream:
    def __init__(self, bank: _FilterBank, channels: int) -> None:
        self._bank = bank
        self._channels = channels
        self._periods = max(1, _PIECE // max(bank.old, bank.new))
        self._tail = torch.zeros(channels, 0)
        self._received = 0
        self._sent = 0

    def push(self, block: Tensor) -> Tensor:
        if not block.shape[-1]:
            return block
        if not self._received:  # pad with the first sample
            block = torch.cat([block[:, :1].expand(-1, self._bank.width), block], dim=-1)
            self._received -= self._bank.width
        else:
            block = torch.cat([self._tail, block], dim=-1)
            self._received -= self._tail.shape[-1]
        self._received += block.shape[-1]
        outputs = []
        step = self._periods * self._bank.old
        while block.shape[-1] >= step - self._bank.old + self._bank.reach:
            outputs.append(self._convolve(block, self._periods))
            block = block[:, step:]
        self._tail = block.clone()
        return torch.cat(outputs, dim=-1) if outputs else block[:, :0]

    def finish(self) -> Tensor:
        bank = self._bank
        if not self._received:
            return self._tail
        end = self._tail[:, -1:].expand(-1, bank.width + bank.old)
        rest = torch.cat([self._tail, end], dim=-1)
        outputs = []
        missing = self._received * bank.new // bank.old - self._sent
        while missing > 0:
            periods = min(self._periods, (rest.shape[-1] - bank.reach) // bank.old + 1)
            outputs.append(self._convolve(rest, periods)[:, :missing])
            missing -= outputs[-1].shape[-1]
            rest = rest[:, periods * bank.old :]
        return torch.cat(outputs, dim=-1) if outputs else rest[:, :0]

    def _convolve(self, block: Tensor, periods: int) -> Tensor:
        """Compute the first `periods` periods of output from `block` (C, t): (C, periods * new)."""
        bank = self._bank
        # PyTorch sums one channel in an order that depends on its length, but not two channels.
        pair = (block.expand(2, -1) if self._channels == 1 else block)[:, None]
        span = (periods - 1) * bank.old
        outputs = []
        for group in bank.groups():
            filters = group.filters.to(block)
            read = pair[..., group.skip : group.skip + span + filters.shape[-1]]
            outputs.append(F.conv1d(read, filters, stride=bank.old))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        self._sent += periods * bank.new
        return joined[: self._channels].transpose(1, 2).reshape(self._channels, -1)
