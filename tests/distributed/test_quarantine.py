"""Tracks that crash their worker are quarantined, can be released, and a shutdown is no crash."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demucs_infer.cli.main import main
from tests.helpers.batch_runs import batch_words, read_table, write_list
from tests.helpers.cli_process import environment, write_song

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX signals here")

# Ends by a signal in the first window: of a fault, or of one from outside.
KILLED = """
import os, signal, sys
from torch import nn
from demucs_infer.cli.main import main

number = int(sys.argv.pop(1))

def die(module, given):
    os.kill(os.getpid(), number)

nn.modules.module.register_module_forward_pre_hook(die)
sys.exit(main())
"""

# Sleeps in its first window, in a call that no signal interrupts.
SLEEPER = """
import ctypes, signal, sys
from torch import nn
from demucs_infer.cli.main import main

def sleep(module, given):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    print("asleep", flush=True)
    ctypes.CDLL(None).sleep(3600)

nn.modules.module.register_module_forward_pre_hook(sleep)
sys.exit(main())
"""


class Song:
    """A track whose process ends by a signal before any sample is separated."""

    def __init__(self, repo: Path, folder: Path, is_remote: bool) -> None:
        write_song(folder / "song.wav", 1)
        out = f"local://{folder}/out" if is_remote else folder / "out"
        self.table = folder / "results.jsonl"
        self.words = batch_words(write_list(folder, "song.wav"), repo, out)
        self.words += ["--results", str(self.table)]
        self.cache = folder / "cache"
        self.error = ""

    def end_by(self, number: signal.Signals) -> str:
        """Run until the process ends by a signal, and return what it printed."""
        process = subprocess.run(
            [sys.executable, "-c", KILLED, str(int(number)), *self.words],
            env=environment() | {"DEMUCS_INFER_CACHE": str(self.cache)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.returncode == -number, process.stderr
        return process.stderr

    def run(self, *flags: str) -> str:
        """Run undisturbed, and return the status of the track."""
        main([*self.words, *flags])
        [row] = read_table(self.table)
        self.error = row["error"] or self.error
        return str(row["status"])


@pytest.fixture(params=[False, True], ids=["local", "remote"])
def song(
    repo: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Song:
    song = Song(repo, tmp_path, request.param)
    monkeypatch.setenv("DEMUCS_INFER_CACHE", str(song.cache))
    return song


def test_track_that_crashes_is_quarantined_until_it_is_released(
    song: Song, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (signal.SIGSEGV, signal.SIGABRT):
        song.end_by(number)
    for _ in range(2):
        assert song.run() == "quarantined"
        assert "2 times" in song.error and "or use --force" in capsys.readouterr().err

    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert song.run("--force") == "done"
    assert not list(song.cache.rglob("faults/*")) and not list((tmp_path / "out").rglob("fault"))

    shutil.rmtree(tmp_path / "out")
    shutil.copytree(tmp_path / "copy", tmp_path / "out")
    path = Path(song.error.partition("remove ")[2].removeprefix("local://"))
    for file in [path] if path.is_file() else list(path.iterdir()):
        file.unlink()
    assert song.run() == "done"


def test_kills_from_outside_are_not_added_to_a_crash(song: Song) -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL):
        song.end_by(number)
    assert song.run() == "done"


@pytest.mark.slow
def test_track_that_is_killed_from_outside_is_never_lost(song: Song) -> None:
    output = [song.end_by(signal.SIGKILL) for _ in range(5)]
    assert "killed" not in output[1], "once is nothing to report"
    assert "song.wav: its process was killed 4 times at the same position" in output[4]
    assert song.run() == "done"


@pytest.mark.parametrize("out", ["out", "local://{}/remote"], ids=["local", "remote"])
def test_termination_is_not_counted_as_a_crash(repo: Path, tmp_path: Path, out: str) -> None:
    write_song(tmp_path / "song.wav", 3)
    words = batch_words(write_list(tmp_path, "song.wav"), repo, out.format(tmp_path))
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SLEEPER, *words], env=environment(), cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout and process.stdout.readline() == b"asleep\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)  # ends it at once
        _, error = process.communicate(timeout=60)
        # The second code if the second signal meets an interpreter that is shutting down.
        assert process.returncode in (143, -signal.SIGTERM)
        assert b"the same command continues" in error and b"Traceback" not in error
    summary = subprocess.run(
        [sys.executable, "-m", "demucs_infer", *words, "--json"], env=environment(), cwd=tmp_path,
        stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    assert json.loads(summary)["done"] == 1
