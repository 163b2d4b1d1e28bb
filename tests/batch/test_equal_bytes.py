"""Test that stems have the same bytes, however many processes, cores and attempts made them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.batch_runs import batch_words, stem_digests, write_list
from tests.helpers.cli_process import environment, make_repo, write_song

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    make_repo(folder / "repo")
    for seed in range(4):
        write_song(folder / f"{seed}.wav", 12 + seed, seed=seed)
    write_list(folder, *(f"{seed}.wav" for seed in range(4)))
    return folder


def start(folder: Path, out: Path, *words: str, threads: int = 1) -> "subprocess.Popen[bytes]":
    command = [*batch_words(folder / "list.txt", folder / "repo", out), *words]
    return subprocess.Popen(
        [sys.executable, "-m", "demucs_infer", *command],
        env={**environment(), "OMP_NUM_THREADS": str(threads)},
    )


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """Return the digests of an undisturbed run."""
    assert start(folder, folder / "expected", "-j", "1").wait(120) == 0
    return stem_digests(folder / "expected")


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_a_folder(
    folder: Path, tmp_path: Path, expected: dict[str, str], count: int
) -> None:
    processes = [
        start(folder, tmp_path, "-j", "1", "--results", str(tmp_path / f"{n}.jsonl"))
        for n in range(count)
    ]
    assert [process.wait(200) for process in processes] == [0] * count
    assert stem_digests(tmp_path) == expected


@pytest.mark.parametrize("threads", [2, 4])
def test_numbers_of_threads(
    folder: Path, tmp_path: Path, expected: dict[str, str], threads: int
) -> None:
    assert start(folder, tmp_path, "-j", str(threads), threads=threads).wait(120) == 0
    assert stem_digests(tmp_path) == expected


def test_a_run_that_was_killed_and_resumed(
    folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    process = start(folder, tmp_path, "-j", "1")
    while not [path for path in tmp_path.rglob("journal") if path.stat().st_size > 20]:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert start(folder, tmp_path, "-j", "1").wait(120) == 0
    assert stem_digests(tmp_path) == expected
