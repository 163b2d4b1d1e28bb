"""A command line whose workers crash on square-wave input.

Environment: each worker leaves a file named by its process id in `CRASH_LOG`, with a byte for each
network call. With `CRASH_MEET`, no network runs before that many workers have received rows. With
`CRASH_SLEEP`, each network call sleeps for that many seconds.
"""

import os
import signal
import time
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import nn

from demucs_infer.distributed import worker
from demucs_infer.distributed.config import WorkerConfig
from demucs_infer.distributed.manifest import ResultRow, TrackRow
from demucs_infer.distributed.worker import TrackWorker


class CrashingWorker(TrackWorker):
    """A `TrackWorker` with hooks in its network."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        Path(os.environ["CRASH_LOG"], str(os.getpid())).touch()
        nn.modules.module.register_module_forward_pre_hook(log_call)
        nn.modules.module.register_module_forward_pre_hook(crash_on_square_wave)

    def __call__(self, rows: Iterable[TrackRow]) -> Generator[ResultRow, None, None]:
        if "CRASH_MEET" in os.environ:
            Path(os.environ["CRASH_LOG"], f"{os.getpid()}.given").touch()
        return super().__call__(rows)


def log_call(module: nn.Module, inputs: tuple[object, ...]) -> None:
    """Record a call of the network or of a part of it; wait and sleep as configured."""
    log = Path(os.environ["CRASH_LOG"])
    with (log / str(os.getpid())).open("ab") as file:
        file.write(b".")
    deadline = time.monotonic() + 120
    expected = int(os.environ.get("CRASH_MEET", "0"))
    while expected and len(list(log.glob("*.given"))) < expected:
        assert time.monotonic() < deadline, "no other worker received rows"
        time.sleep(0.01)
    time.sleep(float(os.environ.get("CRASH_SLEEP", "0")))


def crash_on_square_wave(module: nn.Module, inputs: tuple[object, ...]) -> None:
    """Crash the process, as a failing driver would."""
    mix = inputs[0]
    if isinstance(mix, torch.Tensor) and mix.ndim == 3 and mix.shape[1] == 2:
        level = mix[..., 2000:4000].abs()
        if level.numel() and level.std() < 1e-3 * level.mean():
            os.kill(os.getpid(), signal.SIGSEGV)


def main() -> int:
    """Run the command line with crashing workers."""
    from demucs_infer.cli.main import main

    worker.TrackWorker = CrashingWorker  # type: ignore[misc]  # pickled by name
    return main()
