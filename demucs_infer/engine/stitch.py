"""Cut windows out of a track, and overlap-add the output of a network.

Shapes: S stems, C channels, T samples of the track, W samples of a window, L of a segment;
`...` any leading axes, for recordings that are separated together.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.audio.blocks import reblock
from demucs_infer.engine.level import Level
from demucs_infer.engine.plan import Chunk

# Number of samples that are read from the source of a track at a time.
PIECE = 65_536

PADDINGS = ("constant", "reflect", "replicate")
WINDOWS = ("triangle", "hann", "hamming", "linear_fade", "edge_fade", "ones")


def make_window(shape: str, length: int, *, power: float = 1.0, stop: int | None = None) -> Tensor:
    """Return the weights (L,) of a segment: `shape`, one of `WINDOWS`, to the power of `power`.

    `triangle` rises to 1 in the middle and is never 0. `hann` and `hamming` are periodic, as in
    torch. `linear_fade` is 1 with a ramp over a tenth on both sides; in `edge_fade`, the ramps
    begin at 0 and are omitted at the ends of a track. Only the first `stop` weights are computed,
    if given.
    """
    if shape not in WINDOWS:
        raise ValueError(f"window = {shape!r} must be one of {', '.join(WINDOWS)}")
    if not length > 0:
        raise ValueError(f"a window of {length} samples is too short: it must have 1 or more")
    stop = length if stop is None else min(stop, length)
    if shape == "hann":
        weights = torch.hann_window(length)[:stop]
    elif shape == "hamming":
        weights = torch.hamming_window(length)[:stop]
    elif shape == "ones":
        weights = torch.ones(stop)
    elif shape == "edge_fade":
        fade = length // 10
        weights = torch.ones(length)
        weights[length - fade :] = torch.linspace(1, 0, fade)
        weights[:fade] = torch.linspace(0, 1, fade)
        weights = weights[:stop]
    else:
        at = torch.arange(stop)
        top = length - length // 2 if shape == "triangle" else max(1, length // 10)
        weights = (torch.minimum(at + 1, length - at) / torch.tensor(top)).clamp(max=1)
    return weights**power


def remove_fades(weights: Tensor, segment: int, *, at_start: bool, at_stop: bool) -> Tensor:
    """Return weights of an `edge_fade` window without the ramps at the ends of the track."""
    fade = segment // 10
    weights = weights.clone()
    if at_start:
        weights[:fade] = 1
    if at_stop:
        weights[max(0, len(weights) - fade) :] = 1
    return weights


def usable_weights(window: Tensor, floor: float = 1e-8) -> Tensor:
    """Limit weights (L,) to at least `floor`: with only weights of 0, a sample would be lost."""
    return window.clamp_min(floor)


def source_index(position: Tensor, length: int, mode: str) -> Tensor:
    """Return the index of the sample that padding by `mode` puts at each `position` (n,).

    The track has the samples `[0, length)`; positions may be outside. Reflection is repeated as
    often as needed, so that no padding is too wide for a short track.
    """
    if mode == "replicate" or length == 1:
        return position.clamp(0, length - 1)
    period = 2 * (length - 1)
    inside = position.remainder(period)
    return torch.minimum(inside, period - inside)


def pad_audio(audio: Tensor, left: int, right: int, mode: str = "reflect") -> Tensor:
    """Pad `audio` (..., T) with `left` and `right` samples: (..., left + T + right)."""
    check_padding(mode)
    if left < 0 or right < 0:
        raise ValueError(f"padding must be 0 or more samples, got {left} and {right}")
    if mode == "constant" or not audio.shape[-1]:
        return F.pad(audio, (left, right))
    position = torch.arange(-left, audio.shape[-1] + right, device=audio.device)
    return audio.index_select(-1, source_index(position, audio.shape[-1], mode))


def check_padding(mode: str) -> None:
    """Raise `ValueError` unless `mode` is one of `PADDINGS`."""
    if mode not in PADDINGS:
        raise ValueError(f"padding = {mode!r} must be one of {', '.join(PADDINGS)}")


class TrackBuffer:
    """The part of a track (..., C, T) that is still needed, read from its blocks on demand."""

    def __init__(
        self,
        blocks: Iterable[Tensor],
        length: int,
        *,
        level: Level | None = None,
        start: int = 0,
        around: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.length = length
        self._around = around
        self._level = level
        self._source = reblock(blocks, PIECE)
        self._pieces: deque[Tensor] = deque()
        self._begin = 0  # track coordinate of the first buffered sample
        self._end = 0
        self._start = start  # samples before it are not kept
        self.device = torch.device("cpu")
        """Device of the samples; valid once some have been read."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return the samples `[start, stop)` of the track, at its own level."""
        self._pull(stop)
        parts, at = [], self._begin
        for piece in self._pieces:
            if at < stop and at + piece.shape[-1] > start:
                parts.append(piece[..., max(start - at, 0) : stop - at])
            at += piece.shape[-1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def cut(
        self, chunk: Chunk, padding: str = "constant", pad: int = 0, level: Level | None = None
    ) -> Tensor:
        """Return the window that `chunk` reads, at the level that networks expect: (..., C, W).

        The track is extended on both sides by up to `pad` samples of `padding`, then by silence.
        `level` replaces that of the track.
        """
        level = self._level if level is None else level
        end = chunk.read + chunk.window
        pad = 0 if padding == "constant" else pad
        left, right = max(chunk.read, -pad), min(end, self.length + pad)
        if left >= right:  # entirely outside of the track
            window = torch.zeros_like(self.read(0, 1)).repeat_interleave(chunk.window, dim=-1)
        else:
            inside = self._pad(left, right, padding) if pad else self.read(left, right)
            if level is not None:
                inside = level.remove(inside)
            window = F.pad(inside, (left - chunk.read, end - right))
        return window if self._around is None else self._fill_outside(window, chunk.read)

    def cut_whole(
        self, chunk: Chunk, padding: str = "constant", pad: int = 0, level: Level | None = None
    ) -> Tensor:
        """Return the window that `chunk` reads, extended from the chunk alone: (..., C, W).

        If the chunk ends before its window, the rest of the window is the reflection of the chunk,
        or silence if the chunk is not longer than half of the window.
        """
        if len(chunk) == chunk.window:
            return self.cut(chunk, padding, pad, level)
        owned = self.cut(
            Chunk(chunk.start, chunk.stop, chunk.read, len(chunk)), padding, pad, level
        )
        is_long = len(chunk) > chunk.window // 2 + 1 and padding != "constant"
        return pad_audio(owned, 0, chunk.window - len(chunk), "reflect" if is_long else "constant")

    def drop(self, before: int) -> None:
        """Free the samples before `before`, which must not be read again."""
        while self._pieces and self._begin + self._pieces[0].shape[-1] <= before:
            self._begin += self._pieces.popleft().shape[-1]

    def _fill_outside(self, window: Tensor, read: int) -> Tensor:
        """Return a window that begins at `read`, with what is around the track in its padding."""
        assert self._around is not None
        before, after = self._around
        size = window.shape[-1]
        stop = read + size
        left = before[..., max(0, before.shape[-1] + read) : max(0, before.shape[-1] + stop)]
        right = after[..., max(0, read - self.length) : max(0, stop - self.length)]
        inside = window[..., max(0, -read) : max(0, self.length - read)]
        silence = (-before.shape[-1] - read, stop - self.length - after.shape[-1])
        parts = torch.cat([left, inside, right], dim=-1)
        return F.pad(parts, [min(max(0, count), size) for count in silence])

    def _pad(self, start: int, stop: int, padding: str) -> Tensor:
        index = source_index(torch.arange(start, stop), self.length, padding)
        first, last = int(index.min()), int(index.max())
        samples = self.read(first, last + 1)
        return samples.index_select(-1, (index - first).to(samples.device))

    def _pull(self, stop: int) -> None:
        while self._end < stop:
            piece = next(self._source, None)
            if piece is None:
                raise ValueError(
                    f"the track ended after {self._end} of {self.length} samples: "
                    "every call of blocks() must return the same samples"
                )
            self.device = piece.device
            self._pieces.append(piece)
            self._end += piece.shape[-1]
            self.drop(min(self._start, self._end - piece.shape[-1]))


class OverlapAdd:
    """Weighted mean of overlapping chunks, available as soon as it is final.

    Chunks are added in order of `start`. Only samples that have been added and not yet taken are
    kept: about one segment, for any length of the track.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        """First sample that `take` has not returned yet."""
        self.stop = start
        """End of the last chunk added (exclusive)."""
        self._total: Tensor | None = None
        self._norm = torch.empty(0)

    def add(self, start: int, values: Tensor, weights: Tensor) -> None:
        """Add `values` (..., L) with `weights` (L,) at sample `start`."""
        total = self._reserve(start + values.shape[-1], values)
        at = slice(start - self.start, start - self.start + values.shape[-1])
        # The device differs if the network fell back to the CPU; the sum stays on the first one.
        total[..., at] += (weights * values).to(total.device)
        self._norm[at] += weights.to(total.device)
        self.stop = max(self.stop, start + values.shape[-1])

    def take(self, stop: int) -> Tensor:
        """Return the samples up to `stop`, (..., stop - start), and free them.

        No chunk that overlaps them may be added later.
        """
        if self._total is None or not self.start <= stop <= self.stop:
            raise ValueError(f"no samples up to {stop}: available are [{self.start}, {self.stop})")
        count, size = stop - self.start, self.stop - self.start
        final = self._total[..., :count] / self._norm[:count]
        for tensor in (self._total, self._norm):
            rest = tensor[..., count:size]
            # If source and target overlap, a copy in place would read what it has just written.
            tensor[..., : size - count] = rest if count >= size - count else rest.clone()
            tensor[..., size - count : size] = 0
        self.start = stop
        return final

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Tensors in memory, to measure their size."""
        return (tensor for tensor in (self._total, self._norm) if tensor is not None)

    def _reserve(self, stop: int, like: Tensor) -> Tensor:
        """Return the sum, extended to sample `stop`."""
        length = stop - self.start
        if self._total is None:
            self._total = torch.zeros(*like.shape[:-1], length, device=like.device)
            self._norm = torch.zeros(length, device=like.device)
        elif self._total.shape[-1] < length:
            more = length - self._total.shape[-1]
            self._total, self._norm = F.pad(self._total, (0, more)), F.pad(self._norm, (0, more))
        return self._total
