"""Samples into an open file: FFmpeg's encoders through PyAV, Vorbis through libsndfile.

Shapes: C channels, T samples of a block. Our code rounds to integers, once; FFmpeg's own
converter neither scales nor mixes anything, because it is given what the encoder takes.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import BinaryIO, Protocol

import av
import torch
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from torch import Tensor

from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.tags import Cover
from demucs_infer.errors import AudioWriteError

PIECE = 65536
"""Samples encoded at once, so that a long block costs no memory."""

_VORBIS_PIECE = 4096  # libvorbis keeps a long piece on the stack, and overflows it
_VORBIS_ORDER = {  # its channels, as places in FFmpeg's order, by their number
    1: [0],
    2: [0, 1],
    3: [0, 2, 1],
    4: [0, 1, 2, 3],
    5: [0, 2, 1, 3, 4],
    6: [0, 2, 1, 4, 5, 3],
    7: [0, 2, 1, 5, 6, 4, 3],
    8: [0, 2, 1, 6, 7, 4, 5, 3],
}
_ATTACHED_PICTURE = 1024  # plain integers: enumerations are refused by PyAV 14 to 16
_FRAME_DTYPES = {"s16": torch.int16, "s32": torch.int32, "flt": torch.float32}


class Encoder(Protocol):
    """Takes float samples, leaves a file."""

    def write(self, block: Tensor) -> None:
        """The next samples (C T)."""

    def finish(self) -> None:
        """Write what is still held, and the header."""

    def abandon(self) -> None:
        """Stop, whatever state it is in; the file is of no use."""


def pieces(block: Tensor, length: int = PIECE) -> Iterator[Tensor]:
    """A block (C T) as views of at most so many samples."""
    for start in range(0, block.shape[-1], length):
        yield block[:, start : start + length]


def quantise(block: Tensor, bits: int) -> Tensor:
    """Floats to the integers of that many bits: to the nearest, saturated (as int32).

    The scale is that of reading, 1 = 2**(bits - 1), so what was read comes back bit for bit.
    """
    scale = 1 << (bits - 1)
    return (block * scale).round_().clamp_(-scale, scale - 1).to(torch.int32)


class _FileProxy:
    """The file as an encoder's library sees it.

    Deaf once abandoned, because closing a container writes to it; keeps an error that the
    library on the other side would lose.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.is_abandoned = False
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.is_abandoned:
            return len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return 0 if self.is_abandoned else self.file.seek(offset, whence)

    def tell(self) -> int:
        return 0 if self.is_abandoned else self.file.tell()


class _NonRaisingProxy(_FileProxy):
    """For libsndfile, whose callbacks may not raise: a write that fails is short instead."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return 0

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)


class Muxer:
    """A container of one or more tracks that share an encoding, a rate and a channel count."""

    def __init__(
        self,
        file: BinaryIO,
        encoding: Encoding,
        sample_rate: int,
        channels: int,
        *,
        options: Mapping[str, str] | None = None,
        titles: tuple[str, ...] = ("",),
        tags: Mapping[str, str] | None = None,
        cover: Cover | None = None,
    ) -> None:
        kind = encoding.kind
        options = {**kind.options, **(options or {})}
        if kind.container == "mp4":
            # In milliseconds, the default, the length would be rounded.
            options["movie_timescale"] = str(sample_rate)
        self._tap = _FileProxy(file)
        self._encoding = encoding
        self._rate = sample_rate
        self._layout = kind.layouts[channels - 1]
        self._container = av.open(
            self._tap,
            "w",
            format=kind.container,
            container_options=options,
            buffer_size=1 << 18,  # each hand-over takes Python's lock
        )
        self._container.metadata.update(tags or {})
        self._streams = [self._add_stream(title) for title in titles]
        self._positions = [0] * len(titles)
        if len(titles) > 1:  # players play the first, and only those who know of more show them
            for index, stream in enumerate(self._streams):
                _dispose(stream, int(index == 0))
        picture = self._add_picture(cover) if cover is not None and kind.cover else None
        self._container.start_encoding()  # a track without samples has a header too
        if picture:
            self._container.mux(picture)

    def _add_stream(self, title: str) -> AudioStream:
        encoding = self._encoding
        codec = encoding.codec
        stream = self._container.add_stream(codec.encoder, self._rate)
        assert isinstance(stream, AudioStream)
        context = stream.codec_context
        assert isinstance(context, AudioCodecContext)
        context.layout = self._layout
        context.format = codec.samples
        context.time_base = Fraction(1, self._rate)
        bitrate = encoding.bitrate_for(context.layout.nb_channels)
        if bitrate is not None:
            context.bit_rate = bitrate
        context.options = _encoder_options(encoding)
        if title:
            stream.metadata["handler_name"] = title
        return stream

    def _add_picture(self, cover: Cover) -> "av.Packet[av.stream.Stream]":
        """The picture as the container wants it: a video stream of this one packet."""
        stream = self._container.add_stream(cover.codec)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = cover.size
        stream.pix_fmt = "rgb24" if cover.codec == "png" else "yuvj420p"  # opens, never used
        _dispose(stream, _ATTACHED_PICTURE)
        packet = av.Packet(cover.data)
        packet.stream = stream
        packet.pts = packet.dts = 0
        return packet

    def write(self, block: Tensor, track: int = 0) -> None:
        """The next samples (C T) of a track."""
        for piece in pieces(block):
            frame = self._frame(piece, self._positions[track])
            self._container.mux(self._streams[track].encode(frame))
            self._positions[track] += piece.shape[-1]

    def _frame(self, piece: Tensor, position: int) -> av.AudioFrame:
        samples = self._encoding.codec.samples
        frame = av.AudioFrame(format=samples, layout=self._layout, samples=piece.shape[-1])
        frame.sample_rate = self._rate
        frame.time_base = Fraction(1, self._rate)
        frame.pts = position
        values = piece
        if self._encoding.is_integer:
            values = quantise(piece, self._encoding.depth)
            if self._encoding.depth == 24:
                values = values << 8  # FFmpeg keeps 24 bits in the upper part of 32
        dtype = _FRAME_DTYPES[samples.removesuffix("p")]
        if samples.endswith("p"):
            for plane, channel in zip(frame.planes, values):
                torch.frombuffer(plane, dtype=dtype, count=len(channel)).copy_(channel)
        else:
            packed = torch.frombuffer(frame.planes[0], dtype=dtype, count=values.numel())
            packed.view(-1, len(values)).copy_(values.T)
        return frame

    def finish(self) -> None:
        """Write what the encoders still hold, and the header."""
        for stream in self._streams:
            self._container.mux(stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        """Stop, whatever state it is in; nothing reaches the file any more."""
        self._tap.is_abandoned = True
        with contextlib.suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()


def _dispose(stream: av.stream.Stream, flags: int) -> None:
    """What a stream is for; the annotation asks for what PyAV 14 to 16 refuse, an enumeration."""
    stream.disposition = flags  # type: ignore[assignment]  # a plain int works in all


def _encoder_options(encoding: Encoding) -> dict[str, str]:
    options = {}
    preset = encoding.kind.default_preset if encoding.preset is None else encoding.preset
    if preset is not None:
        options["compression_level"] = str(preset)
    if encoding.quality is not None:
        # In FFmpeg's units of 1/118; its plain `q` is not looked at here.
        options |= {"flags": "+qscale", "global_quality": str(118 * encoding.quality)}
    return options


class SndfileEncoder:
    """Vorbis by libvorbis; the encoder of that name inside FFmpeg is a poor one."""

    _TAGS = ("title", "artist", "album", "date", "genre", "comment", "copyright")

    def __init__(
        self,
        file: BinaryIO,
        encoding: Encoding,
        sample_rate: int,
        channels: int,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        try:
            import soundfile
        except ImportError as error:
            raise AudioWriteError(
                "ogg vorbis is written by the package soundfile, which is not installed: "
                "pip install 'demucs-infer[vorbis]', or choose opus"
            ) from error
        # libsndfile passes channels on as they stand; Vorbis has an order of its own.
        self._order = _VORBIS_ORDER[channels]
        kind = encoding.kind
        quality = encoding.quality if encoding.quality is not None else kind.default_quality
        assert quality is not None
        self._tap = _NonRaisingProxy(file)
        self._failure = soundfile.SoundFileError
        self._file = soundfile.SoundFile(
            self._tap,
            "w",
            samplerate=sample_rate,
            channels=channels,
            format="OGG",
            subtype="VORBIS",
            compression_level=1 - quality / 10,
        )
        for name in self._TAGS:
            if value := (tags or {}).get(name):
                setattr(self._file, name, value)
        if track := (tags or {}).get("track"):
            self._file.tracknumber = track

    def write(self, block: Tensor) -> None:
        """The next samples (C T)."""
        for piece in pieces(block, _VORBIS_PIECE):
            samples = piece[self._order].T.contiguous().numpy()
            self._try(functools.partial(self._file.write, samples))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        self._try(self._file.close)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except self._failure as error:
            raise self._tap.error or AudioWriteError(f"libsndfile says: {error}") from error
        if self._tap.error:
            raise self._tap.error

    def abandon(self) -> None:
        """Stop, whatever state it is in; nothing reaches the file any more."""
        self._tap.is_abandoned = True
        with contextlib.suppress(self._failure, OSError):
            self._file.close()
