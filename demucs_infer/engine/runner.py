"""Run windows through a network, in batches that fit the memory of its device.

Shapes: N windows, B batch, S stems, C channels, W samples of a window; `...` are recordings
that are separated side by side.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from demucs_infer.engine.network import Network, as_tensor
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.errors import SeparationError, is_out_of_memory
from demucs_infer.events import BatchSizeReduced, Event, WarningEvent
from demucs_infer.options import Options


def _forward_stems(network: object) -> Callable[[Tensor, Sequence[int]], Tensor] | None:
    """How to ask `network` for some stems only, if that is the same as asking for all."""
    if getattr(network, "_forward_hooks", None) or getattr(network, "_forward_pre_hooks", None):
        return None
    for each in type(network).__mro__:
        if "forward_stems" in vars(each):
            bound: Callable[[Tensor, Sequence[int]], Tensor] = cast(Any, network).forward_stems
            return bound
        if "forward" in vars(each):  # whoever wrote another one means it
            return None
    return None


def consumes_rng(network: object) -> bool:
    """Whether upstream's form of `network` takes a random number in every forward.

    Its transformer draws an offset for sinusoidal positions, which is always 0 and moves
    Python's generator on: the shifts that are drawn after it depend on that.
    """
    if isinstance(network, QueryAdapter):
        network = network.network
    transformer = getattr(network, "crosstransformer", None)
    config = getattr(transformer, "config", transformer)
    return getattr(config, "emb", None) == "sin"


@dataclass(slots=True)
class _Lease:
    """How a network was before it was borrowed, and how many borrow it now."""

    device: torch.device | None
    training: list[tuple[nn.Module, bool]]
    count: int = 0


# What is borrowed belongs to no runner: two of them may hold the same network.
_leases: "WeakKeyDictionary[nn.Module, _Lease]" = WeakKeyDictionary()
_leases_lock = RLock()  # a collected generator may give back while its thread borrows


@contextmanager
def borrowed(network: object, device: torch.device | None) -> Iterator[None]:
    """`network` in evaluation mode and on `device`; as it was when the last borrower is gone."""
    if isinstance(network, QueryAdapter):
        network = network.network
    if not isinstance(network, nn.Module):
        yield
        return
    with _leases_lock:
        lease = _leases.get(network)
        if lease is None:
            lease = _Lease(device_of(network), [(m, m.training) for m in network.modules()])
            network.eval()
            if device is not None and not _same(device, lease.device):
                network.to(device)
            _leases[network] = lease
        elif device is not None and not _same(device, device_of(network)):
            raise ValueError(
                f"the network is in use on {device_of(network)} and cannot move to {device}: "
                "wait for it, or load it twice"
            )
        lease.count += 1
    try:
        yield
    finally:
        with _leases_lock:
            lease.count -= 1
            if not lease.count:
                _leases.pop(network, None)  # at the end of a process it may be gone already
                for module, training in lease.training:
                    module.training = training
                if lease.device is not None and not _same(device, lease.device):
                    network.to(lease.device)


def device_of(network: object) -> torch.device | None:
    """Where the weights of `network` are; None when it has none."""
    if not isinstance(network, nn.Module):
        return None
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            return tensor.device
    return None


def _same(one: torch.device | None, other: torch.device | None) -> bool:
    if one is None or other is None:
        return True
    is_one_of_a_kind = one.type == "cpu"  # whatever number it is given
    return one.type == other.type and (is_one_of_a_kind or (one.index or 0) == (other.index or 0))


# An estimate of the memory that a window's activations take on a GPU, for a network as wide as
# htdemucs: about 0.5 GB for its 343 980 samples. Where it is too low, batches are halved. Below,
# the largest batch that "auto" tries.
_BYTES_PER_SAMPLE = 1600
_LARGEST_AUTO = 16

_KEPT_SECONDS = 12
"""Sound at a time up to which blocks are tens of megabytes. Of hundreds, kept by a heap, the holes
between them would double what the process takes."""


class Runner:
    """A device, and what was learnt about it: how large a batch may be, for every network.

    One runner serves any number of threads and tracks. `prepare(network, precision)` may
    give a faster form of a network (`precision` is that of the options); it is asked once for
    each, after the network is on its device.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        prepare: Callable[[Network, str], Network] | None = None,
    ) -> None:
        self.device = None if device is None else torch.device(device)
        self._prepare = prepare
        self._prepared: dict[tuple[Network, str], Network] = {}
        self._limits: dict[Network, int] = {}
        self._on_cpu: dict[Network, Network] = {}
        self._lock = Lock()

    @contextmanager
    def lease(self, networks: Iterable[Network]) -> Iterator[None]:
        """The networks on the device and in evaluation mode, and as they were afterwards."""
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(borrowed(network, self.device))
            yield

    def reuses_blocks(self, networks: Iterable[Network], options: Options) -> bool:
        """Whether what a window leaves behind is worth keeping for the next one."""
        return options.split and all(
            self.device_for(network).type == "cpu"
            and (options.segment_seconds or network.segment) * self.batch_size(network, 0, options)
            <= _KEPT_SECONDS
            for network in networks
        )

    def device_for(self, network: Network) -> torch.device:
        """Where `network` runs: the device of the runner, or the one that it is on."""
        return self.device or device_of(network) or torch.device("cpu")

    def batch_size(self, network: Network, window: int, options: Options) -> int:
        """Windows of `window` samples that may run together; never the free memory of a CPU."""
        size = 1 if options.batch_size == "auto" else options.batch_size
        if options.batch_size == "auto":
            device = self.device_for(network)
            if device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(device)
                size = max(1, min(_LARGEST_AUTO, free // 2 // (window * _BYTES_PER_SAMPLE)))
        return min(size, self._limits.get(network, size))

    def answer(
        self, network: Network, windows: Tensor, stems: Sequence[int], options: Options
    ) -> tuple[Tensor, list[Event]]:
        """What `network` says about `stems` in `windows`: (N ... C W) -> (N ... S C W), events.

        Out of memory: the batch is halved and what failed is tried again, down to one window;
        then on the CPU, if allowed. The smaller size is remembered.
        """
        events: list[Event] = []
        parts: list[Tensor] = []
        done = 0
        while done < len(windows):
            limit = self._limits.get(network, len(windows))
            batch = windows[done : done + limit]
            part = self._attempt(network, batch, stems, options, events)
            if isinstance(part, str):
                self._give_way(network, len(batch), part, events)
                continue
            parts.append(part)
            done += len(batch)
        if len(parts) == 1:
            return parts[0], events
        return torch.cat([part.to(parts[0].device) for part in parts]), events

    def _attempt(
        self,
        network: Network,
        windows: Tensor,
        stems: Sequence[int],
        options: Options,
        events: list[Event],
    ) -> Tensor | str:
        """The answers, or why memory ran out if that can be helped; otherwise the error."""
        try:
            return self._finite(network, windows, stems, options, events)
        except (RuntimeError, MemoryError) as error:
            helped = len(windows) > 1 or self._can_leave(network, options)
            if options.oom == "raise" or not helped or not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Only here, where the frames of the failure are gone, is their memory free again.
        if self.device_for(network).type == "cuda":
            torch.cuda.empty_cache()
        return reason

    def _finite(
        self,
        network: Network,
        windows: Tensor,
        stems: Sequence[int],
        options: Options,
        events: list[Event],
    ) -> Tensor:
        """The answers, none of them NaN or infinite."""
        fast = self._ready(network, options.precision)
        answer = self._forward(fast, windows, stems)
        good = torch.isfinite(answer).flatten(1).all(dim=1)
        if bool(good.all()):
            return answer
        bad = (~good).nonzero().flatten().cpu()
        if fast is network or options.precision == "fp32":
            raise SeparationError(
                f"{len(bad)} of {len(windows)} windows came back from the network with NaN or "
                "infinity: the track or the weights hold some"
            )
        again = self._forward(network, windows[bad.to(windows.device)], stems)
        if not bool(torch.isfinite(again).all()):
            raise SeparationError("the network answers NaN or infinity, in float32 too")
        events.append(
            WarningEvent(
                f"{len(bad)} windows overflowed in {options.precision} and were redone in fp32"
            )
        )
        answer = answer.clone()
        answer[bad.to(answer.device)] = again.to(answer)
        return answer

    def _forward(self, network: Network, windows: Tensor, stems: Sequence[int]) -> Tensor:
        device = self._on_cpu.get(network)
        target = torch.device("cpu") if device is not None else self.device_for(network)
        run = network if device is None else device
        flat = windows.flatten(0, -3)
        if target.type == "cuda" and not flat.is_cuda:
            flat = flat.pin_memory()
        wanted = list(stems)
        forward_stems = None if wanted == list(range(len(network.sources))) else _forward_stems(run)
        with torch.inference_mode():
            flat = flat.to(target, non_blocking=True)
            if forward_stems is not None:
                answer, wanted = forward_stems(flat, wanted), list(range(len(wanted)))
            else:
                answer = as_tensor(run(flat), network.sources)
            if answer.shape[-1] != flat.shape[-1] or len(answer) != len(flat):
                raise SeparationError(
                    f"the network answered {tuple(answer.shape)} to {tuple(flat.shape)}: "
                    "batch and samples must stay what they were"
                )
            if wanted != list(range(answer.shape[1])):
                answer = answer[:, wanted]
            return answer.float().reshape(*windows.shape[:-2], *answer.shape[1:])

    def _ready(self, network: Network, precision: str) -> Network:
        if self._prepare is None:
            if precision != "fp32":
                raise ValueError(
                    f"precision = {precision!r} needs a runner that prepares networks for it"
                )
            return network
        if network in self._on_cpu:
            return network
        with self._lock:
            key = (network, precision)
            if key not in self._prepared:
                self._prepared[key] = self._prepare(network, precision)
            return self._prepared[key]

    def _can_leave(self, network: Network, options: Options) -> bool:
        on_device = self.device_for(network).type != "cpu" and network not in self._on_cpu
        return options.cpu_fallback and on_device and isinstance(network, nn.Module)

    def _give_way(self, network: Network, size: int, reason: str, events: list[Event]) -> None:
        with self._lock:
            if size > 1:
                known = self._limits.get(network, size)
                self._limits[network] = min(known, size // 2)
                events.append(BatchSizeReduced(size, size // 2, reason))
            elif network not in self._on_cpu:
                self._on_cpu[network] = _copy_on_cpu(network)
                device = self.device_for(network)
                events.append(WarningEvent(f"{device} has too little memory: going on on the CPU"))


def _copy_on_cpu(network: Network) -> Network:
    """A copy whose weights are on the CPU, made without a byte on the device that is full."""
    module = cast(nn.Module, network)
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        copied = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
        memo[id(parameter)] = copied
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return cast(Network, copy.deepcopy(module, memo).eval())
