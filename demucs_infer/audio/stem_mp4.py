"""Write `.stem.mp4` files for DJ software: the mixture and four stems in one file.

The format of Native Instruments is an MP4 with five audio tracks; ordinary players play the first
one, the mixture. Names and colors of the stems are JSON in the box moov/udta/stem, which is
inserted here, as FFmpeg cannot write it.

Shapes: C channels, T samples of a block.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from torch import Tensor

from demucs_infer.audio.encoders.base import pieces
from demucs_infer.audio.encoders.pyav import Muxer
from demucs_infer.audio.formats import NUM_STEMS, Encoding
from demucs_infer.audio.gain import round_together, translate_os_errors
from demucs_infer.audio.tags import parse_cover
from demucs_infer.audio.writer import AtomicFile, Target, check_shape
from demucs_infer.errors import AudioWriteError

MIX = "mix"
"""The name of the first track in `StemMp4.write`."""

_COLORS = {"drums": "#009E73", "bass": "#D55E00", "other": "#CC79A7", "vocals": "#56B4E9"}
_MASTERING = {  # effects that players apply to the sum of the stems; all are disabled
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


class StemMp4:
    """A `.stem.mp4`: `with StemMp4("song.stem.mp4", 44100, 2, ["drums", ...]) as file`.

    `write({"mix": block, "drums": block, ...})` takes the next samples of all five tracks. They
    are AAC by default; some players do not support `Encoding("alac")`. `colors` replaces the
    default colors; it maps stems to `#RRGGBB`.
    """

    def __init__(
        self,
        path: Target,
        sample_rate: int,
        channels: int,
        stems: Sequence[str],
        *,
        encoding: Encoding | None = None,
        colors: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        cover: bytes | None = None,
        overwrite: bool = True,
        temp_folder: Path | None = None,
    ) -> None:
        encoding = encoding or Encoding("m4a")
        check_stem_mp4(encoding, sample_rate, stems)
        check_shape(encoding, sample_rate, channels)
        self._encoding = encoding
        self._stems = tuple(stems)
        self._manifest = _make_manifest(stems, colors or {})
        self._file = AtomicFile(path, overwrite=overwrite, temp_folder=temp_folder)
        self._is_finished = False
        try:
            with translate_os_errors(self._file.name):
                self._muxer = Muxer(
                    self._file.file,
                    encoding,
                    sample_rate,
                    channels,
                    options={"brand": "mp42"},
                    titles=("Master", *map(str.capitalize, stems)),
                    tags=tags,
                    cover=parse_cover(cover),
                )
        except BaseException:
            self._file.discard()
            raise

    @property
    def name(self) -> str:
        """Name of the file in messages."""
        return self._file.name

    def temp_path(self, stem: str) -> Path:  # noqa: ARG002 (as other sinks have it)
        """Return the path of the file until `commit`, the same for all stems."""
        return self._file.temp_path

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """Encode the next samples of the mix and of every stem."""
        stems = {name: blocks[name] for name in self._stems}
        if self._encoding.is_integer:  # only the stems: the mixture is their sum
            stems = round_together(stems, self._encoding.depth)
        for moment in zip(pieces(blocks[MIX]), *map(pieces, stems.values()), strict=True):
            for track, piece in enumerate(moment):
                self._muxer.write(piece, track)

    def finish(self) -> None:
        """Complete the file, still under its temporary name."""
        if not self._is_finished:
            self._is_finished = True
            self._muxer.finish()
            insert_stem_box(self._file.file, self._manifest)
            self._file.file.flush()

    def commit(self) -> None:
        """Complete the file, then rename it to its final name."""
        self.finish()
        self._file.commit()

    def abort(self) -> None:
        """Remove the file."""
        if not self._is_finished:
            self._muxer.abort()
        self._file.discard()

    def __enter__(self) -> "StemMp4":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            with translate_os_errors(self.name):
                self.commit()
        except BaseException:
            self.abort()
            raise


def check_stem_mp4(encoding: Encoding, sample_rate: int, stems: Sequence[str]) -> None:
    """Check that a stem file supports the encoding, sample rate and stems.

    Raises:
        ValueError: The format is not AAC or ALAC, or there are not four stems.
        AudioWriteError: The sample rate is not supported.
    """
    if encoding.format not in ("m4a", "alac"):
        raise ValueError(f"unsupported format {encoding.format} in a stem file: use m4a or alac")
    check_stem_count(stems)
    if encoding.kind.rate_for(sample_rate) != sample_rate:
        raise AudioWriteError(f"AAC does not support {sample_rate} Hz; resample to 44100")


def check_stem_count(stems: Sequence[str]) -> None:
    """Raise `ValueError` unless there are as many stems as a stem file has."""
    if len(set(stems) - {MIX}) != NUM_STEMS or len(stems) != NUM_STEMS:
        raise ValueError(
            f"a stem file has {NUM_STEMS} stems, not {len(stems)} ({', '.join(stems)}): "
            "choose four of them, or sum some"
        )


def _make_manifest(stems: Sequence[str], colors: Mapping[str, str]) -> bytes:
    """Return the JSON that names the stems."""
    fixed = {name: color for name, color in {**_COLORS, **colors}.items() if name in stems}
    free = [color for color in _COLORS.values() if color not in fixed.values()]
    named = [
        {"name": name.capitalize(), "color": fixed[name] if name in fixed else free.pop(0)}
        for name in stems
    ]
    content = {"mastering_dsp": _MASTERING, "version": 1, "stems": named}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class _Box:
    """A box of an MP4 file: its header begins at `start`, its content at `body`."""

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
        if size == 1:  # more than 32 bits
            (size,) = struct.unpack(">Q", file.read(8))
            body += 8
        elif size == 0:  # up to the end
            size = stop - start
        yield _Box(kind, start, body, start + size)
        start += max(size, 8)


def insert_stem_box(file: BinaryIO, content: bytes) -> None:
    """Insert a `stem` box into moov/udta of a complete MP4.

    FFmpeg writes moov after the samples, so their positions do not change.
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
    for grown in (moov, udta):
        if grown:
            file.seek(grown.start)
            file.write(struct.pack(">I", grown.stop - grown.start + len(stem)))
