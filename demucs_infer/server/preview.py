"""Read parts and waveforms of stems, both of finished ones and while they are being separated.

The page plays stems in parts of a few seconds, which need little memory and stay in step to the
sample. It would have to decode whole files completely.

Shapes: S stems, C channels, t samples.
"""

import io
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demucs_infer.audio.parts import read_part
from demucs_infer.audio.reader import AudioReader
from demucs_infer.audio.spool import count_frames, read_frames

PEAKS = 1200
"""Columns of a waveform."""

_READ_FRAMES = 1 << 18


class Preview(Protocol):
    """Stems that can be listened to."""

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the stems."""

    @property
    def sample_rate(self) -> int:
        """Samples per second."""

    @property
    def length(self) -> int:
        """Samples of the whole track; 0 if that is not known yet."""

    def count_frames(self) -> int:
        """Return the number of samples that can be read now."""

    def read(self, stem: str, start: int, stop: int) -> Tensor:
        """Return samples of a stem (C, t), fewer than requested if the rest is not there yet."""

    def measure(self, stem: str) -> "NDArray[np.float32]":
        """Return the peaks of all channels in each of `PEAKS` columns of the track."""


def measure_part(preview: Preview, stem: str, start: int, stop: int) -> "NDArray[np.float32]":
    """Return the peaks of all channels in each of `PEAKS` columns of a part of the track."""
    end = min(stop, preview.count_frames())
    starts = range(start, end, _READ_FRAMES)
    blocks = (preview.read(stem, at, min(at + _READ_FRAMES, end)) for at in starts)
    return _measure((block for block in blocks if block.shape[-1]), stop - start)


@dataclass(slots=True, eq=False)
class LivePreview:
    """The stems of a running job, before any gain against clipping."""

    folder: Path
    stems: tuple[str, ...]
    channels: int
    sample_rate: int
    length: int = 0

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.stems), self.channels

    def count_frames(self) -> int:
        """Return how many samples are separated."""
        try:
            return count_frames(self.folder, self._shape)
        except OSError:  # not begun, or finished meanwhile
            return 0

    def read(self, stem: str, start: int, stop: int) -> Tensor:
        """Return samples of a stem; raise `FileNotFoundError` if the job has just finished."""
        return read_frames(self.folder, self._shape, start, stop)[self.stems.index(stem)]

    def measure(self, stem: str) -> "NDArray[np.float32]":
        """Return the peaks of what is separated; later columns are 0."""
        available = self.count_frames()
        starts = range(0, available, _READ_FRAMES)
        blocks = (self.read(stem, start, start + _READ_FRAMES) for start in starts)
        return _measure(blocks, max(self.length, available))


@dataclass(frozen=True, slots=True, eq=False)
class FilePreview:
    """Finished stems in files."""

    files: dict[str, Path]
    sample_rate: int
    length: int

    @property
    def stems(self) -> tuple[str, ...]:
        """The names of the stems."""
        return tuple(self.files)

    def count_frames(self) -> int:
        """Return the length of the track, as all samples can be read."""
        return self.length

    def read(self, stem: str, start: int, stop: int) -> Tensor:
        """Return samples of a stem."""
        return read_part(self.files[stem], start, stop)

    def measure(self, stem: str) -> "NDArray[np.float32]":
        """Return the peaks of a stem; they are remembered, as the whole file is decoded."""
        path = self.files[stem]
        return _measure_file(path, path.stat().st_mtime_ns, self.length)


@lru_cache(maxsize=512)
def _measure_file(path: Path, _changed: int, length: int) -> "NDArray[np.float32]":
    return _measure(AudioReader(path).blocks(_READ_FRAMES), length)


def _measure(blocks: Iterator[Tensor], length: int) -> "NDArray[np.float32]":
    peaks, position = np.zeros(PEAKS, np.float32), 0
    edges = np.arange(PEAKS + 1) * max(length, 1) // PEAKS
    for block in blocks:
        loudest = block.abs().amax(0).numpy()
        first = min(int(np.searchsorted(edges, position, "right")) - 1, PEAKS - 1)
        last = int(np.searchsorted(edges, position + len(loudest), "left"))
        starts = np.maximum(edges[first : min(last, PEAKS)] - position, 0)
        # The last column may be longer than the track is declared to be.
        columns = slice(first, first + len(starts))
        np.maximum(peaks[columns], np.maximum.reduceat(loudest, starts), out=peaks[columns])
        position += len(loudest)
    return peaks


def encode_wav(samples: Tensor, sample_rate: int) -> bytes:
    """Return a wav file of 16 bits; samples above full scale are limited."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((max(samples.shape[0], 1), 2, sample_rate, 0, "NONE", ""))
        wav.writeframes(encode_pcm(samples))
    return file.getvalue()


def encode_pcm(samples: Tensor) -> bytes:
    """Return the samples of a wav file of 16 bits; those above full scale are limited."""
    scaled = (samples.T.clamp(-1, 1) * 32767).round().to(torch.int16)
    return scaled.contiguous().numpy().astype("<i2").tobytes()
