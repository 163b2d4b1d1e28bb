"""Read audio files block by block, sample-accurately, and report damage.

Shapes: C channels, T samples of the track, t samples of a block.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from av.audio.layout import AudioLayout
from av.audio.stream import AudioStream
from av.container import InputContainer
from torch import Tensor

from demucs_infer.audio import container_headers
from demucs_infer.audio.blocks import reblock
from demucs_infer.audio.channels import ExtraChannels, convert_channels, downmix_weights
from demucs_infer.audio.decode import (
    Damage,
    Decoder,
    Samples,
    check_stream,
    choose_stream,
    open_container,
    read_cover,
    sample_bytes,
    to_float,
)
from demucs_infer.audio.resample import StreamResampler
from demucs_infer.audio.source import ReopenableFile, Source
from demucs_infer.errors import AudioReadError
from demucs_infer.options import Resampler

BLOCK = 65536
"""Default length of a block in samples."""
_MAX_PACKET = 8192
"""Samples; no packet of Vorbis, Opus or ALAC is longer."""
_MP3_FRAME = 1152
"""Samples of an MP3 frame. Decoding one needs the frame before, which may have been cut off."""
_MP3_DELAY = 529
"""Samples by which an MP3 decoder is late."""
_MAX_COVER_BYTES = 1 << 24
_MAX_TAG_LENGTH = 1 << 16
_WITH_SAMPLE_COUNT = {"wav", "w64", "aiff", "au", "flac", "tta", "wv", "mp3", "mov", "caf"}
"""Containers whose header has the number of samples; others have an estimate or milliseconds."""
_FOR_PCM = {"wav", "w64", "aiff", "au", "caf"}
"""Containers made for uncompressed samples."""
_WITHOUT_LENGTH = {"aac", "ac3", "eac3", "dts", "mpeg", "mpegts", "loas", "truehd", "amr", "avi"}
"""Containers without a length: FFmpeg estimates it from the bit rate."""


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """Properties of an audio file according to its headers."""

    duration_seconds: float | None
    frames: int | None
    """Number of samples per channel, if the file declares it exactly."""
    sample_rate: int
    channels: int
    bits: int | None
    """Bits of a sample; None if the format is lossy."""
    is_float: bool
    codec: str
    container: str
    layout: tuple[str, ...] = ()
    """FFmpeg's names of the channels, such as FL and FR; empty if they are unknown."""
    num_streams: int = 1
    """Number of audio streams in the file; only one is read."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags by lower-case name: title, artist, album, track, date, comment and others."""
    cover: bytes | None = field(default=None, repr=False)
    """The attached picture."""
    cover_mime: str | None = None


def probe(source: Source) -> AudioInfo:
    """Read the headers of an audio file.

    Raises:
        AudioReadError: `source` is not a readable audio file.
    """
    return AudioReader(source).info


class StartBeyondEnd(AudioReadError):
    """The requested start is beyond the end of the audio."""


class AudioReader:
    """Reads one audio stream, or a part of it, from a path, bytes or a file object.

    Each call of `blocks` decodes the stream from the beginning. Afterwards `warnings` lists its
    damage, such as a missing end, and `frames` is its length in samples. With `strict`, damage
    raises an `AudioReadError` instead.
    """

    def __init__(
        self,
        source: Source,
        *,
        start_seconds: float = 0.0,
        duration_seconds: float | None = None,
        strict: bool = False,
        stream: int | None = None,
    ) -> None:
        if not 0 <= start_seconds < float("inf"):
            raise ValueError(f"{start_seconds = } must be 0 or more")
        if duration_seconds is not None and not duration_seconds > 0:
            raise ValueError(f"{duration_seconds = } must be more than 0")
        self._input = ReopenableFile(source)
        self._stream_index = stream
        self._strict = strict
        self._declared: _DeclaredLength
        with self._open() as (container, chosen):
            self._declared = _read_declared_length(container, chosen, self._input)
            self.info = _read_info(container, chosen, self._declared)
        rate = self.info.sample_rate
        self._start = round(start_seconds * rate)
        self._stop = None
        if duration_seconds is not None and duration_seconds < float("inf"):
            self._stop = self._start + max(round(duration_seconds * rate), 1)
        self.name = self._input.name
        self.frames: int | None = None
        self.warnings: tuple[str, ...] = ()

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, AudioStream]]:
        name = self._input.name
        with open_container(self._input.open(), name) as container:
            stream = choose_stream(container, name, self._stream_index)
            check_stream(stream, name)
            yield container, stream

    def blocks(self, frames: int = BLOCK) -> Iterator[Tensor]:
        """Yield the samples as float32 blocks (C, t) of `frames`, the last one shorter.

        Raises:
            AudioReadError: There are no samples to read, or with `strict`, the file is damaged.
        """
        if not frames >= 1:
            raise ValueError(f"{frames = } must be at least 1")
        self.frames, self.warnings = None, ()
        count = 0
        integrity = _Integrity(self.name, self.info.sample_rate, self._strict)
        with self._open() as (container, stream):
            decoder = Decoder(container, stream, self.name)
            decoded = _crop(self._trim_padding(decoder), self._start, self._stop)
            for block in reblock(to_float(decoded), frames):
                yield integrity.replace_non_finite(block, self._start + count)
                count += block.shape[-1]
        is_complete = self._stop is None or decoder.count < self._stop
        integrity.check_damage(decoder.damage)
        if is_complete:
            integrity.check_length(decoder.count, self._declared)
        if not count:
            kind = StartBeyondEnd if decoder.count else AudioReadError
            raise kind(self._describe_emptiness(decoder.count))
        self.frames = count
        self.warnings = (*self._stream_warnings(), *integrity.warnings)

    def _trim_padding(self, decoder: Decoder) -> Iterator[Samples]:
        """Yield the decoded frames without the padding that the file declares at its end."""
        last: Samples | None = None
        for frame in decoder.frames():
            if last is not None:
                yield last
            last = frame
        if last is None:
            return
        if decoder.count == last.shape[-1] and self._declared.keeps_delay(decoder.count):
            last = last[:, _MP3_DELAY:]
            decoder.count -= _MP3_DELAY
        padding = self._declared.padding(decoder.count, last.shape[-1], decoder.last_duration)
        decoder.count -= padding
        yield last[:, : last.shape[-1] - padding]

    def _describe_emptiness(self, count: int) -> str:
        if count:
            rate = self.info.sample_rate
            return (
                f"{self.name} ends at {count / rate:.2f} s, before the requested start at "
                f"{self._start / rate:.10g} s"
            )
        return f"{self.name} contains no samples"

    def _stream_warnings(self) -> list[str]:
        count = self.info.num_streams
        if count == 1 or self._stream_index is not None:
            return []
        return [f"{self.name} has {count} audio streams: the default one was read"]


@dataclass(frozen=True, slots=True)
class _DeclaredLength:
    """How long a file should be according to its headers."""

    frames: int | None = None
    tolerance: int = 0
    """Samples by which an undamaged file may differ from `frames`."""
    seconds: float | None = None
    """The length to display; an estimate if the file does not count samples."""
    original_frames: int | None = None
    """Number of samples before encoding, from the tag `iTunSMPB`."""
    has_last_duration: bool = False
    """Whether the last packet's duration leaves out the padding, as in MP4."""
    end: int | None = None
    """Sample position of the end mark, not counting samples that players skip at the beginning."""
    is_exact: bool = False
    """Whether an undamaged file has exactly `frames` samples."""
    is_end_missing: bool = False
    """Whether the end mark is missing."""

    is_mp3: bool = False
    """Whether this is an MP3 file with the number of its frames."""

    def keeps_delay(self, count: int) -> bool:
        """Return whether the delay of the decoder is still in a file of one decoded frame.

        FFmpeg forgets that it has to skip samples of a frame of which it also drops the end.
        """
        return self.is_mp3 and self.frames is not None and count - self.frames == _MP3_DELAY

    def padding(self, count: int, last: int, last_duration: int | None) -> int:
        """Return how many samples at the end are padding, which is to be dropped.

        `count` samples were decoded, `last` of them in the last frame.
        """
        if self.end is not None and 0 <= count - self.end <= last:
            return count - self.end
        if not self.has_last_duration:
            return 0
        if self.original_frames is not None and 0 <= count - self.original_frames <= last:
            return count - self.original_frames
        padding = last - last_duration if last_duration and 0 < last_duration < last else 0
        # An edit list is only exact to a tick of the movie's time scale, often 1/600 s.
        if self.frames is not None and count - padding - self.frames > self.tolerance:
            padding = min(count - self.frames, last)
        return padding


def _read_declared_length(
    container: InputContainer, stream: AudioStream, source: ReopenableFile
) -> _DeclaredLength:
    kind = container.format.name.partition(",")[0]
    rate = int(stream.codec_context.sample_rate)
    seconds = container.duration / 1e6 if container.duration else None
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    if kind == "ogg":
        return _read_ogg_length(stream, source, seconds)
    if kind in _WITH_SAMPLE_COUNT and seconds is not None:
        return _read_sample_count(kind, container, stream, source, seconds)
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", str(stream.metadata.get("DURATION", "")))
    if tag:
        hours, minutes, rest = tag.groups()
        seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest)
    has_video = any(other.type == "video" for other in container.streams)
    if kind in _WITHOUT_LENGTH or seconds is None or (has_video and not tag):
        return _DeclaredLength(seconds=seconds)
    # The tag is in milliseconds, and gives the end of the audio, not of the last packet.
    end = math.ceil((seconds + 0.001) * rate) if tag else None
    return _DeclaredLength(round(seconds * rate), tolerance=rate // 10, seconds=seconds, end=end)


def _read_sample_count(
    kind: str,
    container: InputContainer,
    stream: AudioStream,
    source: ReopenableFile,
    seconds: float,
) -> _DeclaredLength:
    rate = int(stream.codec_context.sample_rate)
    frames = round(seconds * rate)
    if kind == "mov":
        original_frames = _read_itunes_frames(container)
        expected = frames if original_frames is None else original_frames
        # The length of a lossy stream is rounded to ticks of the movie's time scale.
        is_exact = original_frames is not None or _bits(stream) is not None
        return _DeclaredLength(
            expected,
            rate // 600 + 1,
            expected / rate,
            original_frames=original_frames,
            has_last_duration=True,
            is_exact=is_exact,
        )
    with contextlib.closing(source.open()) as file:
        if kind == "mp3" and not container_headers.has_frame_count(file):
            return _DeclaredLength(seconds=seconds)
        size = container_headers.read_data_size(file, kind)
    width = sample_bytes(stream.codec_context.name)
    if size is not None and width:
        frames = max(frames, size // (width * stream.codec_context.channels))
    tolerance = _MP3_FRAME if kind == "mp3" else 0  # a cut between frames loses half a frame
    if kind in _FOR_PCM and not width:
        tolerance = _MAX_PACKET  # compressed packets are counted whole
    elif kind == "w64":
        # Some writers include the padding to a multiple of eight bytes in the size.
        tolerance = 7 // (width * stream.codec_context.channels)
    is_mp3 = kind == "mp3"
    return _DeclaredLength(
        frames, tolerance, frames / rate, is_exact=is_mp3 or not tolerance, is_mp3=is_mp3
    )


def _read_ogg_length(
    stream: AudioStream, source: ReopenableFile, seconds: float | None
) -> _DeclaredLength:
    """Read the length from the last page, unless the stream was cut out of a longer one."""
    head = stream.codec_context.extradata or b""
    skipped = int.from_bytes(head[10:12], "little") if head.startswith(b"OpusHead") else 0
    rate = int(stream.codec_context.sample_rate)
    if seconds is not None:
        seconds = max(seconds - skipped / rate, 0.0)
    with contextlib.closing(source.open()) as file:
        end = container_headers.read_final_position(file)
    if end is None or seconds is None or abs(end - skipped - seconds * rate) > _MAX_PACKET:
        return _DeclaredLength(seconds=seconds, is_end_missing=end is None)
    return _DeclaredLength(end - skipped, _MAX_PACKET, seconds, end=end - skipped)


def _read_itunes_frames(container: InputContainer) -> int | None:
    """Read the number of samples before encoding, the fourth hex number of the tag `iTunSMPB`."""
    words = container.metadata.get("iTunSMPB", "").split()
    try:
        samples = int(words[3], 16)
    except (IndexError, ValueError):
        return None
    return samples if 0 < samples < 1 << 40 else None


def _read_info(
    container: InputContainer, stream: AudioStream, declared: _DeclaredLength
) -> AudioInfo:
    context = stream.codec_context
    cover = read_cover(container)
    if cover is not None and len(cover) > _MAX_COVER_BYTES:
        cover = None
    tags = {**stream.metadata, **container.metadata}
    return AudioInfo(
        duration_seconds=declared.seconds,
        frames=declared.frames if declared.is_exact else None,
        sample_rate=int(context.sample_rate),
        channels=int(context.channels),
        bits=_bits(stream),
        is_float=context.name.startswith("pcm_f"),
        codec=context.name,
        container=container.format.name.partition(",")[0],
        layout=_read_layout(context.layout),
        num_streams=len(container.streams.audio),
        tags={name.lower(): text for name, text in tags.items() if len(text) <= _MAX_TAG_LENGTH},
        cover=cover,
        cover_mime=_mime_type(cover),
    )


def _read_layout(layout: AudioLayout) -> tuple[str, ...]:
    """Return the names of the channels; () if the layout is only a number of channels."""
    if re.fullmatch(r"\d+ channels", layout.name):
        return ()
    return tuple(channel.name for channel in layout.channels)


def _mime_type(picture: bytes | None) -> str | None:
    types = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif"}
    if picture is None:
        return None
    return next((kind for mark, kind in types.items() if picture.startswith(mark)), None)


def _bits(stream: AudioStream) -> int | None:
    context = stream.codec_context
    if context.name in ("pcm_mulaw", "pcm_alaw"):
        return 16  # their eight bits are decoded to 16
    if context.name.startswith("pcm_"):
        return sample_bytes(context.name) * 8 or None
    head = context.extradata or b""
    if context.name == "flac" and len(head) >= 14:
        return ((head[12] & 1) << 4 | head[13] >> 4) + 1
    if context.name == "alac" and len(head) >= 18:
        return head[17]
    if context.name in ("wavpack", "tta", "ape", "shorten", "truehd", "mlp"):
        # `format` is None, despite its annotation, if FFmpeg cannot determine it.
        return int(getattr(context.format, "bits", 0)) or None
    return None


def _crop(frames: Iterator[Samples], start: int, stop: int | None) -> Iterator[Samples]:
    """Yield the samples [start, stop) of the stream; nothing is decoded beyond them."""
    position = 0
    for frame in frames:
        first, position = position, position + frame.shape[-1]
        end = position if stop is None else min(position, stop)
        if start <= first and end == position:
            yield frame
        elif end > start:
            yield frame[:, max(start - first, 0) : end - first]
        if stop is not None and position >= stop:
            return


class _Integrity:
    """Collects warnings about a damaged file; with `strict`, raises the first one."""

    def __init__(self, name: str, rate: int, strict: bool) -> None:
        self._name, self._rate, self._strict = name, rate, strict
        self.warnings: list[str] = []
        self._has_non_finite = False

    def _report(self, message: str) -> None:
        if self._strict:
            raise AudioReadError(
                f"{message}; repair it, download it again, or read it with strict=False"
            )
        self.warnings.append(message)

    def replace_non_finite(self, block: Tensor, start: int) -> Tensor:
        """Replace NaN and infinity by silence: a single NaN would spread to the whole track."""
        is_finite = torch.isfinite(block)
        if is_finite.all():
            return block
        if not self._has_non_finite:
            self._has_non_finite = True
            first = int((~is_finite).any(dim=0).nonzero()[0])
            self._report(
                f"{self._name} has samples that are not finite numbers, the first at "
                f"{(start + first) / self._rate:.4f} s (replaced by silence)"
            )
        return torch.where(is_finite, block, torch.zeros(()))

    def check_damage(self, damage: Damage) -> None:
        """Report what could not be decoded."""
        if damage.count:
            places = ", ".join(f"{place:.2f} s" for place in damage.places)
            more = " and later" if damage.count > len(damage.places) else ""
            self._report(
                f"{self._name} is damaged: decoding failed in {damage.count} "
                f"{'place' if damage.count == 1 else 'places'}, at {places}{more}"
            )
        if damage.is_truncated:
            self._report(f"{self._name} is damaged: the rest of it could not be read")

    def check_length(self, count: int, declared: _DeclaredLength) -> None:
        """Report a difference between the decoded and the declared length."""
        seconds = count / self._rate
        if declared.is_end_missing:
            self._report(f"{self._name} was cut off after {seconds:.2f} s: its end mark is missing")
        if declared.frames is None:
            return
        missing = declared.frames - count
        if missing > declared.tolerance:
            self._report(
                f"{self._name} was cut off: {missing / self._rate:.3f} seconds are missing at its "
                f"end (header: {declared.frames / self._rate:.3f} s, decoded: {seconds:.3f} s)"
            )
        elif missing < -max(declared.tolerance, self._rate // 4):
            self._report(
                f"{self._name} is {-missing / self._rate:.3f} seconds longer than "
                "declared in its header"
            )


class TrackReader:
    """Reads a track at the sample rate and with the channels that a network takes.

    If `sample_rate` or `channels` is None, the file's own is kept. `extra_channels` decides what
    happens if the file has more than `channels` channels: "mix" mixes surround sound down to stereo
    (or, for an unknown layout, uses the first channels); "first" uses the first channels, with a
    warning; "error" raises an `AudioReadError`; "pairs" splits all channels into `num_groups`
    groups of `channels` and treats each group as a separate track, selected by `group`.
    """

    def __init__(
        self,
        source: Source,
        *,
        sample_rate: int | None = None,
        channels: int | None = None,
        start_seconds: float = 0.0,
        duration_seconds: float | None = None,
        resampler: Resampler = "julius",
        extra_channels: ExtraChannels = "mix",
        group: int = 0,
        strict: bool = False,
    ) -> None:
        self.reader = AudioReader(
            source, start_seconds=start_seconds, duration_seconds=duration_seconds, strict=strict
        )
        self.info = self.reader.info
        self.sample_rate = sample_rate or self.info.sample_rate
        self.channels = channels or self.info.channels
        self._resampler = resampler
        file_channels = self.info.channels
        has_extra = file_channels > self.channels > 1
        if has_extra and extra_channels == "error":
            raise AudioReadError(
                f"{self.reader.name} has {file_channels} channels, expected at most "
                f"{self.channels}: mix it down first, or choose what to do with extra channels"
            )
        if extra_channels not in ("mix", "first", "error", "pairs"):
            raise ValueError(f"{extra_channels = } must be 'mix', 'first', 'error' or 'pairs'")
        in_pairs = has_extra and extra_channels == "pairs"
        self.num_groups = -(-file_channels // self.channels) if in_pairs else 1
        if not 0 <= group < self.num_groups:
            raise ValueError(f"{group = } must be 0 to {self.num_groups - 1}")
        self._first_channel = group * self.channels
        can_mix = has_extra and extra_channels == "mix" and self.channels == 2
        self._downmix = downmix_weights(self.info.layout) if can_mix else None
        self._channel_warnings: tuple[str, ...] = ()
        if has_extra and not in_pairs:
            use = f"the first {self.channels} are used"
            if self._downmix is not None:
                use = f"mixed down to {self.channels}"
            self._channel_warnings = (f"{self.reader.name} has {file_channels} channels: {use}",)
        self._convert_channels(
            torch.zeros(file_channels, 1)
        )  # so that unsupported channels fail here
        self.frames: int | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the file, complete after a pass over `blocks`."""
        return (*self._channel_warnings, *self.reader.warnings)

    def _convert_channels(self, block: Tensor) -> Tensor:
        if self._downmix is not None:
            return self._downmix @ block
        if self.num_groups > 1:
            block = block[self._first_channel : self._first_channel + self.channels]
        return convert_channels(block, self.channels)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the track from its beginning as float32 blocks (C, t).

        Raises:
            AudioReadError: The file has no samples to read, is damaged and `strict`, or is too
                short to be resampled.
        """
        self.frames = None
        stream = StreamResampler(
            self.info.sample_rate, self.sample_rate, self.channels, self._resampler
        )
        count = 0
        for block in self.reader.blocks():
            part = stream.push(self._convert_channels(block))
            if part.shape[-1]:
                count += part.shape[-1]
                yield part
        rest = stream.finish()
        if rest.shape[-1]:
            count += rest.shape[-1]
            yield rest
        if not count:
            raise AudioReadError(
                f"{self.reader.name} is too short: no sample is left at {self.sample_rate} Hz"
            )
        self.frames = count


def load_track(track: Source, audio_channels: int, samplerate: int) -> Tensor:
    """Load a whole track (C, T) at the sample rate and with the channels that a network takes."""
    reader = TrackReader(track, sample_rate=samplerate, channels=audio_channels)
    return torch.cat(list(reader.blocks()), dim=-1)
