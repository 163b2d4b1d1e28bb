"""A worker whose network takes its process along when it hears a square wave."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from demucs_infer.distributed import worker
from demucs_infer.distributed.worker import Assignment, Worker


class Deadly(Worker):
    """As `Worker`; leaves in `DEADLY_IDS` a file called as its process id, a byte a forward."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(assignment)
        Path(os.environ["DEADLY_IDS"], str(os.getpid())).touch()
        nn.modules.module.register_module_forward_pre_hook(count)
        nn.modules.module.register_module_forward_pre_hook(die_of_a_square_wave)


def count(module: nn.Module, given: tuple[object, ...]) -> None:
    """Enter a call of the network, or of a part of it."""
    with Path(os.environ["DEADLY_IDS"], str(os.getpid())).open("ab") as file:
        file.write(b".")


def die_of_a_square_wave(module: nn.Module, given: tuple[object, ...]) -> None:
    """No clean end, as of a driver that crashes or a machine that has no more memory."""
    mix = given[0]
    if isinstance(mix, torch.Tensor) and mix.ndim == 3 and mix.shape[1] == 2:
        size = mix[..., 2000:4000].abs()
        if size.numel() and size.std() < 1e-3 * size.mean():
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """The command line, with such workers."""
    from demucs_infer.separate import main

    worker.Worker = Deadly  # type: ignore[misc]  # pickled by name, and so found on the workers
    return main(sys.argv[1:])
