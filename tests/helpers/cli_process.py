"""Help tests to run the command: a folder of small models, songs, and processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, randomize

ROOT = Path(__file__).parents[2]
RATE = 8000  # of every model here


def make_repo(folder: Path) -> Path:
    """Make a folder of models as upstream writes them: three networks, and a bag of two."""
    import demucs.demucs
    import demucs.htdemucs
    from demucs.states import save_with_checksum

    kinds = {
        "9d0a6f1c": (demucs.demucs.Demucs, TINY["Demucs"]),
        "4f2b8e3d": (demucs.htdemucs.HTDemucs, TINY["HTDemucs"]),
        "1c7e5a90": (demucs.htdemucs.HTDemucs, TINY["HTDemucs"]),
    }
    folder.mkdir(parents=True)
    for seed, (signature, (klass, kwargs)) in enumerate(kinds.items()):
        network = randomize(klass(**kwargs), seed)
        package = {"klass": klass, "args": (), "kwargs": kwargs, "state": network.state_dict()}
        save_with_checksum(package, folder / f"{signature}.th")
    weights = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
    bag = {"models": ["4f2b8e3d", "1c7e5a90"], "weights": weights}
    (folder / "bag.yaml").write_text(json.dumps(bag))
    return folder


def write_song(
    path: Path, seconds: float = 3.0, *, seed: int = 0, rate: int = RATE, channels: int = 2
) -> Path:
    """Write a file of noise, the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, make_noise(channels, round(seconds * rate), seed), rate)
    return path


def save(path: Path, wav: Tensor, rate: int = RATE, subtype: str = "PCM_16") -> None:
    soundfile.write(path, wav.T.numpy(), rate, subtype=subtype)


def load(path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the samples (T C) exactly as they are in the file."""
    return soundfile.read(path, always_2d=True)[0]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_process(
    words: Sequence[str | Path], *, cwd: Path, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m demucs_infer WORDS`."""
    command = [sys.executable, "-m", "demucs_infer", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, env=environment(), timeout=120
    )


def tree(folder: Path) -> list[str]:
    """Return the paths of all files below the folder, including hidden ones."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
