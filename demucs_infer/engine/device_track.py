"""Keep a track on the GPU of its networks, so that the track and its stems are copied only once.

Level, windows and stitching are then computed on the GPU. Copies use "pinned" memory, which the
operating system cannot move, so that the GPU can copy while it computes.

Shapes: C channels, t samples of a block; `...` any leading axes, for recordings that are separated
together.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from demucs_infer.engine.level import Level, measure_on_device

UPLOAD_SAMPLES = 1 << 20
"""Samples that are copied to the device at a time."""

SHARE_OF_MEMORY = 8
"""A track is kept on the device if it fits in the free memory there, divided by this number."""


def runs_beside_cpu(device: torch.device) -> bool:
    """Return whether `device` queues its work and runs it while the CPU does something else."""
    return device.type == "cuda"


def share_queue(device: torch.device) -> Callable[[], None]:
    """Return a function that lets the thread that calls it share the queue of this thread."""
    if device.type != "cuda":
        return lambda: None
    return partial(torch.cuda.set_stream, torch.cuda.current_stream(device))


def use_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the current GPU, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_device_memory(device: torch.device) -> int:
    """Return how many bytes are free on a CUDA device or kept by PyTorch for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    reused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reused


def upload(samples: Tensor, device: torch.device) -> Tensor:
    """Copy `samples` to `device`; a copy to a GPU is started, but not waited for."""
    if device.type != "cuda" or samples.is_cuda:
        return samples.to(device)
    return samples.pin_memory().to(device, non_blocking=True)


def download(stems: Tensor, device: torch.device) -> Tensor:
    """Copy `stems` to `device`; a GPU may compute the next batch at the same time."""
    if not stems.is_cuda or device.type != "cpu":
        return stems.to(device)
    result = torch.empty(stems.shape, dtype=stems.dtype, pin_memory=True)
    stream = _copy_stream(stems.device)
    stream.wait_stream(torch.cuda.current_stream(stems.device))
    with torch.cuda.stream(stream):
        result.copy_(stems, non_blocking=True)
    stems.record_stream(stream)  # keeps their memory until the copy is done
    stream.synchronize()
    return result


_copy_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


class DeviceTrack:
    """A track whose blocks are copied to a device, and kept there if there is room for all.

    It implements the protocol `Track`, with the optional attributes of the original track.
    """

    def __init__(self, track: Any, device: torch.device, max_bytes: int) -> None:
        self._track = track
        self._device = device
        self._max_bytes = max_bytes
        self._kept: list[Tensor] | None = None
        self.channels: int = track.channels
        """Number of channels."""
        self.first: int = getattr(track, "first", 0)
        """First sample to separate."""
        around: tuple[Tensor, Tensor] | None = getattr(track, "around", None)
        self.around = None if around is None else (around[0].to(device), around[1].to(device))
        """Samples before and after the track."""
        self.home = torch.device("cpu")
        """Device of the original samples; valid once some have been read."""

    @classmethod
    def place(
        cls, track: Any, device: torch.device, max_memory: int | None = None
    ) -> "DeviceTrack":
        """Return `track` for `device`, where it may take a part of the memory that is now free."""
        free = free_device_memory(device) if device.type == "cuda" else 1 << 30
        return cls(track, device, min(free, max_memory or free) // SHARE_OF_MEMORY)

    @property
    def length(self) -> int | None:
        """Number of samples; None if it is unknown until the track has been read."""
        if self._kept is not None:
            return sum(block.shape[-1] for block in self._kept)
        length: int | None = getattr(self._track, "length", None)
        return length

    def measure(self) -> Level:
        """Return the level of the original track if it is known; otherwise measure it."""
        level: Level | None = getattr(self._track, "level", None)
        if level is not None:
            return level
        return measure_on_device(self.blocks())

    def blocks(self) -> Iterator[Tensor]:
        """Yield the samples in order, as blocks (..., C, t) on the device."""
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
                    uploaded = uploaded.clone()  # a source may overwrite its blocks
                kept_bytes += uploaded.numel() * uploaded.element_size()
                if kept is not None and kept_bytes <= self._max_bytes:
                    kept.append(uploaded)
                else:
                    kept = None
                yield uploaded
        self._kept = kept
