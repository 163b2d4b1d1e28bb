"""Upstream's command and ours, on the same folder of models: the same files and samples."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demucs_infer.cli.main import main
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import RATE, environment, load, make_repo, save, tree, write_song

# Everything that upstream's command takes and that decides what lies where. Shifts are off:
# upstream's command has no seed.
LINES = {
    "bag": "-n bag --shifts 0 a.wav b.b.flac",
    "two": "-n bag --shifts 0 --two-stems drums --overlap 0.5 a.wav",
    "minus": "-n 4f2b8e3d --shifts 0 --two-stems vocals --other-method minus --int24 a.wav",
    "none": "-n 9d0a6f1c --shifts 0 --two-stems bass --other-method none a.wav",
    "named": "-n 9d0a6f1c --shifts 0 --no-split --filename {stem}/{track}.{trackext}.{ext} a.wav",
    "float": "-n 9d0a6f1c --shifts 0 --float32 --clip-mode clamp loud.wav",
    "rescaled": "-n 9d0a6f1c --shifts 0 --segment 2 --clip-mode rescale loud.wav",
    "floats": "-n 9d0a6f1c --shifts 0 --clip-mode rescale --float32 loud.wav",
    "steps": "-n 9d0a6f1c --shifts 0 --clip-mode rescale loud.wav",
    "mp3": "-n 9d0a6f1c --shifts 0 --mp3 --mp3-bitrate 128 --mp3-preset 5 a.wav",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every line with upstream, in one process, each into `theirs/LINE` of this folder."""
    folder = tmp_path_factory.mktemp("dropin")
    make_repo(folder / "repo")
    write_song(folder / "a.wav", 3.3, seed=1)
    write_song(folder / "b.b.flac", 1.1, seed=2)
    save(folder / "loud.wav", 30 * make_noise(2, 2 * RATE), subtype="FLOAT")
    code = "import sys, shlex\nfrom demucs.separate import main\n" \
        "for line in sys.argv[1:]: main(shlex.split(line))"  # fmt: skip
    lines = [f"{line} --repo repo -d cpu -o theirs/{name}" for name, line in LINES.items()]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *lines],
        cwd=folder, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", LINES)
def test_the_same_line_gives_the_same_files(
    name: str, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(both)
    words = LINES[name].split()
    assert main([*words, "--repo", "repo", "-d", "cpu", "-o", f"ours/{name}", "-q"]) == 0
    ours, theirs = both / "ours" / name, both / "theirs" / name
    files = [file for file in tree(ours) if not file.endswith(".json")]
    assert files == tree(theirs) != []
    for file in files:
        if name == "mp3":  # upstream's lack the delay tag: they are 25 ms late, and longer
            continue
        mine, his = load(ours / file), load(theirs / file)
        assert mine.shape == his.shape
        assert np.abs(mine - his).max() <= tolerance(name, his), file


def tolerance(name: str, wav: "np.ndarray[object, np.dtype[np.float64]]") -> float:
    if name.startswith("float"):  # the same sums in another order
        return 1e-5 * max(1.0, float(np.abs(wav).max()))
    # Upstream scales by 32767 and truncates, we scale by 32768 and round: a step for its
    # truncation, up to one at full scale for the other scale, and half a one for rounding stems
    # together. In 24 bits the order of sums of float32 shows too.
    return 2 / 2**23 + 1e-6 if name == "minus" else 2 / 2**15


def test_files_are_within_one_step_of_what_was_computed(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that upstream's files lose by truncation is upstream's, not ours."""
    monkeypatch.chdir(both)
    line = ["a.wav", "-n", "bag", "--shifts", "0", "--repo", "repo", "-d", "cpu", "-q"]
    assert main([*line, "-o", "exact", "--float32"]) == 0
    assert main([*line, "-o", "rounded"]) == 0
    for file in tree(both / "rounded"):
        if file.endswith("wav"):
            error = np.abs(load(both / "rounded" / file) - load(both / "exact" / file)).max()
            assert error <= 1.0001 / 2**15


def test_sixteen_bits_are_upstreams_floats_rounded(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what upstream computes, and against what it writes: trunc(32767 x).

    We write round(32768 x), so that what passes through stays bit for bit what it was. With y the
    fraction that upstream cuts off, a magnitude x is then floor(x + y + 1/2) steps larger here:
    never more than 2, and 2 only where x is beyond half of full scale.
    """
    monkeypatch.chdir(both)
    for name in ("floats", "steps"):
        assert main([*LINES[name].split(), "--repo", "repo", "-d", "cpu", "-o", name, "-q"]) == 0
    for file in (file for file in tree(both / "steps") if file.endswith(".wav")):
        mine = np.round(load(both / "steps" / file) * 32768)
        exact = load(both / "theirs" / "floats" / file) * 32768
        written = np.round(load(both / "theirs" / "steps" / file) * 32768)
        assert np.abs(mine - np.round(exact)).max() <= 1  # sums of floats in another order
        apart = np.abs(mine - written)
        assert apart.max() <= 2
        assert (np.abs(exact[apart == 2]) >= 16384 - 1).all()
