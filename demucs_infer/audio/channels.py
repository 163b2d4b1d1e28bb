"""Convert the channel count and the sample rate.

Shapes: C channels, T samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from demucs_infer.audio.resample import StreamResampler as StreamResampler
from demucs_infer.audio.resample import resample as resample
from demucs_infer.options import ExtraChannels as ExtraChannels

"""What to do with more channels than a network takes: mix, use the first, refuse, or group."""

_HALF_POWER = 0.5**0.5
_STEREO_WEIGHTS = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (_HALF_POWER, _HALF_POWER),
    "LFE": (0.0, 0.0),
    "BL": (_HALF_POWER, 0.0),
    "BR": (0.0, _HALF_POWER),
    "SL": (_HALF_POWER, 0.0),
    "SR": (0.0, _HALF_POWER),
    "BC": (0.5, 0.5),
}
"""Weights of surround channels in (left, right), by ITU-R BS.775; the LFE channel is dropped."""


def downmix_weights(layout: Sequence[str]) -> Tensor | None:
    """Return the weights (2, C) that mix a layout down to stereo; None for unknown channels."""
    if not layout or any(name not in _STEREO_WEIGHTS for name in layout):
        return None
    return torch.tensor([_STEREO_WEIGHTS[name] for name in layout]).T


def convert_channels(block: Tensor, channels: int) -> Tensor:
    """Convert the number of channels: (..., C, T) -> (..., channels, T).

    To one channel: the mean. From one channel: copies. From more channels than requested: the
    first ones. The result may share memory with `block`.

    Raises:
        TypeError: `block` is not a tensor.
        ValueError: `block` has two or more channels, but fewer than requested.
    """
    require_tensor(block)
    if not channels >= 1:
        raise ValueError(f"{channels = } must be at least 1")
    *shape, from_channels, length = block.shape
    if from_channels == channels:
        return block
    if channels == 1:
        return block.mean(dim=-2, keepdim=True)
    if from_channels == 1:
        return block.expand(*shape, channels, length)
    if from_channels > channels:
        return block[..., :channels, :]
    raise ValueError(
        f"{from_channels} channels cannot become {channels}: only a single channel can be copied; "
        "choose the channels yourself, or mix them down to one"
    )


def require_tensor(samples: object) -> None:
    """Raise `TypeError` with advice for an array of another package."""
    if not isinstance(samples, Tensor):
        raise TypeError(
            f"expected a torch tensor, got {type(samples).__name__}: use torch.from_numpy(array) "
            "or torch.as_tensor(samples)"
        )


def convert_audio(wav: Tensor, from_samplerate: int, to_samplerate: int, channels: int) -> Tensor:
    """Convert the sample rate and the channels of a whole track (..., C, T), as upstream does."""
    return resample(convert_channels(wav, channels), from_samplerate, to_samplerate)
