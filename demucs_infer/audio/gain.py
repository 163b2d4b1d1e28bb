"""Set the levels of a track's files: prevent clipping, and keep the sum of stems exact.

Shapes: C channels, T samples of a block. Samples are floats, 1.0 is full scale.
"""

import errno
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Protocol, TypeAlias

import av
import torch
from torch import Tensor

from demucs_infer.audio.encoders.base import PIECE, pieces
from demucs_infer.audio.formats import Encoding
from demucs_infer.errors import DISK_FULL, AudioWriteError

Clip: TypeAlias = Literal["track", "rescale", "clamp", "tanh", "none"]
CLIP_MODES: tuple[Clip, ...] = ("track", "rescale", "clamp", "tanh", "none")
"""`track`: one gain for all files, so that they still sum to the mix, only if one would clip.
`rescale`: each file by its own peak, as upstream does. `clamp`: cut at ±0.99. `tanh`: soft
clipping. `none`: unchanged; integer files saturate, float files keep everything."""


def prevent_clip(wav: Tensor, mode: str | None = "rescale") -> Tensor:
    """Bring a whole track (C T) below full scale, as upstream's function of this name does.

    `rescale`: divide by 1.01 times the peak, if that is above 1; `clamp`: cut at ±0.99;
    `tanh`: soft clipping; `none` or None: return the tensor itself.

    Raises:
        ValueError: `mode` is unknown, or the samples are integers.
    """
    if mode is None or mode == "none":
        return wav
    if not wav.is_floating_point():
        raise ValueError(f"cannot prevent clipping of {wav.dtype} samples: pass floats")
    if mode == "rescale":
        peak = float(wav.abs().max()) if wav.numel() else 0.0
        return wav / max(1.01 * peak, 1.0)
    if mode == "clamp":
        return wav.clamp(-0.99, 0.99)
    if mode == "tanh":
        return torch.tanh(wav)
    raise ValueError(f"{mode = } must be rescale, clamp, tanh or none")


def track_gain(peaks: Mapping[str, float], encoding: Encoding) -> float:
    """Return the gain that makes the loudest file of a track just fit; 1.0 if all fit already.

    The loudest sample then becomes the highest integer, a step below 1. A peak of exactly 1 gets
    no gain: rounding costs it no more than that step.
    """
    peak = max(peaks.values(), default=0.0)
    if not encoding.can_clip or peak <= 1:
        return 1.0
    top = 1 - 2.0 ** (1 - (encoding.depth or 16))  # lossy files are mostly played at 16 bits
    return top / peak


def clip_gains(peaks: Mapping[str, float], clip: Clip, encoding: Encoding) -> dict[str, float]:
    """Return the gain of each file of a track, by the peaks of its files."""
    if clip == "rescale":
        return {name: 1 / max(1.01 * peak, 1.0) for name, peak in peaks.items()}
    return dict.fromkeys(peaks, track_gain(peaks, encoding) if clip == "track" else 1.0)


def round_together(blocks: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Round blocks (C T) to that many bits so that their sum is rounded to the nearest, too.

    The rounding error of one block is carried to the next: each changes by at most 1 step, and the
    sum by at most half a step, where independent rounding would add half a step for every block.
    Samples that need no rounding, such as silence, stay as they are.
    """
    scale = 1 << (bits - 1)
    rounded = {}
    carried: Tensor | float = 0.0
    for name, block in blocks.items():
        exact = block.double() * scale
        nearest = exact.round()
        error = exact - nearest + carried
        # Half a step is rounded to zero, so that samples on the grid do not move.
        correction = error.sign() * (error.abs() - 0.5).ceil().clamp_(min=0)
        carried = error - correction
        rounded[name] = ((nearest + correction) / scale).float()
    return rounded


def check_block(block: Tensor, channels: int, name: str) -> Tensor:
    """Return the block (C T) as float32 on the CPU.

    Raises:
        ValueError: It has another shape or number of channels, or no floats.
    """
    if block.ndim != 2 or block.shape[0] != channels or not block.is_floating_point():
        raise ValueError(
            f"invalid block for {name}: {block.dtype} {tuple(block.shape)}, expected floats of "
            f"{channels} channels × samples"
        )
    return block.detach().to("cpu", torch.float32)


def peak_of(block: Tensor, name: str) -> float:
    """Return the largest absolute sample of a block.

    Raises:
        AudioWriteError: A sample is not finite.
    """
    if not block.numel():
        return 0.0
    low, high = torch.aminmax(block)
    peak = float(torch.maximum(-low, high))
    if not peak < float("inf"):  # written so that NaN fails too
        raise AudioWriteError(
            f"cannot write {name}: a sample is not a finite number; no file was written"
        )
    return peak


_HINTS = {
    **dict.fromkeys(DISK_FULL, "free some space or choose another folder"),
    errno.EFBIG: "the file is too large for this file system",
    errno.ENOENT: "create the folder first",
    errno.EEXIST: "another file has that name; choose another folder",
    errno.ENOTDIR: "a folder in the path is a file; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EACCES: "choose a writable folder",
    errno.EROFS: "choose a writable folder",
}


def write_error(name: str, error: OSError | av.FFmpegError) -> AudioWriteError:
    """Make an `AudioWriteError` about a file or folder from an error of the OS or FFmpeg."""
    hint = _HINTS.get(error.errno or 0)
    reason = error.strerror or str(error)
    return AudioWriteError(f"cannot write {name}: {reason}" + (f"; {hint}" if hint else ""))


@contextmanager
def translate_os_errors(name: str) -> Iterator[None]:
    """Translate errors of the OS and FFmpeg into an `AudioWriteError` about a file."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise write_error(name, error) from error


class Sink(Protocol):
    """Takes the blocks of several files of one track."""

    @property
    def name(self) -> str:
        """What to call the files in a message."""

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """The next samples of every file."""

    def close(self) -> None:
        """Complete all, then give all their names."""

    def abort(self) -> None:
        """Leave nothing behind."""


@dataclass(frozen=True, slots=True)
class Levels:
    """What was done to the level of each file of a track."""

    peaks: Mapping[str, float]
    """The largest absolute sample that came in."""

    gains: Mapping[str, float]
    """What every sample was multiplied by; 1.0 where the curve of `clip` is no gain."""


class LevelWriter:
    """Writes several files of one track, none of which clips, all of which appear at the end.

    A gain that depends on the peak is known when the last sample is. Where one may be needed
    (`rescale`, or `track` into a format that can clip) floats go to a nameless file in
    `spool_folder` first, and `close` reads them once to encode: 4 bytes a sample of disk (stereo
    at 44.1 kHz: 1.3 GB an hour and file) instead of memory, and the time of encoding at the end.
    Otherwise blocks are encoded as they come.
    """

    def __init__(
        self,
        sink: Sink,
        names: Sequence[str],
        channels: int,
        encoding: Encoding,
        *,
        clip: Clip = "track",
        exact_sum: bool = True,
        spool_folder: Path | None = None,
    ) -> None:
        self._sink = sink
        self._names = tuple(names)
        self._channels = channels
        self._encoding = encoding
        self._clip = clip
        self._exact_sum = exact_sum and encoding.is_integer and clip in ("track", "none")
        self._peaks = dict.fromkeys(names, 0.0)
        self._is_open = True
        self._spool: _FloatSpool | None = None
        with self._or_nothing():
            if clip not in CLIP_MODES:
                raise ValueError(f"{clip = } must be one of: {', '.join(CLIP_MODES)}")
            if clip == "rescale" or (clip == "track" and encoding.can_clip):
                self._spool = _FloatSpool(self._names, channels, spool_folder)

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """The next samples of every file: name -> (C T), all equally long."""
        if not self._is_open:
            raise ValueError("write to closed files")
        with self._or_nothing():
            blocks = self._checked(blocks)
            for name, block in blocks.items():
                peak = peak_of(block, f"{self._sink.name} ({name})")
                self._peaks[name] = max(self._peaks[name], peak)
            if self._spool:
                self._spool.write(blocks)
            else:
                self._pass_on(blocks, dict.fromkeys(self._names, 1.0))

    def _checked(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(blocks) != set(self._names):
            raise ValueError(f"blocks for {sorted(blocks)}, expected {sorted(self._names)}")
        checked = {name: check_block(blocks[name], self._channels, name) for name in self._names}
        if len({block.shape for block in checked.values()}) > 1:
            raise ValueError("blocks of one moment must be equally long")
        return checked

    def _pass_on(self, blocks: Mapping[str, Tensor], gains: Mapping[str, float]) -> None:
        shaped = {name: _scaled(block, gains[name]) for name, block in blocks.items()}
        if self._clip in ("clamp", "tanh"):
            shaped = {name: prevent_clip(block, self._clip) for name, block in shaped.items()}
        if self._exact_sum:
            shaped = round_together(shaped, self._encoding.depth)
        self._sink.write({name: block.float() for name, block in shaped.items()})

    def close(self) -> Levels:
        """Complete all files and give them their names; says what was done to their levels."""
        if not self._is_open:
            raise ValueError("closed already")
        levels = Levels(self._peaks, clip_gains(self._peaks, self._clip, self._encoding))
        with self._or_nothing():
            if self._spool:
                for blocks in self._spool.blocks():
                    self._pass_on(blocks, levels.gains)
                self._spool.close()
            self._sink.close()
        self._is_open = False
        return levels

    def abort(self) -> None:
        """Leave nothing behind."""
        self._is_open = False
        if self._spool:
            self._spool.close()
        self._sink.abort()

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Any error inside leaves no file; those of the system are explained."""
        try:
            with translate_os_errors(self._sink.name):
                yield
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> "LevelWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._is_open:
            self.close()


def _scaled(block: Tensor, gain: float) -> Tensor:
    """In double precision where there is something to do, so that the sum stays exact."""
    return block if gain == 1 else block.double() * gain


class _FloatSpool:
    """Floats of several files on disk: written once in order, read once in order."""

    def __init__(self, names: Sequence[str], channels: int, folder: Path | None) -> None:
        self._names = names
        self._channels = channels
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed below)

    def write(self, blocks: Mapping[str, Tensor]) -> None:
        """All files' samples of a moment side by side: (T S·C) on disk."""
        together = torch.cat([blocks[name] for name in self._names])
        for piece in pieces(together):
            self._file.write(piece.T.contiguous().numpy().data.cast("B"))

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """What was written, in pieces that memory can hold."""
        rows = len(self._names) * self._channels
        self._file.seek(0)
        while data := self._file.read(4 * rows * PIECE):
            together = torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, rows).T
            yield dict(zip(self._names, torch.split(together, self._channels)))

    def close(self) -> None:
        """The disk has its room again."""
        with suppress(OSError):  # a full disk is told again by the flush that closing does
            self._file.close()
