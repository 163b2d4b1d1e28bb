"""Run windows through a network, in batches that fit the memory of its device.

Shapes: N windows, B batch, S stems, C channels, W samples of a window; `...` any leading axes,
for recordings that are separated together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock, RLock
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from demucs_infer.engine.device_track import free_device_memory, upload, use_device
from demucs_infer.engine.network import Network, SupportsStemSelection, as_tensor
from demucs_infer.engine.parallel import measure_memory
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.errors import SeparationError, is_out_of_memory
from demucs_infer.events import BatchSizeReduced, DeviceChosen, Event, WarningEvent
from demucs_infer.options import SeparationOptions


def consumes_rng(network: object) -> bool:
    """Return whether upstream's version of `network` draws a random number in every forward.

    Upstream's transformer draws an offset for its sinusoidal position embedding. The offset is
    always 0, but the draw advances Python's generator, from which later shifts are drawn.
    """
    if isinstance(network, QueryAdapter):
        network = network.network
    transformer = getattr(network, "crosstransformer", None)
    config = getattr(transformer, "config", transformer)
    return getattr(config, "emb", None) == "sin"


@dataclass(slots=True)
class _Lease:
    """State of a network before it was used, to be restored, and the number of current users."""

    device: torch.device | None
    training: list[tuple[nn.Module, bool]]
    count: int = 0


# Global, because two runners may use the same network at the same time.
_leases: WeakKeyDictionary[nn.Module, _Lease] = WeakKeyDictionary()
# Reentrant: the garbage collector may close an abandoned generator, which then releases its
# network, in a thread that already holds this lock.
_leases_lock = RLock()


@contextmanager
def lease_network(network: object, device: torch.device | None) -> Iterator[None]:
    """Keep `network` on `device` and in evaluation mode inside the context.

    Several contexts may use a network at once; the last one restores its former state. Raises
    `ValueError` if the network is in use on another device.
    """
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
            if device is not None and not _is_same_device(device, lease.device):
                network.to(device)
            _leases[network] = lease
        elif device is not None and not _is_same_device(device, device_of(network)):
            raise ValueError(
                f"the network is in use on {device_of(network)} and cannot move to {device}: "
                "wait until it is free, or load it twice"
            )
        lease.count += 1
    try:
        yield
    finally:
        with _leases_lock:
            lease.count -= 1
            if not lease.count:
                # At interpreter shutdown, the dictionary may have dropped the entry already.
                _leases.pop(network, None)
                for module, training in lease.training:
                    module.training = training
                if lease.device is not None and not _is_same_device(device, lease.device):
                    network.to(lease.device)


def device_of(network: object) -> torch.device | None:
    """Return the device of the weights of `network`, or None if it has none."""
    if not isinstance(network, nn.Module):
        return None
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            return tensor.device
    return None


def _is_same_device(first: torch.device | None, second: torch.device | None) -> bool:
    if first is None or second is None:
        return True
    # There is only one CPU, whatever its index; and a missing index means device 0.
    is_cpu = first.type == "cpu"
    return first.type == second.type and (is_cpu or (first.index or 0) == (second.index or 0))


# Estimated GPU memory for the activations per sample of a window, for a network as wide as
# htdemucs: about 0.5 GB for 343,980 samples. If it is too low for a network, batches are halved.
_BYTES_PER_SAMPLE = 1600

_MAX_AUTO_BATCH = 16
"""Largest batch that "auto" tries."""

_MAX_SECONDS_TO_KEEP = 12
"""Longest batch, in seconds of audio, whose memory is kept for the next batch. Up to this length
allocations are tens of megabytes; beyond, gaps between them would double the memory used."""


class Runner:
    """Runs networks on a device, and remembers which batch size fits each network.

    A runner may be shared by any number of threads and tracks. `prepare(network, precision)` may
    return a faster version of a network for the `precision` of the options; it is called once
    per network and precision, after the network has moved to its device. `device_choice` is the
    event that tells why the device was chosen, if the caller did not choose it.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        prepare: Callable[[Network, str], Network] | None = None,
        device_choice: DeviceChosen | None = None,
    ) -> None:
        self.device = None if device is None else torch.device(device)
        self._device_choice = device_choice
        self._prepare = prepare
        self._prepared: dict[tuple[Network, str], Network] = {}
        self._limits: dict[Network, int] = {}
        self._on_cpu: dict[Network, Network] = {}
        self._baseline: list[int] = []
        # Held while one of the three dictionaries above is changed, but not while it is read: a
        # thread that reads an outdated batch size only runs out of memory once more.
        self._lock = Lock()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices of this runner; none if it uses that of a network."""
        return () if self.device is None else (self.device,)

    @property
    def num_devices(self) -> int:
        """Number of batches that run at a time."""
        return 1

    def renew(self) -> Runner:
        """Return a runner that prepares networks anew, and knows which batch sizes fit."""
        runner = Runner(self.device, prepare=self._prepare, device_choice=self._device_choice)
        runner._limits, runner._lock = self._limits, self._lock
        runner._baseline = self._baseline
        return runner

    def measure_memory(self, device: torch.device) -> int:
        """Return the bytes that were in use before the first track: later, freed ones may count."""
        if not self._baseline:
            self._baseline.append(max(map(measure_memory, self.devices or (device,))))
        return self._baseline[0]

    @contextmanager
    def lease(self, networks: Iterable[Network]) -> Iterator[None]:
        """Keep `networks` on the device and in evaluation mode, and restore them afterwards."""
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(lease_network(network, self.device))
            yield

    def announce_device(self) -> Iterator[DeviceChosen]:
        """Yield the event that tells which device was chosen, once per runner."""
        with self._lock:
            choice, self._device_choice = self._device_choice, None
        if choice is not None:
            yield choice

    def should_keep_allocations(
        self, networks: Iterable[Network], options: SeparationOptions
    ) -> bool:
        """Return whether the memory of a batch should be kept for the next one."""
        return options.split and all(
            self.device_for(network).type == "cpu"
            and (options.segment or network.segment) * self.batch_size(network, 0, options)
            <= _MAX_SECONDS_TO_KEEP
            for network in networks
        )

    def device_for(self, network: Network) -> torch.device:
        """Return the device of the runner, or else the one that `network` is on."""
        return self.device or device_of(network) or torch.device("cpu")

    def batch_size(self, network: Network, window: int, options: SeparationOptions) -> int:
        """Return how many windows of `window` samples may run together.

        "auto" is as many as fit the free memory of a GPU. On a CPU it is 1, whatever memory is
        free, so that the last bits of a result do not depend on the machine.
        """
        size = 1 if options.batch_size == "auto" else options.batch_size
        if options.batch_size == "auto":
            device = self.device_for(network)
            if device.type == "cuda":
                # Half of it, because the estimate is rough.
                free = free_device_memory(device) // 2
                size = max(1, min(_MAX_AUTO_BATCH, free // (window * _BYTES_PER_SAMPLE)))
        return min(size, self._limits.get(network, size))

    def infer(
        self,
        network: Network,
        windows: Tensor,
        stems: Sequence[int] | None,
        options: SeparationOptions,
    ) -> tuple[Tensor, list[Event]]:
        """Run `network` for `stems`, and return events: (N, ..., C, W) -> (N, ..., S, C, W).

        None for `stems`: all.

        If memory runs out, the batch is halved and the failed part retried, down to one window;
        then the CPU is used, if allowed; then the original error is raised. Later batches keep
        the smaller size.
        """
        events: list[Event] = []
        parts: list[Tensor] = []
        done = 0
        while done < len(windows):
            # Look the limit up each time: another thread may have reduced it.
            limit = self._limits.get(network, len(windows))
            batch = windows[done : done + limit]
            part = self._try_batch(network, batch, stems, options, events)
            if isinstance(part, str):
                self._reduce_or_fall_back(network, len(batch), part, events)
                continue
            parts.append(part)
            done += len(batch)
        if len(parts) == 1:
            return parts[0], events
        # After a fallback, the last parts are on another device than the first.
        return torch.cat([part.to(parts[0].device) for part in parts]), events

    def _try_batch(
        self,
        network: Network,
        windows: Tensor,
        stems: Sequence[int] | None,
        options: SeparationOptions,
        events: list[Event],
    ) -> Tensor | str:
        """Return the stems, or the reason why memory ran out if a retry can help."""
        try:
            return self._infer_finite(network, windows, stems, options, events)
        except (RuntimeError, MemoryError) as error:
            can_retry = len(windows) > 1 or self._can_fall_back(network, options)
            if options.oom == "raise" or not can_retry or not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Not inside `except`: until the exception is gone, its traceback keeps the tensors of the
        # failed forward pass in memory.
        self.release_memory(network)
        if self.device_for(network).type == "cuda":
            torch.cuda.empty_cache()
        return reason

    def _infer_finite(
        self,
        network: Network,
        windows: Tensor,
        stems: Sequence[int] | None,
        options: SeparationOptions,
        events: list[Event],
    ) -> Tensor:
        """Return the stems; windows that overflow in reduced precision are run again in fp32."""
        fast = self._prepare_network(network, options.precision)
        output = self._forward(fast, windows, stems)
        is_finite = torch.isfinite(output).flatten(1).all(dim=1)
        if bool(is_finite.all()):
            return output
        bad = (~is_finite).nonzero().flatten().cpu()
        if fast is network or options.precision == "fp32":
            raise SeparationError(
                f"the network returned NaN or infinity for {len(bad)} of {len(windows)} windows: "
                "check the track and the weights"
            )
        repaired = self._forward(network, windows[bad.to(windows.device)], stems)
        if not bool(torch.isfinite(repaired).all()):
            raise SeparationError(
                f"the network returned NaN or infinity in {options.precision} and in fp32: "
                "check the track and the weights"
            )
        events.append(
            WarningEvent(
                f"{len(bad)} windows overflowed in {options.precision} and were redone in fp32"
            )
        )
        output = output.clone()  # inference tensors cannot be written to here
        output[bad.to(output.device)] = repaired.to(output)
        return output

    def _forward(self, network: Network, windows: Tensor, stems: Sequence[int] | None) -> Tensor:
        """Run `network`, or its copy on the CPU, and select `stems` of its output."""
        cpu_copy = self._on_cpu.get(network)
        target = torch.device("cpu") if cpu_copy is not None else self.device_for(network)
        run = network if cpu_copy is None else cpu_copy
        flat = windows.flatten(0, -3)
        selected = None if stems is None else list(stems)
        if selected == list(range(len(network.sources))):
            selected = None
        forward_stems = None if selected is None else _find_forward_stems(run)
        # Only here: a generator that enters inference mode would impose it on its consumer.
        with use_device(target), torch.inference_mode():
            flat = upload(flat, target)
            if forward_stems is not None and selected is not None:
                output, selected = forward_stems(flat, selected), None
            else:
                output = as_tensor(run(flat), network.sources)
            if output.shape[-1] != flat.shape[-1] or len(output) != len(flat):
                raise SeparationError(
                    f"the network returned {tuple(output.shape)} for {tuple(flat.shape)}: "
                    "the numbers of windows and samples must stay the same"
                )
            if selected is not None:
                output = output[:, selected]
            return output.float().reshape(*windows.shape[:-2], *output.shape[1:])

    def _prepare_network(self, network: Network, precision: str) -> Network:
        if self._prepare is None:
            if precision != "fp32":
                raise ValueError(
                    f"precision = {precision!r} needs a runner with `prepare`; "
                    "without it, use 'fp32'"
                )
            return network
        if network in self._on_cpu:
            return network
        # Held while preparing: threads that start together must not prepare a network twice.
        with self._lock:
            key = (network, precision)
            if key not in self._prepared:
                self._prepared[key] = self._prepare(network, precision)
            return self._prepared[key]

    def release_memory(self, network: Network | None = None) -> None:
        """Free what fast versions of `network`, or of all, keep between batches, such as graphs."""
        with self._lock:
            prepared = [
                fast
                for (key, _), fast in self._prepared.items()
                if network is None or network is key
            ]
        for fast in prepared:
            release = getattr(fast, "release_memory", None)
            if release is not None:
                release()

    def _can_fall_back(self, network: Network, options: SeparationOptions) -> bool:
        on_device = self.device_for(network).type != "cpu" and network not in self._on_cpu
        return options.cpu_fallback and on_device and isinstance(network, nn.Module)

    def _reduce_or_fall_back(
        self, network: Network, size: int, reason: str, events: list[Event]
    ) -> None:
        with self._lock:
            if size > 1:
                # Only lowered: another thread may have found a smaller size meanwhile.
                limit = self._limits.get(network, size)
                self._limits[network] = min(limit, size // 2)
                events.append(BatchSizeReduced(size, size // 2, reason))
            elif network not in self._on_cpu:
                self._on_cpu[network] = _copy_to_cpu(network)
                device = self.device_for(network)
                events.append(
                    WarningEvent(f"{device} has too little memory: continuing on the CPU")
                )


def _find_forward_stems(network: object) -> Callable[[Tensor, Sequence[int]], Tensor] | None:
    """Return the method that computes only some stems, or None.

    It is None where it could give another result than a call of the network.
    """
    # Hooks run when the module is called; `forward_stems` would bypass them.
    if getattr(network, "_forward_hooks", None) or getattr(network, "_forward_pre_hooks", None):
        return None
    for cls in type(network).__mro__:
        if "forward_stems" in vars(cls):
            return cast(SupportsStemSelection, network).forward_stems
        if "forward" in vars(cls):  # overridden alone: the two may differ
            return None
    return None


def _copy_to_cpu(network: Network) -> Network:
    """Return a copy of `network` on the CPU without allocating on its device, which is full."""
    module = cast(nn.Module, network)
    # `deepcopy` reuses the copies in its memo; it would clone other tensors on the device.
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        copied = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
        memo[id(parameter)] = copied
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return cast(Network, copy.deepcopy(module, memo).eval())
