"""What a caller may hand in, as a track that the engine can read at the rate of a model.

Shapes: C channels, T samples of the track.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

from demucs_infer.audio.channels import ExtraChannels, Method, convert_audio
from demucs_infer.audio.formats import RATES
from demucs_infer.audio.reader import TrackReader
from demucs_infer.audio.source import Source
from demucs_infer.errors import AudioInputError

Samples: TypeAlias = Tensor | np.ndarray[Any, np.dtype[Any]]

MAX_CHANNELS = 64
"""No axis longer than this is taken for channels, which tells (T, C) from (C, T)."""

# Integers are fractions of the full scale of their own type, unsigned bytes around 128.
_FULL_SCALE = {torch.int16: 2.0**15, torch.int32: 2.0**31, torch.uint8: 2.0**7}


@dataclass(frozen=True, slots=True, eq=False)  # eq: tensors do not compare to a bool
class Audio:
    """Samples that never travel without their rate."""

    data: Samples
    """(C T), (T,), or (T C) where the shape leaves no doubt."""
    sample_rate: int
    """Samples per second."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", valid_rate(self.sample_rate))


def valid_rate(sample_rate: float) -> int:
    """A rate in whole hertz, whatever number type it comes in."""
    try:
        whole = int(sample_rate)
    except (TypeError, ValueError, OverflowError):
        raise AudioInputError(f"{sample_rate=!r} is not a number of samples per second") from None
    if whole != sample_rate or whole not in RATES:
        raise AudioInputError(
            f"{sample_rate=!r} must be a whole number of samples per second, "
            f"{RATES[0]} to {RATES[-1]}"
        )
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How a model hears a recording, and which part of it."""

    sample_rate: int
    channels: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    start_seconds: float = 0.0
    duration_seconds: float | None = None
    """None: to the end."""
    resampler: Method = "julius"
    extra_channels: ExtraChannels = "first"
    """What becomes of channels that the model does not take: see `audio.read.TrackReader`."""
    group: int = 0
    """Which pair of channels, where `extra_channels` is "pairs"."""
    strict: bool = False
    """A damaged file is an error, where it would be a warning."""

    def __post_init__(self) -> None:
        if not (isfinite(self.start_seconds) and self.start_seconds >= 0):
            raise AudioInputError(f"start_seconds = {self.start_seconds!r} must be 0 or more")
        if self.duration_seconds is not None and not self.duration_seconds > 0:
            raise AudioInputError(f"duration_seconds = {self.duration_seconds!r} must be above 0")

    def channels_from(self, channels: int) -> int:
        """How many channels to ask for: the engine itself mixes down for a model of one."""
        return channels if self.channels == 1 else self.channels

    def part(self, wav: Tensor, sample_rate: int) -> Tensor:
        """The samples (C T) between start and end."""
        start, stop = round(self.start_seconds * sample_rate), wav.shape[-1]
        if self.duration_seconds is not None and isfinite(self.duration_seconds):
            stop = min(stop, start + max(round(self.duration_seconds * sample_rate), 1))
        if start >= stop:
            raise AudioInputError(
                f"start_seconds = {self.start_seconds!r} is behind the end of the audio"
            )
        return wav[:, start:stop]


class ArraySource:
    """An array as a track: converted as a whole, in memory of its own."""

    name = "track"
    path = None
    tags: Mapping[str, str] = {}
    cover = None

    def __init__(self, wav: Tensor, sample_rate: int, hearing: ReadOptions) -> None:
        self.hearing = hearing
        self.num_channels = wav.shape[0]
        self.sample_rate = sample_rate
        wav = hearing.part(wav, sample_rate)
        self.frames = wav.shape[-1]
        self.channels = hearing.channels_from(self.num_channels)
        wav = convert_audio(wav, sample_rate, hearing.sample_rate, self.channels)
        if wav.shape[-1] == 0:
            raise AudioInputError(
                f"{self.frames} samples at {sample_rate} Hz are less than one at "
                f"{hearing.sample_rate} Hz; pass more"
            )
        self._wav = wav.contiguous().to(hearing.device)
        self.length = wav.shape[-1]

    def blocks(self) -> Iterator[Tensor]:
        """All of it, as one block."""
        yield self._wav

    @property
    def warnings(self) -> tuple[str, ...]:
        """Channels that are left out."""
        if self.num_channels <= self.channels:
            return ()
        return (f"the audio has {self.num_channels} channels: the first {self.channels} are used",)


class FileSource:
    """A file as a track: decoded anew every time it is read, and never held whole."""

    def __init__(self, source: Source, hearing: ReadOptions) -> None:
        self.hearing = hearing
        self._track = TrackReader(
            source,
            sample_rate=hearing.sample_rate,
            channels=None if hearing.channels == 1 else hearing.channels,
            start_seconds=hearing.start_seconds,
            duration_seconds=hearing.duration_seconds,
            resampler=hearing.resampler,
            extra_channels=hearing.extra_channels,
            group=hearing.group,
            strict=hearing.strict,
        )
        self._device = hearing.device
        info = self._track.info
        self.num_channels = info.channels
        self.sample_rate = info.sample_rate
        self.tags = info.tags
        self.cover = info.cover
        self.path = Path(source) if isinstance(source, str | os.PathLike) else None
        name = self.path or getattr(source, "name", None)
        self.name = Path(name).name if isinstance(name, str | os.PathLike) else "track"

    @property
    def channels(self) -> int:
        return self._track.channels

    @property
    def length(self) -> int | None:
        return self._track.frames

    @property
    def frames(self) -> int | None:
        return self._track.reader.frames

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._track.warnings

    def blocks(self) -> Iterator[Tensor]:
        """From the first sample on."""
        for block in self._track.blocks():
            yield block.to(self._device)


AudioSource: TypeAlias = ArraySource | FileSource
"""A track for the engine, at the rate and with the channels of a model, and where it is from.

`channels` and `length` are as the engine reads it, `num_channels`, `sample_rate` and `frames` as
it came in. Lengths and `warnings` are complete when it has been read once.
"""

AudioInput: TypeAlias = Audio | Samples | Source | AudioSource
"""A path, the bytes of a file, an open file, an array, an array with its rate, or a recording."""


def open_audio(
    audio: AudioInput, sample_rate: float | None = None, *, hearing: ReadOptions
) -> AudioSource:
    """Ready to be read at the rate of a model; arrays are checked and copied here."""
    if isinstance(audio, ArraySource | FileSource):
        if sample_rate is not None:
            raise AudioInputError(f"{sample_rate=} is for arrays; a recording knows its own")
        theirs, ours = (
            f"{one.channels} channels at {one.sample_rate} Hz" for one in (audio.hearing, hearing)
        )
        if theirs != ours:
            raise AudioInputError(f"a recording for a model of {theirs}, and this one takes {ours}")
        return audio
    if isinstance(audio, Audio):
        if sample_rate is not None and sample_rate != audio.sample_rate:
            raise AudioInputError(f"{sample_rate=}, but the audio says {audio.sample_rate}")
        return ArraySource(samples(audio.data), audio.sample_rate, hearing)
    if isinstance(audio, Tensor | np.ndarray) or not is_file(audio):
        rate = hearing.sample_rate if sample_rate is None else valid_rate(sample_rate)
        return ArraySource(samples(audio), rate, hearing)
    if sample_rate is not None:
        raise AudioInputError(f"{sample_rate=} is for arrays; a file says its own")
    return FileSource(audio, hearing)


def is_file(audio: object) -> TypeGuard[Source]:
    """Whether `audio` is for a decoder: a path, the bytes of a file, or an open one."""
    kinds = (str, os.PathLike, bytes, bytearray, memoryview)
    return isinstance(audio, kinds) or hasattr(audio, "read")


def samples(data: object) -> Tensor:
    """Any array of sound as float32 in memory of its own: -> (C T)."""
    wav = _tensor(data)
    if wav.numel() == 0:
        raise AudioInputError("the audio is empty; pass at least one sample")
    wav = _float32(_channels_first(wav))
    if not torch.isfinite(torch.stack(torch.aminmax(wav))).all():
        raise AudioInputError(
            "the audio holds NaN or infinite samples; repair it first, "
            "for example with torch.nan_to_num(audio)"
        )
    return wav


def _tensor(data: object) -> Tensor:
    if isinstance(data, Tensor):
        return data.detach()
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "fiu":
            raise AudioInputError(f"{data.dtype} samples; pass float, int16, int32 or uint8")
        # torch takes neither foreign byte orders, nor negative strides, nor read-only memory
        return torch.from_numpy(np.require(data, data.dtype.newbyteorder("="), ["C", "W"]))
    raise AudioInputError(
        f"cannot read audio from {type(data).__name__}; pass a path, bytes, a binary file "
        "object, a numpy array, a torch tensor or Audio(data, sample_rate)"
    )


def _channels_first(wav: Tensor) -> Tensor:
    """(C T), (T,) or (T C) -> (C T)."""
    if wav.ndim == 1:
        return wav[None]
    shape = tuple(wav.shape)
    if wav.ndim != 2:
        hint = " (separate the items of a batch one by one)" if wav.ndim == 3 else ""
        raise AudioInputError(
            f"audio of shape {shape}; pass (channels, samples) or (samples,){hint}"
        )
    if 1 <= shape[0] <= MAX_CHANNELS:
        return wav
    if shape[0] > MAX_CHANNELS and 1 <= shape[1] <= MAX_CHANNELS:
        return wav.T
    raise AudioInputError(
        f"audio of shape {shape} has no axis of 1 to {MAX_CHANNELS} channels; "
        "pass (channels, samples)"
    )


def _float32(wav: Tensor) -> Tensor:
    """Full scale at ±1, in memory that nobody else holds."""
    if wav.is_floating_point():
        return wav.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    scale = _FULL_SCALE.get(wav.dtype)
    if scale is None:
        kind = str(wav.dtype).removeprefix("torch.")
        raise AudioInputError(
            f"{kind} samples have no agreed full scale; pass float, int16 or int32"
        )
    centre = scale if wav.dtype is torch.uint8 else 0.0
    return (wav.to(torch.float32).contiguous() - centre) / scale
