"""Capture the core of a network as a CUDA graph per batch size, so that a GPU need not wait.

A window of htdemucs runs some 600 kernels. With small batches, launching them one by one takes
longer than running them; a graph launches them at once. Batches are padded to one of a few sizes
that are captured, and the outputs are cut to the size of the batch.
"""

import warnings
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from demucs_infer.errors import is_out_of_memory

Core: TypeAlias = Callable[..., Any]
"""A function from tensors to a tensor, or several; the first axis of each is the batch."""

CAPTURED_SIZES = (1, 2, 4, 8, 16)

_MAX_GRAPHS = 8
"""Most graphs to keep: each has its memory, and windows of many lengths would fill the device."""


class Graphs(Protocol):
    """Captures graphs: implemented by `CudaGraphs`, and by a counter in tests."""

    def capture(self, core: Core, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Any]:
        """Return (replay, outputs): calling `replay` recomputes the outputs from the inputs."""

    def reset(self) -> None:
        """Forget the memory of earlier graphs, which are gone."""


class CudaGraphs:
    """Captures CUDA graphs on one device; they share memory, so only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, core: Core, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Any]:
        """Capture `core` on a separate stream, after a run that fills its caches."""
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            core(*inputs)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating and copying meanwhile.
        mode = "thread_local"
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
                outputs = core(*inputs)
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves the other one
        self._pool = self._pool or graph.pool()
        return graph.replay, outputs

    def reset(self) -> None:
        """Let the next graphs have a memory of their own."""
        self._pool = None


class _Captured:
    """A graph with the tensors that it reads and writes."""

    def __init__(
        self, graphs: Graphs, core: Core, key: tuple[torch.Size, ...], inputs: Sequence[Tensor]
    ) -> None:
        self._inputs = tuple(x.new_zeros(shape) for x, shape in zip(inputs, key, strict=True))
        self._fill(inputs)
        self._replay, self._outputs = graphs.capture(core, self._inputs)

    def _fill(self, inputs: Sequence[Tensor]) -> None:
        for target, source in zip(self._inputs, inputs, strict=True):
            target[: len(source)].copy_(source)  # the rest is ignored in the outputs

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """Run the graph on `inputs`, whose batch may be smaller than the captured one."""
        self._fill(inputs)
        self._replay()
        outputs = _cut_batch(self._outputs, len(inputs[0]))
        if isinstance(outputs, Tensor):
            return outputs.clone()
        return tuple(x.clone() for x in outputs)


def _pad_batch(x: Tensor, size: int) -> Tensor:
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])


def _cut_batch(outputs: Any, batch: int) -> Any:
    if isinstance(outputs, Tensor):
        return outputs[:batch]
    return tuple(x[:batch] for x in outputs)


class GraphedCore:
    """A core that runs as a graph from the second batch of a size on.

    The first batch runs as usual, to load libraries, kernels and tables, which a capture must not.
    If the core cannot be captured, it always runs as usual, after a warning.
    """

    def __init__(self, core: Core, graphs: Graphs, sizes: Sequence[int] = CAPTURED_SIZES) -> None:
        self._core = core
        self._graphs: Graphs | None = graphs
        self._sizes = sorted(sizes)
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}
        self._lock = Lock()
        """Held while a graph runs, because its inputs and outputs always use the same memory."""

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Run the core, as a graph if possible."""
        tensors = [x for x in inputs if x is not None]
        size = next((size for size in self._sizes if size >= len(tensors[0])), None)
        if size is None or len(tensors) < len(inputs):
            return self._core(*inputs)
        key = tuple(torch.Size((size, *x.shape[1:])) for x in tensors)
        with self._lock:
            may_capture = self._graphs is not None and len(self._captured) < _MAX_GRAPHS
            if key in self._seen and key not in self._captured and may_capture:
                self._capture(key, tensors)
            if key in self._captured:
                return self._captured[key].run(tensors)
            self._seen.add(key)
        # Padded like a graph, so that a track gives the same samples the first time and later.
        outputs = self._core(*(_pad_batch(x, size) for x in tensors))
        return _cut_batch(outputs, len(tensors[0]))

    def _capture(self, key: tuple[torch.Size, ...], inputs: Sequence[Tensor]) -> None:
        """Capture the core for inputs of these shapes, if that is possible."""
        assert self._graphs is not None
        try:
            self._captured[key] = _Captured(self._graphs, self._core, key, inputs)
        except RuntimeError as error:
            self.release()
            if is_out_of_memory(error):
                raise  # the caller retries with a smaller batch
            self._graphs = None
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"no graph could be captured, running without: {reason}", stacklevel=2)

    def release(self) -> None:
        """Free the memory of all graphs."""
        self._captured.clear()
        self._seen.clear()
        if self._graphs is not None:
            self._graphs.reset()
