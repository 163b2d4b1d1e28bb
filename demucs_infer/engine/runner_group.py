"""Run windows on several devices, each with its own copy of the networks.

Shapes: N windows, S stems, C channels, W samples of a window.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor

from demucs_infer.engine.network import Network
from demucs_infer.engine.runner import Runner
from demucs_infer.events import Event
from demucs_infer.options import SeparationOptions


class RunnerGroup(Runner):
    """Gives each batch of windows to a runner that is free.

    The first runner uses the networks themselves, the others copies, which are made when the
    networks are leased for the first time. With devices of one kind it does not matter to the
    stems which of them ran a window.
    """

    def __init__(self, runners: Sequence[Runner]) -> None:
        super().__init__(runners[0].device)
        self._runners = tuple(runners)
        self._copies: dict[Network, tuple[Network, ...]] = {}
        self._free: SimpleQueue[int] = SimpleQueue()
        for index in range(len(runners)):
            self._free.put(index)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices of all runners."""
        return tuple(device for runner in self._runners for device in runner.devices)

    @property
    def num_devices(self) -> int:
        """Number of batches that run at a time."""
        return len(self._runners)

    def renew(self) -> "RunnerGroup":
        """Return a group that copies and prepares networks anew."""
        group = RunnerGroup([runner.renew() for runner in self._runners])
        group._baseline = self._baseline
        return group

    @contextmanager
    def lease(self, networks: Iterable[Network]) -> Iterator[None]:
        """Keep `networks` and their copies on the devices, and restore them afterwards."""
        networks = list(networks)
        with self._lock:
            for network in networks:
                if network not in self._copies:  # before it has moved to the first device
                    copies = [copy.deepcopy(network) for _ in self._runners[1:]]
                    self._copies[network] = (network, *copies)
        with ExitStack() as stack:
            for index, runner in enumerate(self._runners):
                stack.enter_context(runner.lease([self._copies[each][index] for each in networks]))
            yield

    def batch_size(self, network: Network, window: int, options: SeparationOptions) -> int:
        """Return how many windows may run together on every device."""
        pairs = zip(self._runners, self._copies.get(network, [network] * self.num_devices))
        return min(runner.batch_size(each, window, options) for runner, each in pairs)

    def infer(
        self,
        network: Network,
        windows: Tensor,
        stems: Sequence[int] | None,
        options: SeparationOptions,
    ) -> tuple[Tensor, list[Event]]:
        """Do the same as `Runner.infer` on the first device that is free."""
        index = self._free.get()
        try:
            return self._runners[index].infer(self._copies[network][index], windows, stems, options)
        finally:
            self._free.put(index)
