"""Encode audio into bytes that are sent while the rest of it is still being made.

Shapes: C channels, T samples of a block. Samples are floats, 1.0 is full scale.
"""

import io
import struct
from typing import BinaryIO, cast

from torch import Tensor

from demucs_infer.audio.encoders.base import Encoder, pieces, quantize
from demucs_infer.audio.encoders.lame import LameEncoder, has_lame
from demucs_infer.audio.encoders.pyav import Muxer
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.writer import check_shape
from demucs_infer.errors import AudioWriteError

STREAM_FORMATS = ("wav", "flac", "mp3")
"""Formats whose first bytes do not depend on the last ones."""

_FLAC_LENGTH = slice(18, 26)
"""Where a flac file has its number of samples: the lower 36 bits."""


class StreamEncoder:
    """Encodes samples into the bytes of a file of `num_samples` that is never rewritten."""

    def __init__(
        self, encoding: Encoding, sample_rate: int, channels: int, num_samples: int
    ) -> None:
        """Begin a file; raise `AudioWriteError` if its format cannot be streamed."""
        if encoding.format not in STREAM_FORMATS:
            formats = ", ".join(STREAM_FORMATS)
            raise AudioWriteError(f"cannot stream {encoding.format}: expected one of {formats}")
        check_shape(encoding, sample_rate, channels)
        if encoding.kind.rate_for(sample_rate) != sample_rate:
            raise AudioWriteError(
                f"unsupported sample rate for {encoding.format}: {sample_rate} Hz"
            )
        self._stream = _Stream()
        self._encoder: Encoder
        # Only the methods of a file that encoders use.
        file = cast("BinaryIO", self._stream)
        if encoding.format == "wav":
            self._encoder = _PcmEncoder(file, sample_rate, channels, num_samples)
        elif encoding.format == "mp3" and has_lame():
            self._encoder = LameEncoder(
                file, encoding, sample_rate, channels, num_samples=num_samples
            )
        else:
            options = {"flush_packets": "1"}
            self._encoder = Muxer(file, encoding, sample_rate, channels, options=options)
        if encoding.format == "flac":
            self._stream.set_bits(_FLAC_LENGTH, num_samples)

    def encode(self, block: Tensor) -> bytes:
        """Encode the next samples (C, T), and return the bytes that are ready."""
        self._encoder.write(block)
        return self._stream.take()

    def finish(self) -> bytes:
        """Return the last bytes."""
        self._encoder.finish()
        return self._stream.take()

    def abort(self) -> None:
        """Stop encoding."""
        self._encoder.abort()


class _Stream:
    """The file that an encoder writes; what was taken from it can no longer be rewritten."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._num_taken = 0
        self._position = 0

    def write(self, data: bytes) -> int:
        start = self._position - self._num_taken
        self._position += len(data)
        rest = data[max(-start, 0) :]
        start = max(start, 0)
        self._data[start : start + len(rest)] = rest
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._num_taken + len(self._data)
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: end}[whence]
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def set_bits(self, place: slice, bits: int) -> None:
        """Set bits of a number that is not taken yet."""
        number = int.from_bytes(self._data[place], "big") | bits
        self._data[place] = number.to_bytes(place.stop - place.start, "big")

    def take(self) -> bytes:
        """Remove and return the bytes that were written."""
        data = bytes(self._data)
        self._num_taken += len(data)
        self._data.clear()
        return data


class _PcmEncoder:
    """Encodes wav of 16 bits. FFmpeg writes the size into the header at the end only."""

    def __init__(self, file: BinaryIO, sample_rate: int, channels: int, num_samples: int) -> None:
        self._file = file
        frame = 2 * channels
        size = frame * num_samples
        file.write(
            struct.pack(
                "<4sI4s4sIHHIIHH4sI",
                *(b"RIFF", min(36 + size, 0xFFFFFFFF), b"WAVE", b"fmt ", 16, 1, channels),
                *(sample_rate, frame * sample_rate, frame, 16, b"data", min(size, 0xFFFFFFFF)),
            )
        )

    def write(self, block: Tensor) -> None:
        for piece in pieces(block):
            self._file.write(quantize(piece, 16).short().T.contiguous().numpy().tobytes())

    def finish(self) -> None:
        """Do nothing: the header has the size already."""

    def abort(self) -> None:
        """Do nothing: the file is not finished elsewhere."""
