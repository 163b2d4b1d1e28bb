"""Write audio files block by block; a file appears under its name when it is complete.

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
from typing import BinaryIO, TypeAlias

from torch import Tensor

from demucs_infer.audio.channels import StreamResampler, require_tensor
from demucs_infer.audio.encoders.base import Encoder, pieces
from demucs_infer.audio.encoders.lame import LameEncoder, has_lame
from demucs_infer.audio.encoders.pyav import Muxer
from demucs_infer.audio.encoders.vorbis import SndfileEncoder
from demucs_infer.audio.formats import FORMATS, Encoding, format_of, nearest_bitrate, source_depth
from demucs_infer.audio.gain import check_block, peak_of, prevent_clip, translate_os_errors
from demucs_infer.audio.tags import Cover, parse_cover
from demucs_infer.errors import AudioWriteError, FolderNotFound, UnknownSuffix
from demucs_infer.system.durability import make_folder, rename_file, sync_file

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
_MAX_RATE = 655_350  # of FLAC


class AtomicFile:
    """A file under a temporary name, until `commit` renames it.

    If the target is a file object, `commit` copies the bytes to it from an anonymous temporary
    file, so it need not be seekable.
    """

    def __init__(
        self, target: Target, *, overwrite: bool = True, temp_folder: Path | None = None
    ) -> None:
        """Open the file; its temporary name is in `temp_folder`, by default the final folder."""
        self._temporary: Path | None = None
        self._sink: BinaryIO | None = None
        self.final: Path | None = None
        self.file: BinaryIO
        if isinstance(target, (str, os.PathLike)):
            self.final = Path(target)
            self._overwrite = overwrite
            with translate_os_errors(self.name):
                self._check_target()
            # A short name: the final one may be as long as file names can be.
            self._temporary = (temp_folder or self.final.parent) / f".{secrets.token_hex(8)}.part"
            with translate_os_errors(self.name):
                self.file = self._temporary.open("x+b")
        else:
            self._sink = target
            with translate_os_errors(self.name):
                self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by discard)

    @property
    def name(self) -> str:
        """The target's name for messages."""
        return str(self.final) if self.final else "the file object"

    @property
    def temp_path(self) -> Path:
        """Where the file is until `commit`."""
        assert self._temporary is not None, "only a file with a name has one"
        return self._temporary

    def _check_target(self) -> None:
        assert self.final is not None
        if self.final.is_dir():
            raise AudioWriteError(f"cannot write {self.name}: it is a folder; give a file name")
        if not self._overwrite and self.final.exists():
            raise AudioWriteError(f"{self.name} already exists: remove it, or allow overwriting")

    def commit(self) -> None:
        """Give the file its final name, atomically, so that it survives a power loss.

        Raises:
            AudioWriteError: The file cannot be completed or renamed; it is deleted.
        """
        try:
            with translate_os_errors(self.name):
                if self._sink is not None:
                    self.file.seek(0)
                    shutil.copyfileobj(self.file, self._sink)
                if self._temporary and self.final:
                    sync_file(self.file)
                self.file.close()
                if self._temporary and self.final:
                    self._check_target()
                    make_folder(self.final.parent)
                    rename_file(self._temporary, self.final)
                    self._temporary = None
        finally:
            self.discard()

    def discard(self) -> None:
        """Delete the temporary file; do nothing after `commit`."""
        with suppress(OSError):  # closing flushes, and a full disk was reported before
            self.file.close()
        if self._temporary:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            self._temporary = None


class AudioWriter:
    """Writes one audio file: `with AudioWriter("vocals.flac", 44100, 2) as out: out.write(block)`.

    The format is that of the suffix unless `format` is given. The file appears under `path` at
    `close`, at the end of the `with` block; after `abort` or any error there is no file.
    Blocks must not be changed while they are being written.
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
        temp_folder: Path | None = None,
    ) -> None:
        if format is None:
            if not isinstance(path, (str, os.PathLike)):
                raise ValueError("a file object has no suffix: give a format")
            format = format_of(Path(path))
        self.encoding = Encoding(format, bits=bits, bitrate=bitrate, quality=quality, preset=preset)
        check_shape(self.encoding, sample_rate, channels)
        self.channels = channels
        self.peak = 0.0
        """The largest absolute sample written so far, before encoding."""
        self._bytes = 0
        kind = self.encoding.kind
        rate = kind.rate_for(sample_rate)
        self._resampler: StreamResampler | None = None
        if rate != sample_rate:
            self._resampler = StreamResampler(sample_rate, rate, channels)
        self._file = AtomicFile(path, overwrite=overwrite, temp_folder=temp_folder)
        self._is_open = True
        self._encoder: Encoder | None = None
        with self._abort_on_error():
            self._encoder = _open_encoder(
                self._file.file, self.encoding, rate, channels, tags, parse_cover(cover)
            )

    @property
    def name(self) -> str:
        """The file's name for messages."""
        return self._file.name

    @property
    def temp_path(self) -> Path:
        """Where the file is until `close`."""
        return self._file.temp_path

    def write(self, block: Tensor) -> None:
        """Write the next samples (C, T), floats.

        Raises:
            AudioWriteError: A sample is not finite, or the file cannot be written; it is deleted.
        """
        if not self._is_open:
            raise ValueError("cannot write: this AudioWriter is closed")
        with self._abort_on_error():
            block = check_block(block, self.channels, self._file.name)
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
                f"{self.name} is too large for {self.encoding.format}: choose wav, flac or caf"
            )

    def finish(self) -> None:
        """Complete the file under its temporary name; `close` then only renames it."""
        if self._is_open and self._encoder:
            with self._abort_on_error():
                if self._resampler:
                    self._encode(self._resampler.finish())
                self._encoder.finish()
                self._encoder = None
                self._file.file.flush()

    def close(self) -> None:
        """Complete the file and give it its final name."""
        self.finish()
        if self._is_open:
            self._is_open = False
            self._file.commit()

    def abort(self) -> None:
        """Delete the file."""
        if self._encoder:
            self._encoder.abort()
            self._encoder = None
        self._is_open = False
        self._file.discard()

    @contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        """Delete the file on any error; translate errors of the operating system."""
        try:
            with translate_os_errors(self._file.name):
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
    """Check that the format supports this sample rate, number of channels and bit rate.

    Raises:
        AudioWriteError: The format does not support the sample rate or the channels.
        ValueError: The bit rate does not exist for them.
    """
    if encoding.kind.holds_all_stems:
        raise AudioWriteError(
            f"a {encoding.format} file contains all stems: use Separator.separate_to, or write m4a"
        )
    limit = len(encoding.kind.layouts)
    if not 1 <= channels <= limit:
        raise AudioWriteError(
            f"unsupported number of channels for {encoding.format}: {channels}, expected 1 to "
            f"{limit}; write fewer, or choose wav"
        )
    if not 1 <= sample_rate <= _MAX_RATE:
        raise AudioWriteError(
            f"unsupported sample rate: {sample_rate} Hz, expected 1 to {_MAX_RATE}"
        )
    encoding.check_bitrate(encoding.kind.rate_for(sample_rate), channels)


def _open_encoder(
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
    clip: str | None = "rescale",
    bits_per_sample: int = 16,
    as_float: bool = False,
    preset: int = 2,
) -> None:
    """Save a track (C, T), with upstream's arguments; the suffix of `path` decides the format.

    `clip` is a mode of `prevent_clip`, such as the value of a flag: that is why it is no `Literal`.

    `bitrate` (kbit/s, the nearest that exists) and `preset` apply to mp3, `bits_per_sample` and
    `as_float` to lossless formats.

    Raises:
        AudioWriteError: The suffix is unknown (also a `ValueError`), the folder does not exist
            (also a `FileNotFoundError`), a sample is not finite, or writing fails.
        TypeError: `wav` is not a tensor.
        ValueError: `wav` is not (C, T).
    """
    require_tensor(wav)
    if wav.ndim != 2:
        raise ValueError(f"cannot save audio of shape {tuple(wav.shape)}: pass (channels, samples)")
    try:
        kind = FORMATS[format_of(Path(path))]
    except AudioWriteError as error:
        raise UnknownSuffix(str(error)) from error
    is_mp3 = kind.name == "mp3"
    peak_of(wav.detach(), str(path))
    try:
        with AudioWriter(
            path,
            samplerate,
            len(wav),
            bits=(32 if as_float else bits_per_sample) if kind.depths else None,
            bitrate=nearest_bitrate(kind, bitrate, kind.rate_for(samplerate), len(wav))
            if is_mp3
            else None,
            preset=preset if is_mp3 else None,
        ) as out:
            for piece in pieces(prevent_clip(wav, mode=clip)):
                out.write(piece)
    except AudioWriteError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise FolderNotFound(str(error)) from error.__cause__
        raise
