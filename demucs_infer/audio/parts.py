"""Read a part of an audio file without decoding everything before it.

Shapes: C channels, t samples.
"""

from pathlib import Path

import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from torch import Tensor

from demucs_infer.audio.decode import Samples, check_stream, choose_stream, open_container, to_float

_PREROLL_SECONDS = 0.5
"""Audio decoded before the part: lossy decoders need earlier frames, and seeking is inexact."""


def read_part(path: Path, start: int, stop: int) -> Tensor:
    """Return the samples [`start`, `stop`) of a file (C, t), as far as the file has them.

    For files that `AudioWriter` has written, they equal those of a complete decoding; for opus only
    nearly, because it predicts from earlier frames.

    Raises:
        AudioReadError: `path` is not a readable audio file.
    """
    with path.open("rb") as file, open_container(file, path.name) as container:
        stream = choose_stream(container, path.name, None)
        check_stream(stream, path.name)
        part = _decode(container, stream, start, stop, has_sought=_seek(container, stream, start))
        if part is not None:
            return part
    with path.open("rb") as file, open_container(file, path.name) as container:
        stream = choose_stream(container, path.name, None)
        part = _decode(container, stream, start, stop, has_sought=False)
        assert part is not None
        return part


def _seek(container: InputContainer, stream: AudioStream, start: int) -> bool:
    seconds = start / stream.codec_context.sample_rate - _PREROLL_SECONDS
    if seconds <= 0 or stream.time_base is None:
        return False
    container.seek(int(seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
    return True


def _decode(
    container: InputContainer, stream: AudioStream, start: int, stop: int, *, has_sought: bool
) -> Tensor | None:
    """Return the samples [`start`, `stop`); None if decoding began after `start`."""
    frames: list[Samples] = []
    first = position = 0
    for frame in container.decode(stream):
        if not frames and has_sought:
            if frame.pts is None or stream.time_base is None:
                return None
            ticks = frame.pts - (stream.start_time or 0)
            first = position = round(ticks * stream.time_base * frame.sample_rate)
            if first > start:
                return None
        samples: Samples = frame.to_ndarray()
        if not frame.format.is_planar:
            samples = np.ascontiguousarray(samples.reshape(-1, frame.layout.nb_channels).T)
        frames.append(samples)
        position += frame.samples
        if position >= stop:
            break
    if not frames:
        return torch.zeros(stream.codec_context.channels, 0)
    decoded = torch.cat(list(to_float(frames)), -1)
    return decoded[:, max(start - first, 0) : max(stop - first, 0)]
