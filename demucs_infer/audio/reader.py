"""Read a recording block by block: every usual format, sample-true, and honest about damage.

Shapes: C channels, T samples of the track, t samples of a block.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from torch import Tensor

from demucs_infer.audio import container_headers as declared
from demucs_infer.audio.channels import ExtraChannels, convert_channels
from demucs_infer.audio.decode import Damage, Decoder, check, choose, cover_of, open_container
from demucs_infer.audio.resample import Method, StreamResampler, resample
from demucs_infer.audio.source import ReopenableFile, Source
from demucs_infer.errors import AudioReadError

BLOCK = 65536
_LARGEST_PACKET = 8192
"""Samples; no packet of Vorbis, Opus or ALAC holds more."""
_LARGEST_COVER = 1 << 24
_LARGEST_TAG = 1 << 16
_COUNTED = {"wav", "w64", "aiff", "au", "flac", "tta", "wv", "mp3", "mov", "caf"}
"""Containers whose header counts the samples; others give an estimate, or milliseconds."""
_PLAIN = {"wav", "w64", "aiff", "au", "caf"}
"""Containers that are meant for samples as they are."""
_ESTIMATED = {"aac", "ac3", "eac3", "dts", "mpeg", "mpegts", "loas", "truehd", "amr", "avi"}
"""Containers without a length: FFmpeg guesses it from the bit rate."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a recording says about itself."""

    duration_seconds: float | None
    frames: int | None
    """Samples of a channel, where the file counts them."""
    sample_rate: int
    channels: int
    bits: int | None
    """Bits of a sample; None where the format is lossy."""
    is_float: bool
    codec: str
    container: str
    num_streams: int = 1
    """Recordings in this file, of which one is read."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case: title, artist, album, track, date, comment, and whatever there is."""
    cover: bytes | None = field(default=None, repr=False)
    """The attached picture."""
    cover_mime: str | None = None


def probe(source: Source) -> Info:
    """What `source` says about itself; an `AudioReadError` where it holds no sound."""
    return AudioReader(source).info


class AudioReader:
    """One recording from a path, bytes or a file object, or the part of it that is asked for.

    `blocks()` decodes it from its beginning each time. Afterwards `warnings` says what was wrong,
    such as seconds that the file promises and does not hold, and `frames` how many samples there
    were. With `strict`, whatever is missing or damaged is an `AudioReadError` instead.
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
        self._declared_length: _DeclaredLength
        with self._opened() as (container, chosen):
            self._declared_length = _declared_length(container, chosen, self._input)
            self.info = _info(container, chosen, self._declared_length)
        rate = self.info.sample_rate
        self._start = round(start_seconds * rate)
        self._stop = None
        if duration_seconds is not None and duration_seconds < float("inf"):
            self._stop = self._start + max(round(duration_seconds * rate), 1)
        self.name = self._input.name
        self.frames: int | None = None
        self.warnings: tuple[str, ...] = ()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, AudioStream]]:
        name = self._input.name
        with open_container(self._input.open(), name) as container:
            stream = choose(container, name, self._stream_index)
            check(stream, name)
            yield container, stream

    def blocks(self, frames: int = BLOCK) -> Iterator[Tensor]:
        """The samples, `frames` at a time (the last block has the rest): (C t) float32."""
        if not frames >= 1:
            raise ValueError(f"{frames = } must be at least 1")
        self.frames, self.warnings = None, ()
        count = 0
        watch = _Integrity(self.name, self.info.sample_rate, self._strict)
        with self._opened() as (container, stream):
            decoder = Decoder(container, stream, self.name)
            parts = _window(self._trimmed(decoder), self._start, self._stop)
            for block in _rebuffer(parts, self.info.channels, frames):
                yield watch.finite(block, self._start + count)
                count += block.shape[-1]
        is_whole = self._stop is None or decoder.count < self._stop
        watch.damage(decoder.damage)
        if is_whole:
            watch.length(decoder.count, self._declared_length)
        if not count:
            raise AudioReadError(self._nothing(decoder.count))
        self.frames = count
        note = self._streams_note()
        self.warnings = (*note, *watch.said)

    def _trimmed(self, decoder: Decoder) -> Iterator[Tensor]:
        """What is decoded, less what the file itself says is only padding at the end."""
        held: Tensor | None = None
        for block in decoder.frames():
            if held is not None:
                yield held
            held = block
        if held is None:
            return
        excess = self._declared_length.excess(decoder.count, held.shape[-1], decoder.last_duration)
        decoder.count -= excess
        yield held[:, : held.shape[-1] - excess]

    def _nothing(self, count: int) -> str:
        if count:
            rate = self.info.sample_rate
            return (
                f"{self.name} ends at {count / rate:.2f} s, before the start that was asked for "
                f"({self._start / rate:.10g} s)"
            )
        return f"{self.name} holds no samples: there is nothing to separate; record it again"

    def _streams_note(self) -> list[str]:
        if self.info.num_streams == 1 or self._stream_index is not None:
            return []
        number = self.info.num_streams
        return [f"{self.name} holds {number} audio streams: the default one was read"]


@dataclass(frozen=True, slots=True)
class _DeclaredLength:
    """How long a file says it is."""

    frames: int | None = None
    slack: int = 0
    """Samples by which a sound file may differ from its header."""
    seconds: float | None = None
    """The length to show; an estimate where the file does not count."""
    original: int | None = None
    """Samples before encoding, as iTunes notes them."""
    counts_packets: bool = False
    """The last packet of an MP4 has the duration of what is left of the original."""
    mark: int | None = None
    """Samples up to the end that the file marks, what players skip not counted."""
    is_exact: bool = False
    """Whether a sound file holds just `frames`."""
    is_torn: bool = False
    """Whether its end mark is missing."""

    def excess(self, count: int, last: int, last_duration: int | None) -> int:
        """How many of `count` decoded samples, the `last` of them together, are padding."""
        if self.mark is not None and 0 <= count - self.mark <= last:
            return count - self.mark
        if not self.counts_packets:
            return 0
        if self.original is not None and 0 <= count - self.original <= last:
            return count - self.original
        excess = last - last_duration if last_duration and 0 < last_duration < last else 0
        # An edit list is exact only to a tick of its film, often 1/600 s.
        if self.frames is not None and count - excess - self.frames > self.slack:
            excess = min(count - self.frames, last)
        return excess


def _declared_length(
    container: InputContainer, stream: AudioStream, source: ReopenableFile
) -> _DeclaredLength:
    kind = container.format.name.partition(",")[0]
    rate = int(stream.codec_context.sample_rate)
    seconds = container.duration / 1e6 if container.duration else None
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    if kind == "ogg":
        return _marked(stream, source, seconds)
    if kind in _COUNTED and seconds is not None:
        return _counted(kind, container, stream, source, seconds)
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", _tag(stream, "DURATION"))
    if tag:
        hours, minutes, rest = tag.groups()
        seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest)
    has_film = any(other.type == "video" for other in container.streams)
    if kind in _ESTIMATED or seconds is None or (has_film and not tag):
        return _DeclaredLength(seconds=seconds)
    # The tag counts in milliseconds, and ends where the sound does, not the last packet.
    mark = math.ceil((seconds + 0.001) * rate) if tag else None
    return _DeclaredLength(round(seconds * rate), slack=rate // 10, seconds=seconds, mark=mark)


def _counted(
    kind: str,
    container: InputContainer,
    stream: AudioStream,
    source: ReopenableFile,
    seconds: float,
) -> _DeclaredLength:
    rate = int(stream.codec_context.sample_rate)
    frames = round(seconds * rate)
    if kind == "mov":
        original = _itunes_samples(container)
        shown = frames if original is None else original
        # A lossy stream's length here is rounded to ticks of the film.
        is_exact = original is not None or _bits(stream) is not None
        return _DeclaredLength(
            shown,
            rate // 600 + 1,
            shown / rate,
            original=original,
            counts_packets=True,
            is_exact=is_exact,
        )
    with contextlib.closing(source.open()) as file:
        if kind == "mp3" and not declared.counts_frames(file):
            return _DeclaredLength(seconds=seconds)
        held = declared.data_bytes(file, kind)
    width = _sample_bytes(stream.codec_context.name)
    if held is not None and width:
        frames = max(frames, held // (width * stream.codec_context.channels))
    slack = 0
    if kind in _PLAIN and not width:
        slack = _LARGEST_PACKET  # of what is compressed, packets are counted whole
    elif kind == "w64":
        slack = 7 // (width * stream.codec_context.channels)  # writers count what fills eight bytes
    return _DeclaredLength(frames, slack, frames / rate, is_exact=not slack)


def _marked(stream: AudioStream, source: ReopenableFile, seconds: float | None) -> _DeclaredLength:
    """An Ogg stream: its last page says where it ends, if it was begun at its beginning."""
    head = stream.codec_context.extradata or b""
    skipped = int.from_bytes(head[10:12], "little") if head.startswith(b"OpusHead") else 0
    rate = int(stream.codec_context.sample_rate)
    if seconds is not None:
        seconds = max(seconds - skipped / rate, 0.0)
    with contextlib.closing(source.open()) as file:
        mark = declared.end_mark(file)
    if mark is None or seconds is None or abs(mark - skipped - seconds * rate) > _LARGEST_PACKET:
        return _DeclaredLength(seconds=seconds, is_torn=mark is None)
    return _DeclaredLength(mark - skipped, _LARGEST_PACKET, seconds, mark=mark - skipped)


def _itunes_samples(container: InputContainer) -> int | None:
    """`iTunSMPB`: zero, delay, padding, samples of the original, in hexadecimal."""
    words = container.metadata.get("iTunSMPB", "").split()
    try:
        samples = int(words[3], 16)
    except (IndexError, ValueError):
        return None
    return samples if 0 < samples < 1 << 40 else None


def _sample_bytes(codec: str) -> int:
    """Bytes of one PCM sample; 0 for what is no PCM."""
    if codec in ("pcm_mulaw", "pcm_alaw"):
        return 1
    match = re.match(r"pcm_[usf](\d+)", codec)
    return int(match[1]) // 8 if match else 0


def _tag(stream: AudioStream, name: str) -> str:
    return str(stream.metadata.get(name, ""))


def _info(container: InputContainer, stream: AudioStream, promise: _DeclaredLength) -> Info:
    context = stream.codec_context
    cover = cover_of(container)
    if cover is not None and len(cover) > _LARGEST_COVER:
        cover = None
    tags = {**stream.metadata, **container.metadata}
    return Info(
        duration_seconds=promise.seconds,
        frames=promise.frames if promise.is_exact else None,
        sample_rate=int(context.sample_rate),
        channels=int(context.channels),
        bits=_bits(stream),
        is_float=context.name.startswith("pcm_f"),
        codec=context.name,
        container=container.format.name.partition(",")[0],
        num_streams=len(container.streams.audio),
        tags={name.lower(): text for name, text in tags.items() if len(text) <= _LARGEST_TAG},
        cover=cover,
        cover_mime=_mime(cover),
    )


def _mime(cover: bytes | None) -> str | None:
    kinds = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif"}
    if cover is None:
        return None
    return next((kind for mark, kind in kinds.items() if cover.startswith(mark)), None)


def _bits(stream: AudioStream) -> int | None:
    context = stream.codec_context
    if context.name in ("pcm_mulaw", "pcm_alaw"):
        return 16  # what their eight bits stand for
    if context.name.startswith("pcm_"):
        return _sample_bytes(context.name) * 8 or None
    head = context.extradata or b""
    if context.name == "flac" and len(head) >= 14:
        return ((head[12] & 1) << 4 | head[13] >> 4) + 1
    if context.name == "alac" and len(head) >= 18:
        return head[17]
    if context.name in ("wavpack", "tta", "ape", "shorten", "truehd", "mlp"):
        # None, whatever its annotation says, where FFmpeg could not find it out.
        return int(getattr(context.format, "bits", 0)) or None
    return None


def _window(parts: Iterator[Tensor], start: int, stop: int | None) -> Iterator[Tensor]:
    """The samples [start, stop) of what comes in `parts`; nothing beyond them is decoded."""
    at = 0
    for part in parts:
        first, at = at, at + part.shape[-1]
        end = at if stop is None else min(at, stop)
        if start <= first and end == at:
            yield part
        elif end > start:
            yield part[:, max(start - first, 0) : end - first]
        if stop is not None and at >= stop:
            return


def _rebuffer(parts: Iterator[Tensor], channels: int, frames: int) -> Iterator[Tensor]:
    """The same samples in blocks of `frames`, the last one shorter."""
    held, count = [torch.empty(channels, 0)], 0
    for part in parts:
        held.append(part)
        count += part.shape[-1]
        if count < frames:
            continue
        whole = torch.cat(held, dim=-1)
        while whole.shape[-1] >= frames:
            yield whole[:, :frames]
            whole = whole[:, frames:]
        held, count = [whole], whole.shape[-1]
    if count:
        yield torch.cat(held, dim=-1)


class _Integrity:
    """What is wrong with a recording: said, or raised when that is asked for."""

    def __init__(self, name: str, rate: int, strict: bool) -> None:
        self._name, self._rate, self._strict = name, rate, strict
        self.said: list[str] = []
        self._not_finite_at: float | None = None

    def _say(self, message: str) -> None:
        if self._strict:
            raise AudioReadError(f"{message}; repair or fetch it again, or read it without strict")
        self.said.append(message)

    def finite(self, block: Tensor, start: int) -> Tensor:
        """The block with silence for what is no number: one NaN would spoil the whole track."""
        good = torch.isfinite(block)
        if good.all():
            return block
        if self._not_finite_at is None:
            first = int((~good).any(dim=0).nonzero()[0])
            self._not_finite_at = (start + first) / self._rate
            self._say(
                f"{self._name} has samples that are not finite numbers, the first at "
                f"{self._not_finite_at:.4f} s (silence takes their place)"
            )
        return torch.where(good, block, torch.zeros(()))

    def damage(self, damage: Damage) -> None:
        if damage.count:
            places = ", ".join(f"{place:.2f} s" for place in damage.places)
            more = " and later" if damage.count > len(damage.places) else ""
            self._say(
                f"{self._name} is damaged: it could not be decoded in {damage.count} "
                f"{'place' if damage.count == 1 else 'places'}, at {places}{more}"
            )
        if damage.broke_off:
            self._say(f"{self._name} breaks off: what follows could not be read")

    def length(self, count: int, promise: _DeclaredLength) -> None:
        if promise.is_torn:
            self._say(
                f"{self._name} was cut off: its end mark is missing, and with it an unknown number "
                f"of seconds after {count / self._rate:.2f} s"
            )
        if promise.frames is None:
            return
        missing = promise.frames - count
        if missing > promise.slack:
            self._say(
                f"{self._name} was cut off: {missing / self._rate:.3f} seconds are missing at its "
                f"end (it says {promise.frames / self._rate:.3f} s and holds "
                f"{count / self._rate:.3f} s)"
            )
        elif missing < -max(promise.slack, self._rate // 4):
            self._say(
                f"{self._name} holds {-missing / self._rate:.3f} seconds more than its header says"
            )


class TrackReader:
    """A recording at the rate and with the channels that a network wants: the engine's track.

    `sample_rate` and `channels` of None are the recording's own. `extra_channels` says what becomes
    of channels that are more than `channels`: "first" leaves them out with a warning, "error"
    refuses them, "pairs" makes groups of `channels` of them, each a track of its own: `group`
    chooses one of `num_groups`.
    """

    def __init__(
        self,
        source: Source,
        *,
        sample_rate: int | None = None,
        channels: int | None = None,
        start_seconds: float = 0.0,
        duration_seconds: float | None = None,
        resampler: Method = "julius",
        extra_channels: ExtraChannels = "first",
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
        have = self.info.channels
        is_more = have > self.channels > 1
        if is_more and extra_channels == "error":
            raise AudioReadError(
                f"{self.reader.name} has {have} channels and {self.channels} are wanted: mix it "
                "down first, or choose what becomes of extra channels"
            )
        if extra_channels not in ("first", "error", "pairs"):
            raise ValueError(f"{extra_channels = } must be 'first', 'error' or 'pairs'")
        pairs = is_more and extra_channels == "pairs"
        self.num_groups = -(-have // self.channels) if pairs else 1
        if not 0 <= group < self.num_groups:
            raise ValueError(f"{group = } must be one of {self.num_groups}")
        self._first_channel = group * self.channels
        self._note: tuple[str, ...] = ()
        if is_more and not pairs:
            self._note = (
                f"{self.reader.name} has {have} channels: the first {self.channels} are used",
            )
        convert_channels(torch.zeros(len(self._picked(torch.zeros(have, 1))), 1), self.channels)
        self.frames: int | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was wrong, complete after a pass."""
        return (*self._note, *self.reader.warnings)

    def _picked(self, block: Tensor) -> Tensor:
        if self.num_groups == 1:
            return block
        return block[self._first_channel : self._first_channel + self.channels]

    def blocks(self) -> Iterator[Tensor]:
        """The track from its beginning: (C t) float32."""
        self.frames = None
        stream = StreamResampler(
            self.info.sample_rate, self.sample_rate, self.channels, self._resampler
        )
        count = 0
        for block in self.reader.blocks():
            part = stream.push(convert_channels(self._picked(block), self.channels))
            if part.shape[-1]:
                count += part.shape[-1]
                yield part
        rest = stream.finish()
        if rest.shape[-1]:
            count += rest.shape[-1]
            yield rest
        if not count:
            raise AudioReadError(
                f"{self.reader.name} is too short: not one sample of it is left at "
                f"{self.sample_rate} Hz"
            )
        self.frames = count


class AudioFile:
    """Upstream's way of reading: the streams of a file as one tensor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.info = probe(self.path)

    def __len__(self) -> int:
        return self.info.num_streams

    def __repr__(self) -> str:
        return (
            f"AudioFile(path={str(self.path)!r}, samplerate={self.samplerate()}, "
            f"channels={self.channels()}, streams={len(self)})"
        )

    @property
    def duration(self) -> float | None:
        return self.info.duration_seconds

    def channels(self, stream: int = 0) -> int:
        return AudioReader(self.path, stream=stream).info.channels

    def samplerate(self, stream: int = 0) -> int:
        return AudioReader(self.path, stream=stream).info.sample_rate

    def read(
        self,
        seek_time: float | None = None,
        duration: float | None = None,
        streams: slice | int | list[int] = slice(None),
        samplerate: int | None = None,
        channels: int | None = None,
    ) -> Tensor:
        """(C T) for one stream given by its number, else (S C T); our resampler, not FFmpeg's."""
        if isinstance(streams, int):
            return self._read(streams, seek_time, duration, samplerate, channels)
        numbers = range(len(self))[streams] if isinstance(streams, slice) else streams
        read = [self._read(k, seek_time, duration, samplerate, channels) for k in numbers]
        return torch.stack(read)

    def _read(
        self,
        stream: int,
        seek_time: float | None,
        duration: float | None,
        samplerate: int | None,
        channels: int | None,
    ) -> Tensor:
        reader = AudioReader(
            self.path, start_seconds=seek_time or 0.0, duration_seconds=duration, stream=stream
        )
        wav = torch.cat(list(reader.blocks()), dim=-1)
        if channels is not None:
            wav = convert_channels(wav, channels)
        return resample(wav, reader.info.sample_rate, samplerate or reader.info.sample_rate)


def load_track(track: Source, audio_channels: int, samplerate: int) -> Tensor:
    """A whole recording in memory, as a network wants it: (C T) float32."""
    reader = TrackReader(track, sample_rate=samplerate, channels=audio_channels)
    return torch.cat(list(reader.blocks()), dim=-1)
