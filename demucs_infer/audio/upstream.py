"""Offer the functions of upstream's `demucs.audio` for which this package has others.

Shapes: S streams, C channels, T samples. Samples are floats with full scale 1, or int16.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demucs_infer.audio.channels import convert_channels, require_tensor
from demucs_infer.audio.encoders.base import pieces
from demucs_infer.audio.formats import FORMATS, format_of, nearest_bitrate
from demucs_infer.audio.reader import AudioInfo, AudioReader, StartBeyondEnd, probe
from demucs_infer.audio.resample import resample
from demucs_infer.audio.writer import AudioWriter
from demucs_infer.errors import AudioReadError

_INT16_MAX = 2**15 - 1
_CONTEXT_SECONDS = 0.1
"""Seconds to read beyond the requested end, as context for the resampler."""


class UnreadableFile(AudioReadError, CalledProcessError):
    """A file that `AudioFile` cannot read; also the error of upstream's ffprobe and ffmpeg."""

    def __init__(self, message: str, path: str) -> None:
        Exception.__init__(self, message, path)  # the arguments, for pickle
        self.returncode, self.cmd = 1, ["ffmpeg", "-i", path]
        self.output = self.stderr = None

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableFile:
        raise
    except AudioReadError as error:
        raise UnreadableFile(str(error), str(path)) from error


class AudioFile:
    """An audio file with one or more streams.

    Audio is resampled by this package; upstream uses the ffmpeg program.
    """

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None:
        self.path = Path(os.fsdecode(path))

    def __len__(self) -> int:
        return self._probe.num_streams

    def __repr__(self) -> str:
        return (
            f"AudioFile(path={self.path}, samplerate={self.samplerate()}, "
            f"channels={self.channels()}, streams={len(self)})"
        )

    @property
    def _audio_streams(self) -> list[int]:
        return list(range(len(self)))  # other streams are not in `info`

    @cached_property
    def _probe(self) -> AudioInfo:
        with _translate_errors(self.path):
            return probe(self.path)

    def _stream(self, index: int) -> AudioInfo:
        """Read the headers of one stream; a negative index counts from the end."""
        with _translate_errors(self.path):
            return AudioReader(self.path, stream=range(len(self))[index]).info

    @cached_property
    def info(self) -> dict[str, Any]:
        """Properties of the file as ffprobe returns them: `format` and the audio `streams`."""
        streams = [
            {
                "index": index,
                "codec_name": stream.codec,
                "codec_type": "audio",
                "sample_rate": str(stream.sample_rate),
                "channels": stream.channels,
            }
            for index, stream in enumerate(map(self._stream, range(len(self))))
        ]
        container: dict[str, Any] = {
            "filename": str(self.path),
            "nb_streams": len(streams),
            "format_name": self._probe.container,
            "tags": dict(self._probe.tags),
        }
        if self._probe.duration_seconds is not None:
            container["duration"] = str(self._probe.duration_seconds)
        return {"streams": streams, "format": container}

    @property
    def duration(self) -> float:
        """Length in seconds; NaN if the file does not declare it."""
        seconds = self._probe.duration_seconds
        return math.nan if seconds is None else seconds

    def channels(self, stream: int = 0) -> int:
        """Return the number of channels of a stream."""
        return self._stream(stream).channels

    def samplerate(self, stream: int = 0) -> int:
        """Return the sample rate of a stream."""
        return self._stream(stream).sample_rate

    def read(
        self,
        seek_time: float | None = None,
        duration: float | None = None,
        streams: slice | int | list[int] = slice(None),
        samplerate: int | None = None,
        channels: int | None = None,
    ) -> Tensor:
        """Read samples of the streams: (C, T) if `streams` is a number, else (S, C, T).

        With `duration`, the result has at most `int(rate * duration)` samples, where the rate
        is `samplerate`, or that of the file; none if `seek_time` is beyond the end.

        Raises:
            AudioReadError: The file cannot be read; also a `subprocess.CalledProcessError`.
        """
        indices = np.arange(len(self))[streams]
        length = None if duration is None else int((samplerate or self.samplerate()) * duration)
        if indices.ndim == 0:
            return self._read(int(indices), seek_time, length, samplerate, channels)
        read = [self._read(index, seek_time, length, samplerate, channels) for index in indices]
        return torch.stack(read)

    def _read(
        self,
        index: int,
        seek_time: float | None,
        length: int | None,
        samplerate: int | None,
        channels: int | None,
    ) -> Tensor:
        duration = None
        if length is not None:
            duration = length / (samplerate or self.samplerate()) + _CONTEXT_SECONDS
        with _translate_errors(self.path):
            reader = AudioReader(
                self.path,
                start_seconds=seek_time or 0.0,
                duration_seconds=duration,
                stream=int(index),
            )
            try:
                wav = torch.cat(list(reader.blocks()), dim=-1)
            except StartBeyondEnd:
                return torch.empty(channels or reader.info.channels, 0)
        if channels is not None:
            wav = convert_channels(wav, channels)
        rate = reader.info.sample_rate
        return resample(wav, rate, samplerate or rate)[..., :length]


def convert_audio_channels(wav: Tensor, channels: int = 2) -> Tensor:
    """Convert the number of channels: (..., C, T) -> (..., channels, T).

    Raises:
        ValueError: `wav` has two or more channels, but fewer than requested.
    """
    return convert_channels(wav, channels)


def i16_pcm(wav: Tensor) -> Tensor:
    """Convert floats to int16, clamped to full scale; return integers unchanged."""
    require_tensor(wav)
    if not wav.is_floating_point():
        return wav
    return (wav.clamp(-1, 1) * _INT16_MAX).short()


def f32_pcm(wav: Tensor) -> Tensor:
    """Convert int16 to float32; return floats unchanged."""
    require_tensor(wav)
    return wav if wav.is_floating_point() else wav.float() / _INT16_MAX


def as_dtype_pcm(wav: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001 (upstream's signature)
    """Return floats and integers unchanged: upstream ignores `dtype`."""
    return f32_pcm(wav) if wav.is_floating_point() else i16_pcm(wav)


def encode_mp3(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int = 44100,
    bitrate: int = 320,
    quality: int = 2,
    verbose: bool = False,  # noqa: ARG001 (upstream's signature; the encoder is always silent)
) -> None:
    """Write a track (C, T), floats or int16, as MP3; `quality` is 2 (best) to 7 (fastest).

    `bitrate` is in kbit/s; if it does not exist, the nearest is taken, as LAME does.

    Raises:
        AudioWriteError: The file cannot be written.
    """
    floats = wav.clamp(-1, 1) if wav.is_floating_point() else wav.float() / (_INT16_MAX + 1)
    kind = FORMATS["mp3"]
    bitrate = nearest_bitrate(kind, bitrate, kind.rate_for(samplerate), len(wav))
    with AudioWriter(
        path, samplerate, len(wav), format="mp3", bitrate=bitrate, preset=quality
    ) as out:
        for piece in pieces(floats):
            out.write(piece)


def encode_wav(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int,
    bits_per_sample: int = 16,
    as_float: bool = False,
) -> None:
    """Write a track (C, T) as WAV, clamped to full scale: 16 or 24 bits, or 32-bit floats.

    Raises:
        AudioWriteError: The file cannot be written.
        ValueError: `bits_per_sample` is neither 16 nor 24.
    """
    if not as_float and bits_per_sample not in (16, 24):
        raise ValueError(f"{bits_per_sample = } must be 16 or 24, or as_float must be True")
    bits = 32 if as_float else bits_per_sample
    with AudioWriter(path, samplerate, len(wav), format="wav", bits=bits) as out:
        for piece in pieces(wav.clamp(-1, 1)):
            out.write(piece)


def encode_ffmpeg(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int,
    bits_per_sample: int = 16,
) -> None:
    """Write a track (C, T), clamped to full scale, in the format of the suffix of `path`.

    No ffmpeg program is needed.

    Raises:
        AudioWriteError: The suffix is unknown, or the file cannot be written.
    """
    kind = FORMATS[format_of(Path(path))]
    with AudioWriter(
        path, samplerate, len(wav), bits=bits_per_sample if kind.depths else None
    ) as out:
        for piece in pieces(wav.clamp(-1, 1)):
            out.write(piece)
