"""Set the levels of a track's files: prevent clipping, and keep the sum of stems exact.

Shapes: C channels, T samples of a block. Samples are floats, 1.0 is full scale.
"""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import av
import torch
from torch import Tensor

from demucs_infer.audio.formats import Encoding
from demucs_infer.errors import DISK_FULL, AudioWriteError
from demucs_infer.options import Clip as Clip
from demucs_infer.options import OutputOptions

CLIP_MODES: tuple[Clip, ...] = get_args(Clip)
"""All values of the setting `clip`; its help describes them, and `_CLIP_MODES` computes them."""


def prevent_clip(wav: Tensor, mode: str | None = "rescale") -> Tensor:
    """Bring a whole track (C, T) below full scale, as upstream's function of this name does.

    `rescale`: divide by 1.01 times the peak, if that is above 1; `none` or None: return the tensor
    itself; modes that limit each sample, such as `clamp` and `tanh`: apply them.

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
    limits = {name: entry.limit for name, entry in _CLIP_MODES.items() if entry.limit}
    if mode not in limits:
        raise ValueError(f"{mode = } must be rescale, {', '.join(limits)} or none")
    return limits[mode](wav)


def track_gain(peaks: Mapping[str, float], encoding: Encoding) -> float:
    """Return the gain that makes the loudest file of a track just fit; 1.0 if all fit already.

    The loudest sample then becomes the highest integer, a step below 1. A peak of exactly 1 gets
    no gain, because rounding lowers it by no more than that step.
    """
    peak = max(peaks.values(), default=0.0)
    if not encoding.can_clip or peak <= 1:
        return 1.0
    top = 1 - 2.0 ** (1 - (encoding.depth or 16))  # lossy files are mostly played at 16 bits
    return top / peak


def clip_gains(peaks: Mapping[str, float], clip: Clip, encoding: Encoding) -> dict[str, float]:
    """Return the gain of each file of a track, given the peak of each."""
    return _CLIP_MODES[clip].gains(peaks, encoding)


def _no_gains(peaks: Mapping[str, float], encoding: Encoding) -> dict[str, float]:  # noqa: ARG001
    return dict.fromkeys(peaks, 1.0)


def _one_gain(peaks: Mapping[str, float], encoding: Encoding) -> dict[str, float]:
    return dict.fromkeys(peaks, track_gain(peaks, encoding))


def _own_gains(peaks: Mapping[str, float], encoding: Encoding) -> dict[str, float]:  # noqa: ARG001
    return {name: 1 / max(1.01 * peak, 1.0) for name, peak in peaks.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClipMode:
    """How a value of the setting `clip` is computed."""

    gains: Callable[[Mapping[str, float], Encoding], dict[str, float]] = _no_gains
    """Return the gain of each file, given the peak of each."""

    limit: Callable[[Tensor], Tensor] | None = None
    """Limit each sample by itself, which cannot be undone."""

    keeps_sum: bool = False
    """Whether stems still sum to the mix times one gain, so that they may be rounded together."""


_CLIP_MODES: Mapping[str, _ClipMode] = {
    "track": _ClipMode(gains=_one_gain, keeps_sum=True),
    "rescale": _ClipMode(gains=_own_gains),
    "clamp": _ClipMode(limit=partial(torch.clamp, min=-0.99, max=0.99)),
    "tanh": _ClipMode(limit=torch.tanh),
    "none": _ClipMode(keeps_sum=True),  # integer files saturate, float files keep everything
}


def is_reversible(clip: str) -> bool:
    """Return whether a clip mode only multiplies stems by gains, which can be undone."""
    return clip in _CLIP_MODES and _CLIP_MODES[clip].limit is None


def round_together(blocks: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Round blocks (C, T) to `bits` bits so that their sum is rounded to the nearest, too.

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
    """Return the block (C, T) as float32 on the CPU.

    Raises:
        ValueError: The block does not have the shape (channels, samples), or is not of floats.
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
    errno.EPERM: "choose another folder",
    errno.EROFS: "choose a writable folder",
}


def write_error(name: str, error: OSError | av.FFmpegError) -> AudioWriteError:
    """Make an `AudioWriteError` about a file or folder from an error of the OS or FFmpeg."""
    hint = _HINTS.get(error.errno or 0)
    if error.errno == errno.ENOENT and Path(str(error.filename)).parent.is_dir():
        hint = "nothing can be created in that place; choose another folder"  # as in /proc
    reason = error.strerror or str(error)
    return AudioWriteError(f"cannot write {name}: {reason}" + (f"; {hint}" if hint else ""))


@contextmanager
def translate_os_errors(name: str) -> Iterator[None]:
    """Translate errors of the OS and FFmpeg into an `AudioWriteError` about a file."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise write_error(name, error) from error


@dataclass(frozen=True, slots=True)
class Levels:
    """Peaks and gains of the files of a track."""

    peaks: Mapping[str, float]
    """The largest absolute sample before the gain."""

    gains: Mapping[str, float]
    """Factors of the samples; 1.0 if the clip mode does not use gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaper:
    """Applies gains, clip modes and rounding to samples before they are encoded."""

    encoding: Encoding
    clip: Clip = "track"
    exact_sum: bool = True
    """Round the stems together, if they have one gain and integers are written."""

    def __post_init__(self) -> None:
        if self.clip not in CLIP_MODES:
            raise ValueError(f"clip = {self.clip!r} must be one of: {', '.join(CLIP_MODES)}")

    @classmethod
    def from_options(cls, options: OutputOptions, encoding: Encoding) -> "Shaper":
        """Return the shaper of these settings, for files and live stems alike."""
        return cls(encoding=encoding, clip=options.clip, exact_sum=options.exact_sum)

    def shape(self, blocks: Mapping[str, Tensor], gains: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the blocks (C, T) as float32, ready to be encoded."""
        # In double precision where samples change, so that the sum stays exact.
        shaped = {
            name: block if gains[name] == 1 else block.double() * gains[name]
            for name, block in blocks.items()
        }
        mode = _CLIP_MODES[self.clip]
        if mode.limit:
            shaped = {name: mode.limit(block) for name, block in shaped.items()}
        if mode.keeps_sum and self.exact_sum and self.encoding.is_integer:
            shaped = round_together(shaped, self.encoding.depth)
        return {name: block.float() for name, block in shaped.items()}
