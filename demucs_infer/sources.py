"""Convert the inputs that callers pass into tracks at the sample rate of a model.

Shapes: C channels, T samples of the track.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

from demucs_infer.audio.channels import convert_audio
from demucs_infer.audio.formats import RATES
from demucs_infer.audio.reader import TrackReader
from demucs_infer.audio.source import Source
from demucs_infer.errors import AudioInputError
from demucs_infer.options import InputOptions

Samples: TypeAlias = Tensor | np.ndarray[Any, np.dtype[Any]]

# Never opened: a service passes on the bytes of its clients, who could then name its own files.
_PATH_AS_BYTES = re.compile(rb"[^\0\r\n]{1,4096}\.[A-Za-z][A-Za-z0-9]{1,4}")

MAX_CHANNELS = 64
"""Most channels of an array: a longer axis is time, which tells (T, C) from (C, T)."""

# Surround sound, whose first two channels are left and right. Other numbers of channels are not
# dropped: they are something else, or a mistake.
_LAYOUTS = frozenset({3, 4, 5, 6, 8})

# Integers are fractions of the full scale of their type; unsigned bytes are centered at 128.
_FULL_SCALE = {torch.int16: 2.0**15, torch.int32: 2.0**31, torch.uint8: 2.0**7}


@dataclass(frozen=True, slots=True, eq=False)  # comparing tensors gives no bool
class Audio:
    """Samples together with their sample rate."""

    data: Samples
    """(C, T), (T,), or (T, C) if the shape is unambiguous."""
    sample_rate: int
    """Samples per second, a whole number."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", parse_sample_rate(self.sample_rate))


def parse_sample_rate(sample_rate: float) -> int:
    """Return a sample rate of any number type as an integer.

    Raises:
        AudioInputError: `sample_rate` is not a whole number in the supported range.
    """
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
class ReadFormat:
    """The sample rate, channels and device that a model needs for its input."""

    sample_rate: int
    channels: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def channels_from(self, channels: int) -> int:
        """Return how many of `channels` to read: all for a mono model, which gets their mean."""
        return channels if self.channels == 1 else self.channels


def cut_part(wav: Tensor, sample_rate: int, options: InputOptions) -> Tensor:
    """Return the requested part of the samples (C, T).

    Raises:
        AudioInputError: The part begins after the end of the audio.
    """
    start, stop = round(options.start * sample_rate), wav.shape[-1]
    if options.duration is not None:
        stop = min(stop, start + max(round(options.duration * sample_rate), 1))
    if start >= stop:
        seconds = wav.shape[-1] / sample_rate
        raise AudioInputError(
            f"start = {options.start!r} is after the end of the audio, which has {seconds:.2f} s"
        )
    return wav[:, start:stop]


class ArraySource:
    """A track from an array, which is copied and converted as a whole."""

    name = "track"
    path = None
    tags: Mapping[str, str] = {}
    cover = None
    bits = None
    is_float = False

    def __init__(
        self, wav: Tensor, sample_rate: int, read_format: ReadFormat, options: InputOptions
    ) -> None:
        self.read_format = read_format
        self.num_channels = wav.shape[0]
        self.sample_rate = sample_rate
        wav = _choose_channels(cut_part(wav, sample_rate, options), read_format.channels, options)
        self._has_dropped = wav.shape[0] > read_format.channels > 1
        self.frames = wav.shape[-1]
        self.channels = read_format.channels_from(wav.shape[0])
        wav = convert_audio(wav, sample_rate, read_format.sample_rate, self.channels)
        if wav.shape[-1] == 0:
            raise AudioInputError(
                f"{self.frames} samples at {sample_rate} Hz are less than one sample at "
                f"{read_format.sample_rate} Hz; pass more samples"
            )
        self._wav = wav.contiguous().to(read_format.device)
        self.length = wav.shape[-1]

    def blocks(self) -> Iterator[Tensor]:
        """Yield all samples as one block."""
        yield self._wav

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning about channels that are not used."""
        if not self._has_dropped:
            return ()
        return (f"the audio has {self.num_channels} channels: the first {self.channels} are used",)


def _choose_channels(wav: Tensor, channels: int, options: InputOptions) -> Tensor:
    """Return the channels (C, T) of an array that a model with `channels` is to read.

    Raises:
        AudioInputError: It has more of them, and they are not to be dropped.
    """
    count = wav.shape[0]
    if count <= channels or channels == 1:
        return wav
    if options.extra_channels == "pairs":
        groups = -(-count // channels)
        if options.group >= groups:
            raise AudioInputError(f"group = {options.group} must be 0 to {groups - 1}")
        return wav[options.group * channels :][:channels]
    if options.extra_channels == "error" or count not in _LAYOUTS:
        raise AudioInputError(
            f"the audio has {count} channels, expected {channels} at most: pass those to use, "
            f"such as audio[:{channels}], or extra_channels='pairs' to open_audio"
        )
    return wav


class FileSource:
    """A track from a file, which is decoded block by block each time the track is read."""

    def __init__(self, source: Source, read_format: ReadFormat, options: InputOptions) -> None:
        self.read_format = read_format
        channels = None if read_format.channels == 1 else read_format.channels
        self._track = open_track(source, read_format.sample_rate, channels, options)
        self._device = read_format.device
        info = self._track.info
        self.num_channels = info.channels
        self.sample_rate = info.sample_rate
        self.tags = info.tags
        self.cover = info.cover
        self.bits = info.bits
        self.is_float = info.is_float
        self.path = Path(source) if isinstance(source, str | os.PathLike) else None
        name = self.path or getattr(source, "name", None)
        self.name = Path(name).name if isinstance(name, str | os.PathLike) else "track"

    @property
    def channels(self) -> int:
        """Channels that the engine reads."""
        return self._track.channels

    @property
    def length(self) -> int | None:
        """Number of samples at the sample rate of the model; None if unknown."""
        return self._track.frames

    @property
    def frames(self) -> int | None:
        """Number of samples of the file; None if unknown."""
        return self._track.reader.frames

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems of the file that are not errors."""
        return self._track.warnings

    def blocks(self) -> Iterator[Tensor]:
        """Yield blocks (C, T) of samples, from the first one."""
        for block in self._track.blocks():
            yield block.to(self._device)


AudioSource: TypeAlias = ArraySource | FileSource
"""A track for the engine, at the sample rate and with the channels of a model.

`channels` and `length` are those that the engine reads; `num_channels`, `sample_rate` and `frames`
those of the input. Lengths and `warnings` are known after the track has been read once.
"""

AudioInput: TypeAlias = Audio | Samples | Source | AudioSource
"""A path, the bytes of a file, an open file, an array, `Audio`, or an opened source."""


def open_track(
    source: Source, sample_rate: int, channels: int | None, options: InputOptions
) -> TrackReader:
    """Open a file as a track at the sample rate, and with the channels, of a model."""
    return TrackReader(
        source,
        sample_rate=sample_rate,
        channels=channels,
        start_seconds=options.start,
        duration_seconds=options.duration,
        resampler=options.resampler,
        extra_channels=options.extra_channels,
        group=options.group,
        strict=options.strict,
    )


def open_audio(
    audio: AudioInput,
    sample_rate: float | None,
    read_format: ReadFormat,
    options: InputOptions,
) -> AudioSource:
    """Open any input as a track for a model; arrays are checked and copied.

    Raises:
        AudioInputError: `audio` is not valid, or `sample_rate` contradicts it.
    """
    if isinstance(audio, ArraySource | FileSource):
        if sample_rate is not None:
            raise AudioInputError(
                f"{sample_rate=} is only for arrays; an opened source has its own"
            )
        opened, required = (
            f"{model.channels} channels at {model.sample_rate} Hz"
            for model in (audio.read_format, read_format)
        )
        if opened != required:
            raise AudioInputError(
                f"the audio was opened for a model of {opened}; this model needs {required}"
            )
        return audio
    if isinstance(audio, Audio):
        if sample_rate is not None and sample_rate != audio.sample_rate:
            raise AudioInputError(f"{sample_rate=}, but the audio is at {audio.sample_rate} Hz")
        return ArraySource(to_samples(audio.data), audio.sample_rate, read_format, options)
    if isinstance(audio, Tensor | np.ndarray) or not is_file(audio):
        rate = read_format.sample_rate if sample_rate is None else parse_sample_rate(sample_rate)
        return ArraySource(to_samples(audio), rate, read_format, options)
    if sample_rate is not None:
        raise AudioInputError(f"{sample_rate=} is only for arrays; a file has its own")
    if isinstance(audio, bytes) and _PATH_AS_BYTES.fullmatch(audio):
        raise AudioInputError(
            f"{audio!r} is a path, but bytes are the content of a file: pass os.fsdecode(path)"
        )
    return FileSource(audio, read_format, options)


def is_file(audio: object) -> TypeGuard[Source]:
    """Return whether `audio` is a file to decode: a path, the bytes of a file, or an open file."""
    kinds = (str, os.PathLike, bytes, bytearray, memoryview)
    return isinstance(audio, kinds) or hasattr(audio, "read")


def to_samples(data: object) -> Tensor:
    """Convert samples (floats or integers) of an array or tensor to a new float32 tensor (C, T).

    Raises:
        AudioInputError: `data` is empty, not finite, or of an unsupported type or shape.
    """
    wav = _tensor(data)
    if wav.numel() == 0:
        raise AudioInputError("the audio is empty; pass at least one sample")
    wav = _float32(_channels_first(wav))
    if not torch.isfinite(torch.stack(torch.aminmax(wav))).all():
        raise AudioInputError(
            "the audio has NaN or infinite samples; repair it first, "
            "for example with torch.nan_to_num(audio)"
        )
    return wav


def _tensor(data: object) -> Tensor:
    if isinstance(data, Tensor):
        return data.detach()
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "fiu":
            raise AudioInputError(
                f"unsupported sample type {data.dtype}: pass float, int16, int32 or uint8"
            )
        # torch supports neither other byte orders, nor negative strides, nor read-only memory
        return torch.from_numpy(np.require(data, data.dtype.newbyteorder("="), ["C", "W"]))
    raise AudioInputError(
        f"cannot read audio from {type(data).__name__}: pass a path, bytes, a binary file "
        "object, a numpy array, a torch tensor or Audio(data, sample_rate)"
    )


def _channels_first(wav: Tensor) -> Tensor:
    """Arrange (C, T), (T,) or (T, C) as (C, T)."""
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
    """Convert to float32 with full scale at ±1, in new memory."""
    if wav.is_floating_point():
        return wav.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    scale = _FULL_SCALE.get(wav.dtype)
    if scale is None:
        kind = str(wav.dtype).removeprefix("torch.")
        raise AudioInputError(f"unsupported sample type {kind}: pass float, int16, int32 or uint8")
    center = scale if wav.dtype is torch.uint8 else 0.0
    return (wav.to(torch.float32).contiguous() - center) / scale
