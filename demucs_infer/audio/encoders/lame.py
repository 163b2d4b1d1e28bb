"""Encode MP3 with LAME through `lameenc`, and write the tags and the Info frame.

The LAME in PyAV's wheels is four times as slow. The Info frame before the audio declares the delay
and padding of the encoder, for gapless decoding, and a seek table. LAME does not write it, so it is
written here.

Shapes: C channels, T samples of a block.
"""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import BinaryIO

from torch import Tensor

from demucs_infer.audio.encoders.base import pieces, quantize
from demucs_infer.audio.encoders.pyav import Muxer
from demucs_infer.audio.formats import MPEG_1_BITRATES, MPEG_2_BITRATES, Encoding
from demucs_infer.audio.tags import Cover

_MPEG_1 = 3
_BITRATES = {True: (0, *MPEG_1_BITRATES), False: (0, *MPEG_2_BITRATES)}  # is it MPEG-1?
_RATES = (44100, 48000, 32000)
_HALVED = {_MPEG_1: 0, 2: 1, 0: 2}  # how often MPEG-2 and MPEG-2.5 halve the rate, by version bits
_MONO = 3
_DELAY = 576  # samples of silence that LAME inserts at the beginning
_INFO_BYTES = 156  # of the Info frame, after header and side information
_CONSTANT, _VARIABLE = 1, 4  # bit rate methods, as in LAME and the Info frame
_MAX_OFFSETS = 400  # frame offsets kept for the seek table, which has a hundred


def has_lame() -> bool:
    """Return whether lameenc is installed."""
    return find_spec("lameenc") is not None


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The header of an MPEG layer 3 frame: its first four bytes as a number."""

    word: int

    def __post_init__(self) -> None:
        is_layer_3 = self.word >> 21 == 0x7FF and self.word >> 17 & 3 == 1
        if not (
            is_layer_3 and self.version in _HALVED and self.word >> 10 & 3 < 3 and self.bitrate
        ):
            raise ValueError(f"invalid header of an MPEG layer 3 frame: {self.word:08x}")

    @property
    def version(self) -> int:
        """3 for MPEG-1, 2 for MPEG-2, 0 for MPEG-2.5."""
        return self.word >> 19 & 3

    @property
    def bitrate(self) -> int:
        """Bit rate in kbit/s; 0 if undefined."""
        rates = _BITRATES[self.version == _MPEG_1]
        index = self.word >> 12 & 15
        return rates[index] if index < len(rates) else 0

    @property
    def rate(self) -> int:
        """Sample rate in Hz."""
        return _RATES[self.word >> 10 & 3] >> _HALVED[self.version]

    @property
    def samples(self) -> int:
        """Number of samples per channel in a frame."""
        return 1152 if self.version == _MPEG_1 else 576

    @property
    def side_bytes(self) -> int:
        """Number of bytes of side information after the header."""
        is_mono = self.word >> 6 & 3 == _MONO
        return {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[
            self.version == _MPEG_1, is_mono
        ]

    @property
    def length(self) -> int:
        """Length of the frame in bytes."""
        padding = self.word >> 9 & 1
        return self.samples // 8 * self.bitrate * 1000 // self.rate + padding

    def for_info_frame(self) -> "FrameHeader":
        """Return this header with its own or the next higher bit rate that fits an Info frame."""
        first = self.word >> 12 & 15
        plain = self.word & ~(15 << 12) & ~(1 << 9)
        headers = (FrameHeader(plain | index << 12) for index in range(first, 15))
        return next(
            header for header in headers if header.length >= 4 + header.side_bytes + _INFO_BYTES
        )


@lru_cache(maxsize=256)
def _frame_length(word: int) -> int:
    """Return the length of a frame; a file has few different headers and thousands of frames."""
    return FrameHeader(word).length


class LameEncoder:
    """Encodes MP3 that decodes to the original length without delay."""

    def __init__(
        self,
        file: BinaryIO,
        encoding: Encoding,
        sample_rate: int,
        channels: int,
        *,
        tags: Mapping[str, str] | None = None,
        cover: Cover | None = None,
        num_samples: int | None = None,
    ) -> None:
        """Begin a file; with `num_samples`, which have to follow, it is never rewritten."""
        import lameenc

        kind = encoding.kind
        preset = kind.default_preset if encoding.preset is None else encoding.preset
        assert preset is not None
        self._preset = preset
        self._quality = encoding.quality
        self._lame = lameenc.Encoder()
        self._lame.silence()
        self._lame.set_channels(channels)
        self._lame.set_in_sample_rate(sample_rate)
        self._lame.set_out_sample_rate(sample_rate)  # else LAME lowers it at low bit rates
        self._lame.set_quality(preset)
        bitrate = encoding.bitrate_for(channels)
        if bitrate is None:
            self._lame.set_vbr(_VARIABLE)
            self._lame.set_vbr_quality(encoding.quality)
        else:
            self._lame.set_bit_rate(bitrate // 1000)
        self._file = file
        self._file.write(_id3(encoding, sample_rate, channels, tags, cover))
        self._start = file.tell()
        self._num_samples = num_samples
        self._samples = 0
        self._info_header: FrameHeader | None = None
        self._frames = 0
        self._offsets: list[int] = []
        """Offset of every `_interval`-th frame, from the first one."""
        self._interval = 1
        self._next_offset = 0
        """Offset of the next frame."""
        self._audio_bytes = 0
        self._tail = b""
        """The last bytes written, in which a header may begin."""

    def write(self, block: Tensor) -> None:
        """Encode the next samples (C, T)."""
        for piece in pieces(block):
            samples = quantize(piece, 16).short().T.contiguous().numpy().tobytes()
            self._samples += piece.shape[-1]
            self._add(bytes(self._lame.encode(samples)))

    def finish(self) -> None:
        """Write what LAME still buffers, and the Info frame."""
        if not self._samples:
            self._lame.encode(b"")
        self._add(bytes(self._lame.flush()))
        if self._info_header and self._num_samples is None:
            self._file.seek(self._start)
            self._file.write(self._info_frame(self._info_header))
            self._file.seek(0, io.SEEK_END)

    def abort(self) -> None:
        """Stop encoding, and leave the file incomplete."""

    def _add(self, data: bytes) -> None:
        buffer = self._tail + data
        buffer_offset = self._audio_bytes - len(self._tail)
        while self._next_offset + 4 <= buffer_offset + len(buffer):
            start = self._next_offset - buffer_offset
            word = int.from_bytes(buffer[start : start + 4], "big")
            if not self._info_header:
                self._info_header = FrameHeader(word).for_info_frame()
                self._file.write(self._first_frame(self._info_header))
            self._record_frame(self._next_offset)
            self._next_offset += _frame_length(word)
        self._file.write(data)
        self._audio_bytes += len(data)
        self._tail = buffer[-3:]

    def _record_frame(self, offset: int) -> None:
        if self._frames % self._interval == 0:
            self._offsets.append(offset)
        self._frames += 1
        if len(self._offsets) > _MAX_OFFSETS:
            del self._offsets[1::2]
            self._interval *= 2

    def _first_frame(self, header: FrameHeader) -> bytes:
        """Return the Info frame if the length of the file is given, else its place."""
        if self._num_samples is None:
            return bytes(header.length)
        # As in LAME's `lame_encode_flush`: the padding is at least 576 samples.
        frames = -(-(_DELAY + self._num_samples + 576) // header.samples)
        size = frames * header.samples * header.bitrate * 125 // header.rate
        return self._make_info_frame(
            header,
            frames,
            self._num_samples,
            size,
            [percent * size // 100 for percent in range(100)],
        )

    def _info_frame(self, header: FrameHeader) -> bytes:
        indices = (percent * self._frames // (100 * self._interval) for percent in range(100))
        offsets = [self._offsets[index] for index in indices]
        return self._make_info_frame(
            header, self._frames, self._samples, self._audio_bytes, offsets
        )

    def _make_info_frame(
        self, header: FrameHeader, frames: int, samples: int, audio_bytes: int, offsets: list[int]
    ) -> bytes:
        """Return the frame; `offsets` are those of each percent of the audio."""
        total = header.length + audio_bytes
        padding = frames * header.samples - _DELAY - samples
        is_variable = self._quality is not None
        body = b"".join(
            [
                header.word.to_bytes(4, "big"),
                bytes(header.side_bytes),
                b"Xing" if is_variable else b"Info",
                struct.pack(">III", 0xF, frames, total),  # all fields follow
                bytes(min(256 * (header.length + offset) // total, 255) for offset in offsets),
                struct.pack(">I", max(0, 100 - 10 * (self._quality or 0) - self._preset)),
                b"LAME3.100",
                bytes([_VARIABLE if is_variable else _CONSTANT]),
                bytes(1 + 8 + 1),  # low-pass, loudness, flags: unknown
                bytes([min(255, header.bitrate)]),
                (_DELAY << 12 | padding).to_bytes(3, "big"),
                bytes(1 + 1 + 2),  # unknown
                struct.pack(">I", total),
                bytes(2),  # checksum of the audio: unknown
            ]
        )
        return (body + _crc16(body).to_bytes(2, "big")).ljust(header.length, b"\0")


def _id3(
    encoding: Encoding,
    sample_rate: int,
    channels: int,
    tags: Mapping[str, str] | None,
    cover: Cover | None,
) -> bytes:
    """Return the ID3 tags that FFmpeg writes at the beginning of a file without audio."""
    file = io.BytesIO()
    Muxer(file, encoding, sample_rate, channels, tags=tags, cover=cover).finish()
    data = file.getvalue()
    if not data.startswith(b"ID3"):
        return b""
    size = 0
    for seven_bits in data[6:10]:
        size = size << 7 | seven_bits
    return data[: 10 + size]


def _crc16(data: bytes) -> int:
    """Return the checksum of an Info frame: x^16 + x^15 + x^2 + 1, lowest bit first."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc
