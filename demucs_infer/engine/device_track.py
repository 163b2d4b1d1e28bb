"""Keep a track on the device of its networks, and bring stems back: one transfer each way.

Memory that the operating system cannot move ("pinned") is copied by the GPU itself, beside its
computations. Everything in between (level, windows, stitching) then runs on the device.

Shapes: C channels, t samples of a block; `...` are recordings that are separated side by side.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from demucs_infer.engine.level import Level, measure_on_device

UPLOAD_SAMPLES = 1 << 20
"""Samples that are copied to the device at a time."""

_SHARE_OF_MEMORY = 8
"""A track is kept on the device if it takes less than one part in so many of its free memory."""


def runs_beside_cpu(device: torch.device) -> bool:
    """Return whether work on `device` is queued, and goes on while the CPU does something else."""
    return device.type == "cuda"


def share_queue(device: torch.device) -> Callable[[], None]:
    """Return what a thread must call to queue its work behind that of the calling thread."""
    if device.type != "cuda":
        return lambda: None
    return partial(torch.cuda.set_stream, torch.cuda.current_stream(device))


def free_device_memory(device: torch.device) -> int:
    """Return the bytes that are free on a CUDA device, or that PyTorch keeps for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    reused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reused


def upload(samples: Tensor, device: torch.device) -> Tensor:
    """Copy `samples` to `device`, on a GPU without waiting for it."""
    if device.type != "cuda" or samples.is_cuda:
        return samples.to(device)
    return samples.pin_memory().to(device, non_blocking=True)


def download(stems: Tensor, device: torch.device) -> Tensor:
    """Return `stems` on `device`; from a GPU on a stream of its own, beside its next batch."""
    if not stems.is_cuda or device.type != "cpu":
        return stems.to(device)
    result = torch.empty(stems.shape, dtype=stems.dtype, pin_memory=True)
    stream = _copy_stream(stems.device)
    stream.wait_stream(torch.cuda.current_stream(stems.device))
    with torch.cuda.stream(stream):
        result.copy_(stems, non_blocking=True)
    stems.record_stream(stream)  # its memory must not be reused before the copy is done
    stream.synchronize()
    return result


_copy_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


class DeviceTrack:
    """A track whose blocks are on a device, and stay there once they have all been read.

    It is a `Track`, with the optional attributes of the original one.
    """

    def __init__(self, track: Any, device: torch.device, max_bytes: int) -> None:
        self._track = track
        self._device = device
        self._max_bytes = max_bytes
        self._kept: list[Tensor] | None = None
        self.channels: int = track.channels
        """Number of channels."""
        self.first: int = getattr(track, "first", 0)
        """First sample that is wanted."""
        self.home = torch.device("cpu")
        """Device of the original samples; valid once some have been read."""

    @classmethod
    def place(cls, track: Any, device: torch.device) -> "DeviceTrack":
        """Return `track` on `device`, where it may take a part of the memory that is free now."""
        free = free_device_memory(device) if device.type == "cuda" else 1 << 30
        return cls(track, device, free // _SHARE_OF_MEMORY)

    @property
    def length(self) -> int | None:
        """Number of samples, None if it is not known before the track has been read."""
        if self._kept is not None:
            return sum(block.shape[-1] for block in self._kept)
        length: int | None = getattr(self._track, "length", None)
        return length

    def measure(self) -> Level:
        """Return the level of the track, which is an earlier result if the original has one."""
        level: Level | None = getattr(self._track, "level", None)
        if level is not None:
            return level
        return measure_on_device(self.blocks())

    def blocks(self) -> Iterator[Tensor]:
        """Yield the samples in order, (... C t) each, on the device."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Tensor] | None = []
        kept_bytes = 0
        for block in self._track.blocks():
            self.home = block.device
            for part in block.split(UPLOAD_SAMPLES, dim=-1):
                uploaded = upload(part.float(), self._device)
                if uploaded.data_ptr() == part.data_ptr():
                    uploaded = uploaded.clone()  # a source may overwrite what it has handed out
                kept_bytes += uploaded.numel() * uploaded.element_size()
                if kept is not None and kept_bytes <= self._max_bytes:
                    kept.append(uploaded)
                else:
                    kept = None
                yield uploaded
        self._kept = kept
