"""Open a recording with FFmpeg's decoders, through PyAV, and turn what they say into float32.

Shapes: C channels, t samples of a decoded frame.

FFmpeg is given bytes, never a name, and only formats that hold sound: a playlist that calls itself
a song cannot make it open another file.
"""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import av
import numpy as np
import torch
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.plane import AudioPlane
from av.audio.stream import AudioStream
from av.container import InputContainer
from torch import Tensor

from demucs_infer.audio.formats import RATES
from demucs_infer.errors import AudioReadError

MOST_CHANNELS = 64
_DEMUXERS = (
    "aac,ac3,adts,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,"
    "3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,ogg,oma,rm,shn,sox,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"}
_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
_SCALES = {"u8": 2.0**-7, "s16": 2.0**-15, "s32": 2.0**-31, "s64": 2.0**-63}
_LONGEST_SILENCE = 10
"""Seconds: a damaged place shorter than this becomes silence of its length, to keep the time."""
_FOREIGN = (av.FFmpegError, OSError, ValueError, RuntimeError, MemoryError, AssertionError)
"""What PyAV raises: most of it is an FFmpegError; strange headers bring out the rest."""


@contextlib.contextmanager
def open_container(file: BinaryIO, name: str) -> Iterator[InputContainer]:
    """The file as a container, closed afterwards with the file."""
    with contextlib.closing(file):
        head = file.read(512)
        if not head:
            raise AudioReadError(f"cannot read {name}: it is empty; record or fetch it again")
        file.seek(0)
        try:
            container = av.open(
                _Named(file),
                "r",
                options=dict(_OPTIONS),
                metadata_errors="replace",
                buffer_size=1 << 16,
            )
        except _FOREIGN as error:
            raise AudioReadError(f"cannot read {name}: {describe_header(head)}") from error
        with contextlib.closing(container):
            yield container


class _Named:
    """What PyAV needs of a file, under a name that does not depend on where the bytes come from."""

    name = "x"

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


_LOOKS = {
    b"<!": "a web page (was a download refused?)",
    b"<html": "a web page (was a download refused?)",
    b"#EXTM3U": "a playlist, not the recording in it",
    b"ffconcat": "a playlist, not the recording in it",
    b"[playlist]": "a playlist, not the recording in it",
    b"PK\3\4": "a zip archive; unpack it first",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"MThd": "a MIDI file, which holds notes and no sound; render it first",
}
_SOUND = {
    b"RIFF": "a WAV",
    b"RF64": "a WAV",
    b"riff": "a W64",
    b"fLaC": "a FLAC",
    b"OggS": "an Ogg",
    b"ID3": "an MP3",
    b"\xff\xfb": "an MP3",
    b"FORM": "an AIFF",
    b"caff": "a CAF",
    b"\x1aE\xdf\xa3": "a Matroska",
    b"0&\xb2u": "a WMA",
}


def describe_header(head: bytes) -> str:
    """What a file that no decoder takes seems to be, and what to do, from its first bytes."""
    lowered = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for mark, what in _LOOKS.items():
        if lowered[: len(mark)].lower() == mark.lower():
            return f"it looks like {what}"
    if head[4:8] in (b"ftyp", b"moov", b"mdat"):
        return (
            "it looks like an MP4 or M4A file that was cut off or damaged: the index of its "
            "content is missing; copy or fetch it again"
        )
    for mark, what in _SOUND.items():
        if head.startswith(mark):
            return f"it looks like {what} file that was cut off or damaged; copy or fetch it again"
    if not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head):
        return "it looks like text; give a recording such as wav, flac, mp3 or m4a"
    return "it is no kind of recording that we know; give one such as wav, flac, mp3 or m4a"


def choose(container: InputContainer, name: str, index: int | None) -> AudioStream:
    """The audio stream asked for, or the one marked as default, or the first."""
    streams = list(container.streams.audio)
    if not streams:
        kinds = " and ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise AudioReadError(f"{name} holds no sound (only {kinds}); give a file that does")
    if index is not None:
        if not 0 <= index < len(streams):
            raise AudioReadError(
                f"{name} holds {len(streams)} audio streams: there is no number {index}"
            )
        return streams[index]
    return next((stream for stream in streams if _flags(stream) & 1), streams[0])


def _flags(stream: object) -> int:
    flags = getattr(stream, "disposition", 0)
    return int(getattr(flags, "value", flags))


def cover_of(container: InputContainer) -> bytes | None:
    """The attached picture as it lies in the file."""
    for stream in container.streams.video:
        if _flags(stream) & 0x400:  # an attached picture, no film
            with contextlib.suppress(*_FOREIGN, StopIteration):
                return bytes(next(iter(container.demux(stream)))) or None
    return None


def check(stream: AudioStream, name: str) -> None:
    """Refuse what no recording is before a sample of it is decoded."""
    context: AudioCodecContext | None = stream.codec_context  # none where no decoder is known
    if context is None:
        raise AudioReadError(f"{name} is coded in a way that we do not know; convert it to flac")
    rate, channels = context.sample_rate or 0, _disarm(context)
    if rate not in RATES:
        raise AudioReadError(
            f"{name} says that it has {rate} samples a second: its header is damaged "
            f"({RATES.start} to {RATES.stop - 1} are possible); make or fetch it again"
        )
    if not 1 <= channels <= MOST_CHANNELS:
        raise AudioReadError(
            f"{name} says that it has {channels} channels: 1 to {MOST_CHANNELS} can be read"
        )


def _disarm(context: AudioCodecContext) -> int:
    """The number of channels, of which the context then knows no more than that.

    A layout with an order of its own owns memory. PyAV hands it out by copying the pointer, and
    frees it with each copy. So the first copy, which is this one, becomes the only one.
    """
    layout = context.layout
    if _owns_memory(layout):
        context.layout = f"{layout.nb_channels} channels"
    return int(layout.nb_channels)


def _owns_memory(layout: AudioLayout) -> bool:
    """Whether it may name its channels one by one; FFmpeg's own layouts have short names."""
    return " channels (" in layout.name or "ambisonic" in layout.name


@dataclass(slots=True)
class Damage:
    """What went wrong in a pass."""

    places: list[float] = field(default_factory=list)
    """Seconds at which something could not be decoded; the first few."""
    count: int = 0
    broke_off: bool = False

    def at(self, seconds: float) -> None:
        self.count += 1
        if len(self.places) < 3:
            self.places.append(seconds)


class Decoder:
    """The decoded frames of a stream, in order, as float32 (C t); in `damage`, what was not."""

    def __init__(self, container: InputContainer, stream: AudioStream, name: str) -> None:
        self._container, self._stream, self._name = container, stream, name
        self._rate = int(stream.codec_context.sample_rate)
        self._channels = int(stream.codec_context.channels)
        self._first: int | None = None
        self._torn = False
        self._counts = container.format.name == "flac"
        """Whether each frame says which sample it begins with: a lost one shows as a gap."""
        self.damage = Damage()
        self.count = 0
        """Samples handed on so far."""
        self.last_duration: int | None = None
        """Samples that the container gives to the last packet, where it counts in samples."""

    def frames(self) -> Iterator[Tensor]:
        stream = self._stream
        in_samples = stream.time_base is not None and stream.time_base * self._rate == 1
        for packet in self._packets():
            if packet.size:
                self.last_duration = packet.duration if in_samples else None
            try:
                decoded = packet.decode()
            except _FOREIGN:
                self.damage.at(self.count / self._rate)
                self._torn = True
                continue
            self._disarm(decoded)
            for frame in decoded:
                yield from self._accept(frame)

    def _disarm(self, frames: list[AudioFrame]) -> None:
        """Refuse layouts that a decoder of AAC made up: PyAV would free their memory twice."""
        if not self._stream.codec_context.name.startswith("aac"):
            return
        strange = [frame.layout for frame in frames if _owns_memory(frame.layout)]
        for layout in strange:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))  # the frame frees it; this never
        if strange:
            raise AudioReadError(
                f"{self._name} gives its channels places that no AAC file should give them "
                f"({strange[0].name}); convert it to flac"
            )

    def _packets(self) -> Iterator["av.Packet[AudioStream]"]:
        packets = iter(self._container.demux(self._stream))
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except _FOREIGN:
                self.damage.broke_off = True
                return
            yield packet

    def _accept(self, frame: AudioFrame) -> Iterator[Tensor]:
        if not frame.samples:
            return
        if frame.sample_rate != self._rate or frame.layout.nb_channels != self._channels:
            raise AudioReadError(
                f"{self._name} changes at {self.count / self._rate:.2f} s from {self._channels} "
                f"channels at {self._rate} Hz to {frame.layout.nb_channels} at "
                f"{frame.sample_rate} Hz; cut it there and give the parts"
            )
        yield from self._silence_before(frame)
        block = to_float(frame)
        self.count += block.shape[-1]
        yield block

    def _silence_before(self, frame: AudioFrame) -> Iterator[Tensor]:
        """What could not be decoded becomes silence of its length, so that nothing moves."""
        if frame.pts is None or frame.time_base is None:
            return
        if self._first is None:
            self._first = frame.pts
        torn, self._torn = self._torn, False
        if not (torn or self._counts):
            return
        position = round((frame.pts - self._first) * frame.time_base * self._rate)
        gap = position - self.count
        if 0 < gap <= _LONGEST_SILENCE * self._rate:
            if not torn:
                self.damage.at(self.count / self._rate)
            self.count += gap
            yield torch.zeros(self._channels, gap)


def to_float(frame: AudioFrame) -> Tensor:
    """The samples of a frame as they are, full scale at 1: (C t) float32."""
    kind = frame.format.name.removesuffix("p")
    channels, dtype = frame.layout.nb_channels, _DTYPES[kind]
    if frame.format.is_planar:
        # Not `frame.planes`, nor what calls it: from 8 channels on it looks beyond their end.
        planes = [memoryview(AudioPlane(frame, channel)) for channel in range(channels)]
        array = np.empty((channels, frame.samples), dtype)
        for row, plane in zip(array, planes):
            row[:] = np.frombuffer(plane, dtype, frame.samples)
    else:
        packed = np.frombuffer(memoryview(AudioPlane(frame, 0)), dtype, frame.samples * channels)
        array = packed.reshape(-1, channels).T
    if kind == "u8":
        array = array.astype(np.int16) - 128
    with np.errstate(over="ignore"):  # a double beyond float32 is an infinity, and found as one
        # A copy if it is none yet: the frame's memory goes with the frame.
        copies = not frame.format.is_planar
        samples = torch.from_numpy(array.astype(np.float32, order="C", copy=copies))
    return samples.mul_(_SCALES[kind]) if kind in _SCALES else samples
