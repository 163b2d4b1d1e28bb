"""Convert the channel count and the sample rate.

Shapes: C channels, T samples.
"""

from torch import Tensor

from demucs_infer.audio.resample import StreamResampler as StreamResampler
from demucs_infer.audio.resample import resample as resample
from demucs_infer.options import ExtraChannels as ExtraChannels

"""What to do with more channels than a network takes: drop, refuse, or separate them in groups."""


def convert_channels(block: Tensor, channels: int) -> Tensor:
    """Convert the number of channels: (... C T) -> (... channels T).

    To one channel: the mean. From one channel: copies. From more channels than requested: the
    first ones. The result may share memory with `block`.

    Raises:
        ValueError: Two or more channels cannot become more.
    """
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


def convert_audio(wav: Tensor, from_samplerate: int, to_samplerate: int, channels: int) -> Tensor:
    """Convert the sample rate and the channels of a whole track (... C T), as upstream does."""
    return resample(convert_channels(wav, channels), from_samplerate, to_samplerate)
