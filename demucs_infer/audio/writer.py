"""Write sound to a file, block by block; it appears under its name when it is complete.

Shapes: C channels, T samples of a block. Samples are floats, 1.0 is full scale.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, TypeAlias

from torch import Tensor

from demucs_infer.audio.channels import StreamResampler
from demucs_infer.audio.encoders.base import Encoder, pieces
from demucs_infer.audio.encoders.lame import LameEncoder, has_lame
from demucs_infer.audio.encoders.pyav import Muxer
from demucs_infer.audio.encoders.vorbis import SndfileEncoder
from demucs_infer.audio.formats import FORMATS, Encoding, format_of, source_depth
from demucs_infer.audio.gain import check_block, peak_of, prevent_clip, translate_os_errors
from demucs_infer.audio.tags import Cover, cover_of
from demucs_infer.errors import AudioWriteError

__all__ = [
    "FORMATS",
    "AudioWriter",
    "AtomicFile",
    "Encoding",
    "format_of",
    "prevent_clip",
    "save_audio",
    "source_depth",
]

Target: TypeAlias = "str | os.PathLike[str] | BinaryIO"


class AtomicFile:
    """A file under a temporary name in the same folder, until `commit` renames it.

    A file object instead of a path gets the bytes at `commit`, from a nameless temporary file;
    it need not be seekable.
    """

    def __init__(self, target: Target, *, overwrite: bool = True) -> None:
        self._temporary: Path | None = None
        self._sink: BinaryIO | None = None
        self.final: Path | None = None
        self.file: BinaryIO
        if isinstance(target, (str, os.PathLike)):
            self.final = Path(target)
            self._overwrite = overwrite
            with translate_os_errors(self.name):
                self._check_free()
            # Its own short name: the final one may already be as long as a name can be.
            self._temporary = self.final.parent / f".{secrets.token_hex(8)}.part"
            with translate_os_errors(self.name):
                self.file = self._temporary.open("x+b")
        else:
            self._sink = target
            with translate_os_errors(self.name):
                self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by discard)

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self.final) if self.final else "the file object"

    def _check_free(self) -> None:
        assert self.final is not None
        if self.final.is_dir():
            raise AudioWriteError(f"cannot write {self.name}: it is a folder")
        if not self._overwrite and self.final.exists():
            raise AudioWriteError(f"{self.name} exists already; remove it or allow to overwrite")

    def commit(self) -> None:
        """Give the file its name, in one step."""
        try:
            with translate_os_errors(self.name):
                if self._sink is not None:
                    self.file.seek(0)
                    shutil.copyfileobj(self.file, self._sink)
                self.file.close()
                if self._temporary and self.final:
                    self._check_free()
                    self._temporary.replace(self.final)
                    self._temporary = None
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind; harmless after `commit`."""
        with suppress(OSError):  # a full disk is told again by the flush that closing does
            self.file.close()
        if self._temporary:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            self._temporary = None


class AudioWriter:
    """One file of sound. `with AudioWriter("vocals.flac", 44100, 2) as out: out.write(block)`.

    The format comes from the suffix unless it is named. Nothing is seen under `path` before
    `close` (which leaving the `with` block calls); after `abort`, or any error, nothing is left.
    Blocks must not be changed by others while they are being written.
    """

    def __init__(
        self,
        path: Target,
        sample_rate: int,
        channels: int,
        *,
        format: str | None = None,
        bits: int | None = None,
        bitrate: int | None = None,
        quality: int | None = None,
        preset: int | None = None,
        tags: Mapping[str, str] | None = None,
        cover: bytes | None = None,
        overwrite: bool = True,
    ) -> None:
        if format is None:
            if not isinstance(path, (str, os.PathLike)):
                raise ValueError("a file object has no suffix: name the format")
            format = format_of(Path(path))
        self.encoding = Encoding(format, bits=bits, bitrate=bitrate, quality=quality, preset=preset)
        check_shape(self.encoding, sample_rate, channels)
        self.channels = channels
        self.peak = 0.0
        """The largest absolute sample so far, as given."""
        self._bytes = 0
        kind = self.encoding.kind
        rate = kind.rate_for(sample_rate)
        self._resampler = _resampler(sample_rate, rate, channels)
        self._draft = AtomicFile(path, overwrite=overwrite)
        self._is_open = True
        self._encoder: Encoder | None = None
        with self._or_nothing():
            self._encoder = _encoder(
                self._draft.file, self.encoding, rate, channels, tags, cover_of(cover)
            )

    @property
    def name(self) -> str:
        """What to call the file in a message."""
        return self._draft.name

    def write(self, block: Tensor) -> None:
        """The next samples (C T), float; the first that is not finite ends it with an error."""
        if not self._is_open:
            raise ValueError("write to a closed AudioWriter")
        with self._or_nothing():
            block = check_block(block, self.channels, self._draft.name)
            self._bytes += block.numel() * self.encoding.depth // 8
            self._check_length()
            self.peak = max(self.peak, peak_of(block, self.name))
            self._encode(self._resampler.push(block) if self._resampler else block)

    def _encode(self, block: Tensor) -> None:
        assert self._encoder is not None
        self._encoder.write(block)

    def _check_length(self) -> None:
        limit = self.encoding.kind.max_bytes
        if limit and self._bytes > limit - (1 << 20):  # headers and tags need room too
            raise AudioWriteError(
                f"{self.name} would be longer than {self.encoding.format} can say; "
                "choose wav, flac or caf"
            )

    def finish(self) -> None:
        """Complete the file, still under its temporary name; `close` then only renames it."""
        if self._is_open and self._encoder:
            with self._or_nothing():
                if self._resampler:
                    self._encode(self._resampler.finish())
                self._encoder.finish()
                self._encoder = None
                self._draft.file.flush()

    def close(self) -> None:
        """Complete the file and give it its name."""
        self.finish()
        if self._is_open:
            self._is_open = False
            self._draft.commit()

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._encoder:
            self._encoder.abort()
            self._encoder = None
        self._is_open = False
        self._draft.discard()

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Any error inside leaves no file; those of the system are explained."""
        try:
            with translate_os_errors(self._draft.name):
                yield
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def check_shape(encoding: Encoding, sample_rate: int, channels: int) -> None:
    """An error for what the format cannot hold."""
    most = len(encoding.kind.layouts)
    if not 1 <= channels <= most:
        raise AudioWriteError(
            f"{encoding.format} holds 1 to {most} channels, not {channels}; "
            "write fewer, or choose wav"
        )
    if not 1 <= sample_rate <= 655_350:  # where FLAC ends, and everything that records sound
        raise AudioWriteError(f"a sample rate of {sample_rate} Hz cannot be written")


def _resampler(from_rate: int, to_rate: int, channels: int) -> StreamResampler | None:
    if from_rate == to_rate:
        return None
    return StreamResampler(from_rate, to_rate, channels)


def _encoder(
    file: BinaryIO,
    encoding: Encoding,
    sample_rate: int,
    channels: int,
    tags: Mapping[str, str] | None,
    cover: Cover | None,
) -> Encoder:
    if encoding.codec.encoder == "libsndfile":
        return SndfileEncoder(file, encoding, sample_rate, channels, tags=tags)
    if encoding.format == "mp3" and has_lame():
        return LameEncoder(file, encoding, sample_rate, channels, tags=tags, cover=cover)
    return Muxer(file, encoding, sample_rate, channels, tags=tags, cover=cover)


def save_audio(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int,
    bitrate: int = 320,
    clip: Literal["rescale", "clamp", "tanh", "none"] | None = "rescale",
    bits_per_sample: Literal[16, 24, 32] = 16,
    as_float: bool = False,
    preset: Literal[2, 3, 4, 5, 6, 7] = 2,
) -> None:
    """Save a whole track (C T), with upstream's signature; the suffix of `path` chooses the format.

    `bitrate` (kbit/s) and `preset` are those of mp3, `bits_per_sample` and `as_float` those of
    formats without loss.
    """
    kind = FORMATS[format_of(Path(path))]
    is_mp3 = kind.name == "mp3"
    peak_of(wav.detach(), str(path))
    with AudioWriter(
        path,
        samplerate,
        len(wav),
        bits=(32 if as_float else bits_per_sample) if kind.depths else None,
        bitrate=bitrate if is_mp3 else None,
        preset=preset if is_mp3 else None,
    ) as out:
        for piece in pieces(prevent_clip(wav, mode=clip)):
            out.write(piece)
