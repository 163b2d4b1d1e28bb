"""Programs of the kinds that people write for upstream run here, with another import name alone.

Each file of `programs` is such a program. It finds the names of `names_of` defined, and leaves
tensors in `result`, paths of audio files in `files`, and anything that can be compared in `facts`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demucs.demucs
import demucs.htdemucs
import demucs.states
import numpy as np
import pytest
import soundfile
import torch

from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import RATE, environment
from tests.helpers.networks import TINY, randomize
from tests.helpers.oracles import require_tool

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three networks, a bag of two, and a bag of one."""
    folder = tmp_path_factory.mktemp("repo")
    kinds: dict[str, tuple[Callable[..., Any], str]] = {
        "aaaa0000": (demucs.htdemucs.HTDemucs, "HTDemucs"),
        "bbbb1111": (demucs.htdemucs.HTDemucs, "HTDemucs"),
        "time": (demucs.demucs.Demucs, "Demucs"),
    }
    for seed, (name, (build, kind)) in enumerate(kinds.items()):
        network = randomize(build(**TINY[kind]), seed)
        package = {
            "klass": build,
            "args": (),
            "kwargs": TINY[kind],
            "state": demucs.states.get_state(network, None),
        }
        demucs.states.save_with_checksum(package, folder / f"{name}.th")
    weights = "[[1., 0., 1., 0.5], [0., 1., 1., 0.25]]"
    (folder / "bag.yaml").write_text(f"models: [aaaa0000, bbbb1111]\nweights: {weights}\n")
    (folder / "htdemucs.yaml").write_text("models: [aaaa0000]\n")
    return folder


@pytest.fixture(scope="module")
def track(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file at the rate of the models: upstream resamples files with ffmpeg."""
    path = tmp_path_factory.mktemp("track") / "song.wav"
    soundfile.write(path, make_noise(2, 3 * RATE).T.numpy(), RATE, subtype="FLOAT")
    return path


def names_of(repo: Path, track: Path, out: Path) -> dict[str, Any]:
    """Return what a program finds defined."""
    return {
        "REPO": repo,
        "TRACK": track,
        "OUT": out,
        "WAV": make_noise(2, 2 * RATE, seed=4),
        "RATE": RATE,
        "ARGUMENTS": TINY["HTDemucs"],
        "ENVIRONMENT": environment(),
        "torch": torch,
        "__name__": "__main__",
    }


def run(source: str, names: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Run a program; return its audio, and its facts."""
    exec(source, names)
    audio = {name: np.asarray(wav) for name, wav in names.get("result", {}).items()}
    for path in names.get("files", []):
        data, rate = soundfile.read(path, dtype="float32", always_2d=True)
        audio[path.name] = data.T
        assert rate == RATE
    return audio, names.get("facts")


# PyTorch before 2.6 asks the programs themselves to choose `weights_only`.
@pytest.mark.filterwarnings("ignore:You are using `torch.load` with `weights_only:FutureWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program_gives_the_same_with_both_packages(
    program: Path, repo: Path, track: Path, tmp_path: Path
) -> None:
    source = program.read_text("utf-8")
    if "AudioFile" in source:
        require_tool("ffmpeg")
    played = []
    for package in ("demucs", "demucs_infer"):
        out = tmp_path / package
        out.mkdir()
        renamed = re.sub(r"(?<![.])\bdemucs\b", package, source)
        torch.manual_seed(0)
        played.append(run(renamed, names_of(repo, track, out)))
    (theirs, their_facts), (ours, our_facts) = played
    assert our_facts == their_facts
    assert ours.keys() == theirs.keys()
    assert ours or our_facts is not None
    for name, wav in theirs.items():
        assert ours[name].shape == wav.shape, name
        scale = max(1.0, float(np.abs(wav).max()))
        np.testing.assert_allclose(ours[name], wav, rtol=0, atol=TOLERANCE * scale, err_msg=name)


def test_there_are_programs_of_every_kind() -> None:
    assert len(PROGRAMS) >= 20
