"""A worker whose network takes its process along when it hears a square wave."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from demucs_infer.distributed import worker
from demucs_infer.distributed.manifest import ResultRow, TrackRow
from demucs_infer.distributed.worker import TrackWorker, WorkerConfig


class Deadly(TrackWorker):
    """As `TrackWorker`; leaves in `DEADLY_IDS` a file called as its process id, a byte a forward.

    With `DEADLY_MEET`, that many workers have to be given a row before any network runs; with
    `DEADLY_SLEEP`, it then sleeps for so many seconds.
    """

    def __init__(self, assignment: WorkerConfig) -> None:
        super().__init__(assignment)
        Path(os.environ["DEADLY_IDS"], str(os.getpid())).touch()
        nn.modules.module.register_module_forward_pre_hook(count)
        nn.modules.module.register_module_forward_pre_hook(die_of_a_square_wave)

    def __call__(self, rows: Iterable[TrackRow]) -> Iterator[ResultRow]:
        if "DEADLY_MEET" in os.environ:
            Path(os.environ["DEADLY_IDS"], f"{os.getpid()}.given").touch()
        return super().__call__(rows)


def count(module: nn.Module, given: tuple[object, ...]) -> None:
    """Enter a call of the network, or of a part of it."""
    ids = Path(os.environ["DEADLY_IDS"])
    with (ids / str(os.getpid())).open("ab") as file:
        file.write(b".")
    deadline = time.monotonic() + 120
    wanted = int(os.environ.get("DEADLY_MEET", "0"))
    while wanted and len(list(ids.glob("*.given"))) < wanted:
        assert time.monotonic() < deadline, "nobody else was given a row"
        time.sleep(0.01)
    time.sleep(float(os.environ.get("DEADLY_SLEEP", "0")))


def die_of_a_square_wave(module: nn.Module, given: tuple[object, ...]) -> None:
    """No clean end, as of a driver that crashes or a machine that has no more memory."""
    mix = given[0]
    if isinstance(mix, torch.Tensor) and mix.ndim == 3 and mix.shape[1] == 2:
        size = mix[..., 2000:4000].abs()
        if size.numel() and size.std() < 1e-3 * size.mean():
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """The command line, with such workers."""
    from demucs_infer.cli.main import main

    worker.TrackWorker = Deadly  # type: ignore[misc]  # pickled by name, and so found on the workers
    return main()
