"""Silence stems where they are inaudible beside the mixture, with smooth edges.

Shapes: S stems, C channels, t samples of a block, L samples of a frame.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

_FRAME_SECONDS = 0.02
_HOLD_SECONDS = 0.5

_RATIO = 1e-6
"""Of the energy of a stem to that of the mixture: -60 dB."""

_SILENCE = 1e-10
"""Energy of a mixture that is silent: -100 dB of full scale."""

_Gain: TypeAlias = Literal["keep", "fade out", "zero", "fade in"]


@dataclass(slots=True)
class _Frame:
    samples: Tensor
    """(S, C, L); shorter at the end of the track."""
    gains: list[_Gain | None]
    """Of each stem; None: depends on frames that follow."""


class Gate:
    """Silences a stem that is more than 60 dB below the mixture for more than half a second.

    Frames are counted from the start of the track, so that the result does not depend on how it is
    cut into blocks. The mean of each frame is subtracted before its energy
    is computed: every stem has the constant offset of the track, which would make it look loud.
    """

    def __init__(self, sample_rate: int, num_stems: int, start: int = 0) -> None:
        self._size = frame_size(sample_rate)
        self._hold = int(_HOLD_SECONDS * sample_rate / self._size)
        """Frames that may be quiet without being silenced."""
        self._fade_in = torch.linspace(0, 1, self._size + 2)[1:-1]
        self._frames: deque[_Frame] = deque()
        self._rest: tuple[Tensor, Tensor] | None = None
        self._num_quiet = [0] * num_stems
        """Of each stem, the frames since it was loud."""
        self._was_loud = [start > 0] * num_stems

    def push(self, stems: Tensor, mixture: Tensor) -> Tensor | None:
        """Add the next samples (S, C, t) and (C, t); return those that are final, or None."""
        if self._rest is not None:
            stems = torch.cat([self._rest[0], stems], dim=-1)
            mixture = torch.cat([self._rest[1], mixture], dim=-1)
        whole = stems.shape[-1] // self._size * self._size
        self._rest = (stems[..., whole:], mixture[..., whole:])
        self._add(stems[..., :whole], mixture[..., :whole])
        return self._take()

    def finish(self) -> Tensor | None:
        """Return the samples that are left at the end of the track, or None."""
        if self._rest is not None:
            self._add(*self._rest)
        for stem, count in enumerate(self._num_quiet):
            for frame in self._list_undecided(stem):
                frame.gains[stem] = "zero" if count > self._hold else "keep"
        return self._take()

    def _add(self, stems: Tensor, mixture: Tensor) -> None:
        """Add whole frames, or the last part of one."""
        if not stems.shape[-1]:
            return
        size = min(self._size, stems.shape[-1])
        level = _energy(mixture, size)
        is_quiet = (_energy(stems, size) < _RATIO * level) | (level < _SILENCE)
        for samples, quiet_stems in zip(stems.split(size, dim=-1), is_quiet.T.tolist()):
            self._frames.append(_Frame(samples, [None] * len(samples)))
            for stem, is_quiet_here in enumerate(quiet_stems):
                self._decide(stem, is_quiet=is_quiet_here)

    def _decide(self, stem: int, *, is_quiet: bool) -> None:
        """Set the gains of a stem that are known after the last frame."""
        *before, last = self._list_undecided(stem)
        is_long = self._num_quiet[stem] > self._hold
        if not is_quiet:
            for frame in before:
                frame.gains[stem] = "fade in" if is_long else "keep"
            last.gains[stem] = "keep"
            self._num_quiet[stem], self._was_loud[stem] = 0, True
            return
        self._num_quiet[stem] += 1
        if self._num_quiet[stem] > self._hold:  # the last frame may have to fade in again
            for frame in before:
                frame.gains[stem] = "zero"
            if not is_long and self._was_loud[stem]:
                before[0].gains[stem] = "fade out"

    def _list_undecided(self, stem: int) -> list[_Frame]:
        """Return the frames, always the last ones, whose gain for a stem is not known."""
        frames = []
        for frame in reversed(self._frames):
            if frame.gains[stem] is not None:
                break
            frames.append(frame)
        return frames[::-1]

    def _take(self) -> Tensor | None:
        """Remove the frames that are complete, and return their samples."""
        parts = []
        while self._frames and None not in self._frames[0].gains:
            frame = self._frames.popleft()
            pairs = zip(frame.samples, frame.gains)
            if set(frame.gains) == {"keep"}:
                parts.append(frame.samples)
                continue
            parts.append(torch.stack([self._apply(samples, gain) for samples, gain in pairs]))
        return torch.cat(parts, dim=-1) if parts else None

    def _apply(self, samples: Tensor, gain: _Gain | None) -> Tensor:
        if gain == "keep":
            return samples
        if gain == "zero":
            return torch.zeros_like(samples)
        fade = self._fade_in if gain == "fade in" else self._fade_in.flip(0)
        return samples * fade.to(samples.device)


def frame_size(sample_rate: int) -> int:
    """Return the samples of a frame."""
    return max(1, round(_FRAME_SECONDS * sample_rate))


def find_first(sample_rate: int, start: int) -> int:
    """Return the first sample, of a whole frame, that the gains from `start` on depend on."""
    frames = start // frame_size(sample_rate) - int(_HOLD_SECONDS / _FRAME_SECONDS) - 3
    return max(0, frames) * frame_size(sample_rate)


def _energy(samples: Tensor, size: int) -> Tensor:
    """Return the energy of each frame, without its mean: (..., C, t) -> (..., t / size)."""
    frames = samples.double().unflatten(-1, (-1, size))
    energy: Tensor = frames.var(dim=-1, correction=0).mean(dim=-2)
    return energy
