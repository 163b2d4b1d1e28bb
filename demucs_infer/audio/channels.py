"""Bring sound to the channels and the sample rate that somebody wants.

Shapes: C channels, T samples.
"""

from typing import Literal

from torch import Tensor

from demucs_infer.audio.resample import Method as Method
from demucs_infer.audio.resample import StreamResampler as StreamResampler
from demucs_infer.audio.resample import resample as resample

ExtraChannels = Literal["first", "error", "pairs"]
"""What becomes of more channels than are wanted: left out, refused, or a track of their own."""


def convert_channels(block: Tensor, channels: int) -> Tensor:
    """Sound with another number of channels: (... C T) -> (... channels T).

    One channel is the mean of all, one becomes many by copying, and of more than are wanted the
    first are taken. Between two and more than two there is no right answer: a `ValueError`.
    The result may share memory with `block`.
    """
    if not channels >= 1:
        raise ValueError(f"{channels = } must be at least 1")
    *shape, have, length = block.shape
    if have == channels:
        return block
    if channels == 1:
        return block.mean(dim=-2, keepdim=True)
    if have == 1:
        return block.expand(*shape, channels, length)
    if have > channels:
        return block[..., :channels, :]
    raise ValueError(
        f"{have} channels cannot become {channels}: only one channel can be copied; "
        "choose the channels yourself, or mix them to one"
    )


def convert_audio(wav: Tensor, from_samplerate: int, to_samplerate: int, channels: int) -> Tensor:
    """A whole track at another rate and with other channels, as upstream makes it: (... C T)."""
    return resample(convert_channels(wav, channels), from_samplerate, to_samplerate)
