"""Encode Ogg Vorbis with libsndfile (libvorbis).

Shapes: C channels, T samples of a block.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import BinaryIO

from torch import Tensor

from demucs_infer.audio.encoders.base import FileProxy, pieces
from demucs_infer.audio.formats import Encoding
from demucs_infer.errors import AudioWriteError

_PIECE = 4096  # libvorbis puts a piece on the stack, which a long one overflows
_CHANNEL_ORDER = {  # by number of channels: Vorbis' order, as indices into FFmpeg's order
    1: [0],
    2: [0, 1],
    3: [0, 2, 1],
    4: [0, 1, 2, 3],
    5: [0, 2, 1, 3, 4],
    6: [0, 2, 1, 4, 5, 3],
    7: [0, 2, 1, 5, 6, 4, 3],
    8: [0, 2, 1, 6, 7, 4, 5, 3],
}


class _NonRaisingProxy(FileProxy):
    """Report a failed write as a short one: libsndfile's callbacks may not raise."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return 0

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)


class SndfileEncoder:
    """Encode Vorbis with libvorbis, which sounds better than FFmpeg's own Vorbis encoder."""

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
                "writing ogg vorbis needs the package soundfile, which is not installed: "
                "pip install soundfile, or choose opus"
            ) from error
        # libsndfile does not reorder channels.
        self._order = _CHANNEL_ORDER[channels]
        kind = encoding.kind
        quality = encoding.quality if encoding.quality is not None else kind.default_quality
        assert quality is not None
        self._proxy = _NonRaisingProxy(file)
        self._error_class = soundfile.SoundFileError
        self._file = soundfile.SoundFile(
            self._proxy,
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
        """Encode the next samples (C, T)."""
        for piece in pieces(block, _PIECE):
            samples = piece[self._order].T.contiguous().numpy()
            self._call(functools.partial(self._file.write, samples))

    def finish(self) -> None:
        """Write what the encoder still buffers."""
        self._call(self._file.close)

    def _call(self, action: Callable[[], object]) -> None:
        """Run `action`; if it fails, raise the error of the file rather than libsndfile's."""
        try:
            action()
        except self._error_class as error:
            raise self._proxy.error or AudioWriteError(f"libsndfile failed: {error}") from error
        if self._proxy.error:
            raise self._proxy.error

    def abort(self) -> None:
        """Stop encoding, in any state; nothing more is written to the file."""
        self._proxy.is_aborted = True
        with contextlib.suppress(self._error_class, OSError):
            self._file.close()
