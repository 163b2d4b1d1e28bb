"""Open audio files with FFmpeg's demuxers and decoders, through PyAV, and convert to float32.

Shapes: C channels, t samples of a decoded frame.

FFmpeg gets bytes, never a file name, and may only use demuxers of audio and video containers: a
playlist that is named like a song cannot make FFmpeg open another file.
"""

import contextlib
import ctypes
import errno
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import av
import numpy as np
import torch
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.plane import AudioPlane
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray
from torch import Tensor

from demucs_infer.audio import container_headers
from demucs_infer.audio.formats import RATES
from demucs_infer.errors import AudioReadError

Samples: TypeAlias = "NDArray[Any]"
"""Decoded samples (C, t) in the decoder's own number format."""

MAX_CHANNELS = 64
_DEMUXERS = (
    "aac,ac3,adts,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,"
    "3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,ogg,oma,rm,shn,sox,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"}
_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
_SCALES = {
    np.dtype("u1"): 2.0**-7,
    np.dtype("i2"): 2.0**-15,
    np.dtype("i4"): 2.0**-31,
    np.dtype("i8"): 2.0**-63,
}
_U8_ZERO = 128
_MIN_CONVERSION = 1024
"""Fewest samples converted at once, as a file may consist of packets of one sample."""
_MAX_SILENCE_SECONDS = 10
"""Damage up to this length becomes silence, so that the samples after it keep their place."""
_DEFAULT_STREAM, _ATTACHED_PICTURE = 1, 0x400
_PYAV_ERRORS = (
    av.FFmpegError,
    OSError,
    ValueError,
    RuntimeError,
    MemoryError,
    AssertionError,
)
"""What PyAV raises: mostly FFmpegError, and the others for malformed headers."""


@contextlib.contextmanager
def open_container(file: BinaryIO, name: str) -> Iterator[InputContainer]:
    """Open a file as a container; close both at the end of the context.

    Raises:
        AudioReadError: FFmpeg cannot open it; the message says what the file looks like.
    """
    with contextlib.closing(file):
        head = file.read(512)
        if not head:
            raise AudioReadError(f"cannot read {name}: the file is empty")
        try:
            container = _open_as(None, file)
        except _PYAV_ERRORS as error:
            # Of a few frames of MP3, FFmpeg cannot tell whether they are a video (H.263).
            if not container_headers.has_frame_count(file):
                raise AudioReadError(f"cannot read {name}: {describe_header(head)}") from error
            try:
                container = _open_as("mp3", file)
            except _PYAV_ERRORS:
                raise AudioReadError(f"cannot read {name}: {describe_header(head)}") from error
        with contextlib.closing(container):
            yield container


def _open_as(format: str | None, file: BinaryIO) -> InputContainer:
    """Open a file from its beginning; None: FFmpeg finds the format."""
    file.seek(0)
    return av.open(
        _AnonymousFile(file),
        "r",
        format,
        options=dict(_OPTIONS),
        metadata_errors="replace",
        buffer_size=1 << 16,
    )


class _AnonymousFile:
    """A file object for PyAV with a fixed name, so that FFmpeg cannot guess from a suffix.

    A failed `seek` returns an error code: PyAV would keep an exception, and print its traceback
    when the next one is raised.
    """

    name = "x"

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read, self.tell = file.read, file.tell

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move in the file; return a negative error code if there is no such position."""
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, KeyError) as error:
            return -(getattr(error, "errno", None) or errno.EINVAL)


_OTHER_SIGNATURES = {
    b"<!": "a web page (was a download refused?)",
    b"<html": "a web page (was a download refused?)",
    b"#EXTM3U": "a playlist; give the audio file that it refers to",
    b"ffconcat": "a playlist; give the audio file that it refers to",
    b"[playlist]": "a playlist; give the audio file that it refers to",
    b"PK\3\4": "a zip archive; unpack it first",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"MThd": "a MIDI file, which contains notes and no audio; render it first",
}
_AUDIO_SIGNATURES = {
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
    """Describe an unreadable file by its first bytes, and say what to do about it."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for signature, description in _OTHER_SIGNATURES.items():
        if text[: len(signature)].lower() == signature.lower():
            return f"it looks like {description}"
    if head[4:8] in (b"ftyp", b"moov", b"mdat"):
        return (
            "it looks like an MP4 or M4A file that was cut off or damaged (its index is missing); "
            "copy or download it again"
        )
    for signature, description in _AUDIO_SIGNATURES.items():
        if head.startswith(signature):
            return (
                f"it looks like {description} file that was cut off or damaged; "
                "copy or download it again"
            )
    if not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head):
        return "it looks like text; give an audio file such as wav, flac, mp3 or m4a"
    return "unknown file format; give an audio file such as wav, flac, mp3 or m4a"


def choose_stream(container: InputContainer, name: str, index: int | None) -> AudioStream:
    """Return the audio stream `index`; for None, the default stream or else the first one.

    Raises:
        AudioReadError: There is no audio stream, or none with that index.
    """
    streams = list(container.streams.audio)
    if not streams:
        kinds = " and ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise AudioReadError(f"{name} has no audio stream (only {kinds}); give an audio file")
    if index is not None:
        if not 0 <= index < len(streams):
            raise AudioReadError(
                f"{name} has no audio stream {index}: choose 0 to {len(streams) - 1}"
            )
        return streams[index]
    defaults = (stream for stream in streams if _disposition(stream) & _DEFAULT_STREAM)
    return next(defaults, streams[0])


def _disposition(stream: object) -> int:
    flags = getattr(stream, "disposition", 0)
    return int(getattr(flags, "value", flags))


def read_cover(container: InputContainer) -> bytes | None:
    """Return the attached picture as it is encoded, or None."""
    for stream in container.streams.video:
        if _disposition(stream) & _ATTACHED_PICTURE:  # not a film
            with contextlib.suppress(*_PYAV_ERRORS, StopIteration):
                return bytes(next(iter(container.demux(stream)))) or None
    return None


def check_stream(stream: AudioStream, name: str) -> None:
    """Check the codec, sample rate and channels of a stream before it is decoded.

    Raises:
        AudioReadError: The codec is unknown, or sample rate or channel count are impossible.
    """
    context: AudioCodecContext | None = stream.codec_context  # None for an unknown codec
    if context is None:
        raise AudioReadError(f"unsupported audio codec in {name}: convert it to flac")
    rate, channels = context.sample_rate or 0, _drop_custom_layout(context)
    if rate not in RATES:
        raise AudioReadError(
            f"invalid sample rate in the header of {name}: {rate} Hz, expected {RATES.start} to "
            f"{RATES.stop - 1}; the file is damaged"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioReadError(
            f"unsupported number of channels in {name}: {channels}, expected 1 to {MAX_CHANNELS}"
        )


def _drop_custom_layout(context: AudioCodecContext) -> int:
    """Return the number of channels, and replace a custom channel layout by a plain one.

    A custom layout owns memory. PyAV copies the pointer with every access to the layout and frees
    the memory with every copy, so the copy made here must remain the only one.
    """
    layout = context.layout
    if _is_custom_layout(layout):
        context.layout = f"{layout.nb_channels} channels"
    return int(layout.nb_channels)


def _is_custom_layout(layout: AudioLayout) -> bool:
    """Return whether the layout may own memory; FFmpeg's own layouts have short names."""
    return " channels (" in layout.name or "ambisonic" in layout.name


def sample_bytes(codec: str) -> int:
    """Return the bytes of one PCM sample; 0 for other codecs."""
    if codec in ("pcm_mulaw", "pcm_alaw"):
        return 1
    match = re.match(r"pcm_[usf](\d+)", codec)
    return int(match[1]) // 8 if match else 0


@dataclass(slots=True)
class Damage:
    """Parts of a stream that could not be decoded."""

    places: list[float] = field(default_factory=list)
    """The first few times in seconds at which decoding failed."""
    count: int = 0
    is_truncated: bool = False
    """Whether the rest of the file could not be read."""

    def add(self, seconds: float) -> None:
        """Record a place at which decoding failed."""
        self.count += 1
        if len(self.places) < 3:
            self.places.append(seconds)


class Decoder:
    """Decode the frames of a stream in order; `damage` lists what could not be decoded."""

    def __init__(self, container: InputContainer, stream: AudioStream, name: str) -> None:
        self._container, self._stream, self._name = container, stream, name
        self._rate = int(stream.codec_context.sample_rate)
        self._channels = int(stream.codec_context.channels)
        self._is_aac = stream.codec_context.name.startswith("aac")
        self._first_pts: int | None = None
        self._follows_damage = False
        self._has_sample_positions = container.format.name == "flac"
        """Whether frames are numbered by samples, so that a lost frame shows as a gap."""
        self.damage = Damage()
        self.count = 0
        """Number of samples decoded so far."""
        self.last_duration: int | None = None
        """Number of samples in the last packet, if the container declares it."""

    def frames(self) -> Iterator[Samples]:
        """Yield decoded frames (C, t), and silence in place of what could not be decoded.

        A frame is a view of FFmpeg's memory, which lives as long as the view does.

        Raises:
            AudioReadError: The sample rate or the channels change within the stream.
        """
        time_base = self._stream.time_base
        in_samples = time_base is not None and time_base * self._rate == 1
        for packet in self._packets():
            if packet.size:
                self.last_duration = packet.duration if in_samples else None
            try:
                frames = self._decode(packet)
            except _PYAV_ERRORS:
                self.damage.add(self.count / self._rate)
                self._follows_damage = True
                continue
            if self._is_aac:
                self._check_layouts(frames)
            for frame in frames:
                yield from self._accept(frame)

    def _decode(self, packet: "av.Packet[AudioStream]") -> list[AudioFrame]:
        """Decode a packet; of PCM that ends amid a sample, the whole samples.

        FFmpeg 8.1.2 leaves out the rest by itself; 8.1.1 refuses the packet, which is the last one
        of a file that was cut off, or of one with padding (RF64, W64).
        """
        try:
            return packet.decode()
        except av.InvalidDataError:
            block = self._channels * sample_bytes(self._stream.codec_context.name)
            if not block or packet.size < block or packet.size % block == 0:
                raise
            whole = av.Packet(bytes(packet)[: -(packet.size % block)])
            whole.pts, whole.time_base = packet.pts, packet.time_base
            return self._stream.codec_context.decode(whole)

    def _check_layouts(self, frames: list[AudioFrame]) -> None:
        """Refuse custom layouts from the AAC decoder: PyAV would free their memory twice."""
        custom = [frame.layout for frame in frames if _is_custom_layout(frame.layout)]
        for layout in custom:
            # Never free this layout: the frame frees the memory that both point to.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
        if custom:
            raise AudioReadError(
                f"unsupported AAC channel layout in {self._name}: {custom[0].name}; "
                "convert it to flac"
            )

    def _packets(self) -> Iterator["av.Packet[AudioStream]"]:
        packets = iter(self._container.demux(self._stream))
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except IndexError:
                # At the end, PyAV fails on streams that begin in mid-file (FLV, MPEG-TS). Their
                # numbers are higher than that of this stream, which is complete by then.
                return
            except _PYAV_ERRORS:
                self.damage.is_truncated = True
                return
            yield packet

    def _accept(self, frame: AudioFrame) -> Iterator[Samples]:
        if not frame.samples:
            return
        if frame.sample_rate != self._rate or frame.layout.nb_channels != self._channels:
            raise AudioReadError(
                f"{self._name} changes at {self.count / self._rate:.2f} s from {self._channels} "
                f"channels at {self._rate} Hz to {frame.layout.nb_channels} channels at "
                f"{frame.sample_rate} Hz; split it there and process the parts separately"
            )
        samples = _frame_samples(frame)
        if gap := self._gap_before(frame):
            self.count += gap
            zero = _U8_ZERO if samples.dtype == np.uint8 else 0
            yield np.full((self._channels, gap), zero, samples.dtype)
        self.count += samples.shape[-1]
        yield samples

    def _gap_before(self, frame: AudioFrame) -> int:
        """Return how many samples are missing before this frame, if silence can replace them."""
        if frame.pts is None:
            return 0
        if self._first_pts is None and frame.time_base is not None:
            self._first_pts = frame.pts
        if not (self._follows_damage or self._has_sample_positions):
            return 0
        if self._first_pts is None or frame.time_base is None:
            return 0
        is_reported, self._follows_damage = self._follows_damage, False
        position = round((frame.pts - self._first_pts) * frame.time_base * self._rate)
        gap = position - self.count
        if not 0 < gap <= _MAX_SILENCE_SECONDS * self._rate:
            return 0
        if not is_reported:
            self.damage.add(self.count / self._rate)
        return gap


def _frame_samples(frame: AudioFrame) -> Samples:
    """Return the samples of a frame (C, t) in its own number format."""
    kind = frame.format
    channels, dtype = frame.layout.nb_channels, _DTYPES[kind.name.removesuffix("p")]
    if not kind.is_planar:
        packed = np.frombuffer(memoryview(AudioPlane(frame, 0)), dtype, frame.samples * channels)
        return packed.reshape(-1, channels).T
    # Neither `frame.planes` nor `frame.to_ndarray`: they read beyond the end from 8 channels on.
    samples = np.empty((channels, frame.samples), dtype)
    for channel, row in enumerate(samples):
        row[:] = np.frombuffer(memoryview(AudioPlane(frame, channel)), dtype, frame.samples)
    return samples


def to_float(frames: Iterable[Samples]) -> Iterator[Tensor]:
    """Convert decoded frames (C, t) to float32 with full scale 1; join short frames."""
    group: list[Samples] = []
    length = 0
    for frame in frames:
        if group and frame.dtype != group[0].dtype:
            yield _to_float(group)
            group, length = [], 0
        group.append(frame)
        length += frame.shape[-1]
        if length >= _MIN_CONVERSION:
            yield _to_float(group)
            group, length = [], 0
    if group:
        yield _to_float(group)


def _to_float(group: list[Samples]) -> Tensor:
    samples = group[0] if len(group) == 1 else np.concatenate(group, axis=1)
    dtype = samples.dtype
    if dtype == np.uint8:
        samples = samples.astype(np.int16) - _U8_ZERO
    with np.errstate(over="ignore"):  # a double beyond float32 becomes inf, which is checked later
        is_view = samples.base is not None
        floats = torch.from_numpy(samples.astype(np.float32, order="C", copy=is_view))
    return floats.mul_(_SCALES[dtype]) if dtype in _SCALES else floats
