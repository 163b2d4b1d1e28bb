"""Encode with FFmpeg's encoders and containers, through PyAV.

Shapes: C channels, T samples of a block. Floats are converted here to the sample format of the
encoder, so that FFmpeg does not convert them a second time.
"""

import contextlib
from collections.abc import Mapping
from fractions import Fraction
from typing import BinaryIO

import av
import torch
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from torch import Tensor

from demucs_infer.audio.encoders.base import PIECE as PIECE
from demucs_infer.audio.encoders.base import FileProxy, quantize
from demucs_infer.audio.encoders.base import pieces as pieces
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.tags import Cover

# Plain integers: PyAV 14 to 16 refuse enumerations.
_DEFAULT_STREAM = 1
_ATTACHED_PICTURE = 1024
_FRAME_DTYPES = {"s16": torch.int16, "s32": torch.int32, "flt": torch.float32}


class Muxer:
    """Write a container of one or more tracks that share encoding, sample rate and channels."""

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
            # The default, milliseconds, would round the length.
            options["movie_timescale"] = str(sample_rate)
        self._proxy = FileProxy(file)
        self._encoding = encoding
        self._rate = sample_rate
        self._layout = kind.layouts[channels - 1]
        self._container = av.open(
            self._proxy,
            "w",
            format=kind.container,
            container_options=options,
            buffer_size=1 << 18,  # each write takes Python's lock
        )
        self._container.metadata.update(tags or {})
        self._streams = [self._add_stream(title) for title in titles]
        self._positions = [0] * len(titles)
        if len(titles) > 1:  # most players play the default track only
            for index, stream in enumerate(self._streams):
                _set_disposition(stream, _DEFAULT_STREAM if index == 0 else 0)
        picture = self._add_picture(cover) if cover is not None and kind.cover else None
        self._container.start_encoding()  # so that a track without samples has a header too
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
        """Add a video stream for the picture, and return its only packet."""
        stream = self._container.add_stream(cover.codec)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = cover.size
        stream.pix_fmt = "rgb24" if cover.codec == "png" else "yuvj420p"  # required, never used
        _set_disposition(stream, _ATTACHED_PICTURE)
        packet = av.Packet(cover.data)
        packet.stream = stream
        packet.pts = packet.dts = 0
        return packet

    def write(self, block: Tensor, track: int = 0) -> None:
        """Encode the next samples (C, T) of a track."""
        for piece in pieces(block):
            frame = self._make_frame(piece, self._positions[track])
            self._container.mux(self._streams[track].encode(frame))
            self._positions[track] += piece.shape[-1]

    def _make_frame(self, piece: Tensor, position: int) -> av.AudioFrame:
        samples = self._encoding.codec.samples
        frame = av.AudioFrame(format=samples, layout=self._layout, samples=piece.shape[-1])
        frame.sample_rate = self._rate
        frame.time_base = Fraction(1, self._rate)
        frame.pts = position
        values = piece
        if self._encoding.is_integer:
            values = quantize(piece, self._encoding.depth)
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
        """Write what the encoders still buffer, and the header."""
        for stream in self._streams:
            self._container.mux(stream.encode(None))
        self._container.close()

    def abort(self) -> None:
        """Stop encoding, in any state; nothing more is written to the file."""
        self._proxy.is_aborted = True
        with contextlib.suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()


def _set_disposition(stream: av.stream.Stream, flags: int) -> None:
    """Set the disposition of a stream to an integer: PyAV 14 to 16 refuse the enumeration."""
    stream.disposition = flags  # type: ignore[assignment]  # a plain int works in all


def _encoder_options(encoding: Encoding) -> dict[str, str]:
    options = {}
    preset = encoding.kind.default_preset if encoding.preset is None else encoding.preset
    if preset is not None:
        options["compression_level"] = str(preset)
    if encoding.quality is not None:
        # In FFmpeg's units of 1/118; encoders ignore its option `q` here.
        options |= {"flags": "+qscale", "global_quality": str(118 * encoding.quality)}
    return options
