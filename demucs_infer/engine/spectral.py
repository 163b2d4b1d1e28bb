"""Combine the stems of several networks bin by bin of their spectra, block by block.

Shapes: N networks, C channels, t samples of a block; `...` any other axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOP = 1024
FRAME = 2 * HOP
"""Samples of a frame, under a Hann window, as in the ensembles of other tools."""


def find_first(start: int) -> int:
    """Return the first sample, where a hop begins, that the results from `start` on depend on."""
    return max(0, start // HOP - 1) * HOP


class SpectralChoice:
    """For each bin of each frame, the value of smallest or largest magnitude of all networks.

    Frames are counted from the start of the track and transformed one by one, so that the bytes of
    the result do not depend on how it is cut into blocks. Silence precedes and follows the track.
    """

    def __init__(self, *, smallest: bool, start: int, length: int) -> None:
        self.start = start
        """First sample that `push` has not returned yet; without a frame around it, if not 0."""
        self._smallest = smallest
        self._length = length
        self._end = start
        self._samples: Tensor | None = None
        """Of the next frame on, (N, ..., C, t)."""
        self._overlap: Tensor | None = None
        """Second half of the last frame, (..., C, HOP)."""

    def push(self, values: Tensor) -> Tensor:
        """Add the next samples (N, ..., C, t), and return those that are final, (..., C, t)."""
        before = values.new_zeros(*values.shape[:-1], HOP)
        samples = torch.cat([before if self._samples is None else self._samples, values], dim=-1)
        self._end += values.shape[-1]
        if self._end == self._length:  # fill the last hop, and add one
            after = values.new_zeros(*values.shape[:-1], -self._end % HOP + HOP)
            samples = torch.cat([samples, after], dim=-1)
        window = torch.hann_window(FRAME, device=values.device)
        norm = window[:HOP].square() + window[HOP:].square()
        hops, at = [values[0, ..., :0]], 0
        while samples.shape[-1] - at >= FRAME:
            frame = samples[..., at : at + FRAME]
            wave = torch.fft.irfft(self._choose(torch.fft.rfft(frame * window)), FRAME) * window
            if self._overlap is not None:
                joined = (self._overlap + wave[..., :HOP]) / norm
                hops.append(joined if len(frame) > 1 else frame[0, ..., :HOP])
            self._overlap = wave[..., HOP:]
            at += HOP
        self._samples = samples[..., at:].clone()
        result = torch.cat(hops, dim=-1)[..., : self._length - self.start]
        self.start += result.shape[-1]
        return result

    def _choose(self, spectra: Tensor) -> Tensor:
        magnitudes = spectra.abs()
        index = magnitudes.argmin(dim=0) if self._smallest else magnitudes.argmax(dim=0)
        return spectra.gather(0, index[None])[0]
