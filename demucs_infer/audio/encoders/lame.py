"""MP3 through `lameenc`, which is LAME and no more; the tags and the header are written here.

The build of LAME inside the wheels of PyAV takes four times as long for the same work. What LAME
leaves to its front ends is the Info frame before the music: how much silence the encoder put around
it, and where in the file each hundredth begins.

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
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.tags import Cover

_MPEG_1 = 3
_BITRATES = {  # kbit/s of layer 3, by whether it is MPEG-1
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)
_HALVED = {_MPEG_1: 0, 2: 1, 0: 2}  # how often, by the version bits: MPEG-2, and 2.5
_MONO = 3
_DELAY = 576  # samples that LAME puts before the first
_INFO_BYTES = 156  # the Info frame behind its header and side information
_CONSTANT, _VARIABLE = 1, 4  # methods, as LAME and the Info frame number them
_MOST_PLACES = 400  # remembered of a file, however long: a hundredth is looked up in them


def has_lame() -> bool:
    """Whether there is LAME to be had without FFmpeg."""
    return find_spec("lameenc") is not None


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The four bytes at the beginning of every frame, as a number."""

    word: int

    def __post_init__(self) -> None:
        is_layer_3 = self.word >> 21 == 0x7FF and self.word >> 17 & 3 == 1
        if not (
            is_layer_3 and self.version in _HALVED and self.word >> 10 & 3 < 3 and self.bitrate
        ):
            raise ValueError(f"{self.word:08x} begins no frame of MPEG layer 3")

    @property
    def version(self) -> int:
        """3 for MPEG-1, 2 for MPEG-2, 0 for its extension to low rates."""
        return self.word >> 19 & 3

    @property
    def bitrate(self) -> int:
        """In kbit/s; 0 where the number stands for none."""
        rates = _BITRATES[self.version == _MPEG_1]
        place = self.word >> 12 & 15
        return rates[place] if place < len(rates) else 0

    @property
    def rate(self) -> int:
        """Samples a second."""
        return _RATES[self.word >> 10 & 3] >> _HALVED[self.version]

    @property
    def samples(self) -> int:
        """How many each channel has in a frame."""
        return 1152 if self.version == _MPEG_1 else 576

    @property
    def side_bytes(self) -> int:
        """Side information between the header and the music."""
        is_mono = self.word >> 6 & 3 == _MONO
        return {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[
            self.version == _MPEG_1, is_mono
        ]

    @property
    def length(self) -> int:
        """Bytes from this header to the next."""
        padding = self.word >> 9 & 1
        return self.samples // 8 * self.bitrate * 1000 // self.rate + padding

    def with_room(self) -> "FrameHeader":
        """The same kind of frame, at the next bit rate at which an Info frame fits."""
        first = self.word >> 12 & 15
        plain = self.word & ~(15 << 12) & ~(1 << 9)
        choices = (FrameHeader(plain | place << 12) for place in range(first, 15))
        return next(one for one in choices if one.length >= 4 + one.side_bytes + _INFO_BYTES)


@lru_cache(maxsize=256)
def _frame_length(word: int) -> int:
    """Of a frame with that header: a file has a few of them, and thousands of frames."""
    return FrameHeader(word).length


class LameEncoder:
    """Takes float samples, leaves an mp3 that comes back with its length and in its place."""

    def __init__(
        self,
        file: BinaryIO,
        encoding: Encoding,
        sample_rate: int,
        channels: int,
        *,
        tags: Mapping[str, str] | None = None,
        cover: Cover | None = None,
    ) -> None:
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
        self._lame.set_out_sample_rate(sample_rate)  # or LAME chooses a lower one for few bits
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
        self._samples = 0
        self._first: FrameHeader | None = None
        self._frames = 0
        self._places: list[int] = []
        """Where every so many of them begin, counted from the first."""
        self._every = 1
        self._next = 0
        """Where the next one begins."""
        self._music = 0
        """Bytes of it so far."""
        self._rest = b""
        """The last of them, where a header may have begun."""

    def write(self, block: Tensor) -> None:
        """The next samples (C T)."""
        for piece in pieces(block):
            samples = quantize(piece, 16).short().T.contiguous().numpy().tobytes()
            self._samples += piece.shape[-1]
            self._add(bytes(self._lame.encode(samples)))

    def finish(self) -> None:
        """Write what LAME still holds, and the Info frame."""
        if not self._samples:
            self._lame.encode(b"")
        self._add(bytes(self._lame.flush()))
        if self._first:
            self._file.seek(self._start)
            self._file.write(self._info_frame(self._first))
            self._file.seek(0, io.SEEK_END)

    def abort(self) -> None:
        """Stop; the file is incomplete."""

    def _add(self, data: bytes) -> None:
        known = self._rest + data
        begins = self._music - len(self._rest)
        while self._next + 4 <= begins + len(known):
            place = self._next - begins
            word = int.from_bytes(known[place : place + 4], "big")
            if not self._first:
                self._first = FrameHeader(word).with_room()
                self._file.write(bytes(self._first.length))
            self._remember(self._next)
            self._next += _frame_length(word)
        self._file.write(data)
        self._music += len(data)
        self._rest = known[-3:]

    def _remember(self, place: int) -> None:
        if self._frames % self._every == 0:
            self._places.append(place)
        self._frames += 1
        if len(self._places) > _MOST_PLACES:
            del self._places[1::2]
            self._every *= 2

    def _info_frame(self, header: FrameHeader) -> bytes:
        total = header.length + self._music
        nearest = (percent * self._frames // (100 * self._every) for percent in range(100))
        places = (header.length + self._places[index] for index in nearest)
        padding = self._frames * header.samples - _DELAY - self._samples
        is_variable = self._quality is not None
        body = b"".join(
            [
                header.word.to_bytes(4, "big"),
                bytes(header.side_bytes),
                b"Xing" if is_variable else b"Info",
                struct.pack(">III", 0xF, self._frames, total),  # which fields follow: all
                bytes(min(256 * place // total, 255) for place in places),
                struct.pack(">I", max(0, 100 - 10 * (self._quality or 0) - self._preset)),
                b"LAME3.100",
                bytes([_VARIABLE if is_variable else _CONSTANT]),
                bytes(1 + 8 + 1),  # low-pass, loudness, flags: not said
                bytes([min(255, header.bitrate)]),
                (_DELAY << 12 | padding).to_bytes(3, "big"),
                bytes(1 + 1 + 2),  # not said
                struct.pack(">I", total),
                bytes(2),  # of the music: not said
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
    """The tags as FFmpeg writes them: the first part of a file without music."""
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
    """The checksum of an Info frame: x^16 + x^15 + x^2 + 1, lowest bit first."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc
