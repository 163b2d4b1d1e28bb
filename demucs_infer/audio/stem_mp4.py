"""Write `.stem.mp4` files for DJ software: the mix and four stems, in Native Instruments' format.

It is an MP4 with five audio tracks; other players play the first one, the mix. Names and colors
of the stems are JSON in the box moov/udta/stem.

Shapes: C channels, T samples of a block.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from torch import Tensor

from demucs_infer.audio.encoders.base import pieces
from demucs_infer.audio.encoders.pyav import Muxer
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.gain import Clip, LevelWriter, round_together, translate_os_errors
from demucs_infer.audio.tags import parse_cover
from demucs_infer.audio.writer import AtomicFile, Target, check_shape
from demucs_infer.errors import AudioWriteError

MIX = "mix"
"""Name of the first track in `StemMp4.write`."""

NUM_STEMS = 4  # fixed by the format
_COLORS = {"drums": "#009E73", "bass": "#D55E00", "other": "#CC79A7", "vocals": "#56B4E9"}
_MASTERING = {  # applied by players to the sum of the stems; all switched off
    "compressor": {
        "enabled": False,
        "ratio": 3,
        "output_gain": 0.5,
        "release": 0.3,
        "attack": 0.003,
        "input_gain": 0.5,
        "threshold": 0,
        "hp_cutoff": 300,
        "dry_wet": 50,
    },
    "limiter": {"enabled": False, "release": 0.05, "threshold": 0, "ceiling": -0.35},
}


class StemMp4(LevelWriter):
    """Writes a `.stem.mp4`: `with StemMp4("song.stem.mp4", 44100, 2, ["drums", ...]) as file`.

    `write({"mix": block, "drums": block, ...})` takes the next samples of all five tracks;
    `close()` returns the levels. The codec is AAC, or ALAC, which some players refuse. `colors`
    (`#RRGGBB` by stem) replace the default ones.
    """

    def __init__(
        self,
        path: Target,
        sample_rate: int,
        channels: int,
        stems: Sequence[str],
        *,
        encoding: Encoding | None = None,
        clip: Clip = "track",
        colors: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        cover: bytes | None = None,
        overwrite: bool = True,
    ) -> None:
        encoding = encoding or Encoding("m4a")
        if encoding.format not in ("m4a", "alac"):
            raise ValueError(
                f"unsupported format for a stem file: {encoding.format}; use m4a (AAC) or alac"
            )
        if len(set(stems) - {MIX}) != NUM_STEMS or len(stems) != NUM_STEMS:
            raise ValueError(
                f"a stem file needs {NUM_STEMS} different stems, got {list(stems)}: "
                "sum some of them, or choose four"
            )
        check_shape(encoding, sample_rate, channels)
        if encoding.kind.rate_for(sample_rate) != sample_rate:
            raise AudioWriteError(
                f"unsupported sample rate for AAC: {sample_rate} Hz; resample to 44100"
            )
        file = AtomicFile(path, overwrite=overwrite)
        try:
            with translate_os_errors(file.name):
                muxer = Muxer(
                    file.file,
                    encoding,
                    sample_rate,
                    channels,
                    options={"brand": "mp42"},
                    titles=("Master", *map(str.capitalize, stems)),
                    tags=tags,
                    cover=parse_cover(cover),
                )
        except BaseException:
            file.discard()
            raise
        super().__init__(
            _StemMp4Sink(file, muxer, encoding, stems, _stem_manifest(stems, colors or {})),
            (MIX, *stems),
            channels,
            encoding,
            clip=clip,
            exact_sum=False,  # the sink rounds the stems together, without the mix
            spool_folder=file.final.parent if file.final else None,
        )


def _stem_manifest(stems: Sequence[str], colors: Mapping[str, str]) -> bytes:
    """Return the JSON with the names and colors of the stems."""
    fixed = {name: color for name, color in {**_COLORS, **colors}.items() if name in stems}
    free = [color for color in _COLORS.values() if color not in fixed.values()]
    entries = [
        {"name": name.capitalize(), "color": fixed[name] if name in fixed else free.pop(0)}
        for name in stems
    ]
    content = {"mastering_dsp": _MASTERING, "version": 1, "stems": entries}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


class _StemMp4Sink:
    """Writes the five tracks of a `StemMp4` to one container."""

    def __init__(
        self,
        file: AtomicFile,
        muxer: Muxer,
        encoding: Encoding,
        stems: Sequence[str],
        manifest: bytes,
    ) -> None:
        self.name = file.name
        self._file = file
        self._muxer = muxer
        self._encoding = encoding
        self._stems = tuple(stems)
        self._manifest = manifest

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """Write the next samples of the mix and of every stem."""
        stems = {name: blocks[name] for name in self._stems}
        if self._encoding.is_integer:
            stems = round_together(stems, self._encoding.depth)
        for moment in zip(pieces(blocks[MIX]), *map(pieces, stems.values()), strict=True):
            for track, piece in enumerate(moment):
                self._muxer.write(piece, track)

    def close(self) -> None:
        """Complete the file, insert the manifest, and give it its final name."""
        self._muxer.finish()
        insert_stem_box(self._file.file, self._manifest)
        self._file.commit()

    def abort(self) -> None:
        """Delete the file."""
        self._muxer.abort()
        self._file.discard()


@dataclass(frozen=True, slots=True)
class _Box:
    """A box of an MP4 file; its header begins at `start`, its content at `body`."""

    kind: bytes
    start: int
    body: int
    stop: int


def _boxes(file: BinaryIO, start: int, stop: int) -> Iterator[_Box]:
    """Yield the boxes between two positions of a file."""
    while start + 8 <= stop:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        body = start + 8
        if size == 1:  # a 64-bit size follows
            (size,) = struct.unpack(">Q", file.read(8))
            body += 8
        elif size == 0:  # up to the end
            size = stop - start
        yield _Box(kind, start, body, start + size)
        start += max(size, 8)


def insert_stem_box(file: BinaryIO, content: bytes) -> None:
    """Insert a `stem` box into moov/udta of a complete MP4.

    FFmpeg writes moov after the samples, so that none of them moves.
    """
    end = file.seek(0, 2)
    moov = next(box for box in _boxes(file, 0, end) if box.kind == b"moov")
    assert moov.stop == end, "samples after moov would move"
    stem = struct.pack(">I4s", 8 + len(content), b"stem") + content
    udta = next((box for box in _boxes(file, moov.body, end) if box.kind == b"udta"), None)
    if udta is None:
        stem = struct.pack(">I4s", 8 + len(stem), b"udta") + stem
    position = udta.stop if udta else end
    file.seek(position)
    rest = file.read()
    file.seek(position)
    file.write(stem + rest)
    for parent in (moov, udta):
        if parent:
            file.seek(parent.start)
            file.write(struct.pack(">I", parent.stop - parent.start + len(stem)))
