"""Compare upstream's command with ours on the same folder of models: files and samples."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import demucs_infer.separate
from demucs_infer.cli.main import main
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import RATE, environment, load, make_repo, save, tree, write_song

# Every flag of upstream's command that changes files. Shifts are off: upstream's has no seed.
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
    "mp3": "-n 9d0a6f1c --shifts 0 --mp3 --mp3-bitrate 64 --mp3-preset 5 a.wav",
}


@pytest.fixture(scope="module")
def compared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every line with upstream, in one process, in a folder, into `upstream/NAME`."""
    folder = tmp_path_factory.mktemp("dropin")
    make_repo(folder / "repo")
    write_song(folder / "a.wav", 3.3, seed=1)
    write_song(folder / "b.b.flac", 1.1, seed=2)
    save(folder / "loud.wav", 30 * make_noise(2, 2 * RATE), subtype="FLOAT")
    code = "import sys, shlex\nfrom demucs.separate import main\n" \
        "for line in sys.argv[1:]: main(shlex.split(line))"  # fmt: skip
    lines = [f"{line} --repo repo -d cpu -o upstream/{name}" for name, line in LINES.items()]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *lines],
        cwd=folder, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", LINES)
def test_same_flags_give_same_files_and_samples(
    name: str, compared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compared_folder)
    words = LINES[name].split()
    assert main([*words, "--repo", "repo", "-d", "cpu", "-o", f"ours/{name}", "-q"]) == 0
    ours, upstream = compared_folder / "ours" / name, compared_folder / "upstream" / name
    files = [file for file in tree(ours) if not file.endswith(".json")]
    assert files == tree(upstream) != []
    for file in files:
        if name == "mp3":  # upstream's lack the delay tag: they are 25 ms late, and longer
            continue
        samples, expected = load(ours / file), load(upstream / file)
        assert samples.shape == expected.shape
        assert np.abs(samples - expected).max() <= tolerance(name, expected), file


def tolerance(name: str, wav: "np.ndarray[object, np.dtype[np.float64]]") -> float:
    if name.startswith("float"):  # the same sums in another order
        return 1e-5 * max(1.0, float(np.abs(wav).max()))
    # Upstream scales by 32767 and truncates, we scale by 32768 and round: a step for its
    # truncation, up to one at full scale for the other scale, and half a one for rounding stems
    # together. In 24 bits the order of sums of float32 shows too.
    return 2 / 2**23 + 1e-6 if name == "minus" else 2 / 2**15


def test_16_bit_files_are_within_one_step_of_float_files(
    compared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that upstream's files lose by truncation is upstream's, not ours."""
    monkeypatch.chdir(compared_folder)
    line = ["a.wav", "-n", "bag", "--shifts", "0", "--repo", "repo", "-d", "cpu", "-q"]
    assert main([*line, "-o", "exact", "--float32"]) == 0
    assert main([*line, "-o", "rounded"]) == 0
    for file in tree(compared_folder / "rounded"):
        if file.endswith("wav"):
            error = np.abs(
                load(compared_folder / "rounded" / file) - load(compared_folder / "exact" / file)
            ).max()
            assert error <= 1.0001 / 2**15


def test_16_bit_files_are_upstreams_floats_rounded(
    compared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what upstream computes, and against what it writes: trunc(32767 x).

    We write round(32768 x), so that what passes through stays bit for bit what it was. With y the
    fraction that upstream cuts off, a magnitude x is then floor(x + y + 1/2) steps larger here:
    never more than 2, and 2 only where x is beyond half of full scale.
    """
    monkeypatch.chdir(compared_folder)
    for name in ("floats", "steps"):
        assert main([*LINES[name].split(), "--repo", "repo", "-d", "cpu", "-o", name, "-q"]) == 0
    for file in (file for file in tree(compared_folder / "steps") if file.endswith(".wav")):
        samples = np.round(load(compared_folder / "steps" / file) * 32768)
        exact = load(compared_folder / "upstream" / "floats" / file) * 32768
        written = np.round(load(compared_folder / "upstream" / "steps" / file) * 32768)
        assert np.abs(samples - np.round(exact)).max() <= 1  # sums of floats in another order
        difference = np.abs(samples - written)
        assert difference.max() <= 2
        assert (np.abs(exact[difference == 2]) >= 16384 - 1).all()


@pytest.mark.parametrize(
    ("flags", "begins"),
    [
        ([], b"Separated tracks will be stored in "),
        (["--json"], b"{"),
        (["--stems", "drums", "-o", "-"], b"RIFF"),
        (["-q"], b""),
    ],
    ids=["lines", "json", "stem", "quiet"],
)
def test_upstreams_front_alone_prints_lines_and_only_where_nothing_else_is(
    flags: list[str], begins: bytes, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    make_repo(tmp_path / "repo")
    write_song(tmp_path / "a.wav", 0.5, seed=1)
    words = [str(tmp_path / "a.wav"), "-n", "9d0a6f1c", "--repo", str(tmp_path / "repo")]
    words += ["-d", "cpu", "-o", str(tmp_path / "out"), *flags]
    demucs_infer.separate.main(words)
    out = capfdbinary.readouterr().out
    assert out.startswith(begins)
    assert (b"Separating track" in out) == (not flags)
    if not flags:
        assert main(["--force", *words]) == 0
        assert capfdbinary.readouterr().out == b""
