"""Tracks that crash their worker are quarantined, can be released, and a shutdown is no crash."""

import json
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

# Kills itself in the first window, as the out-of-memory killer would.
KILLED = """
import os, signal, sys
from torch import nn
from demucs_infer.cli.main import main

def die(module, given):
    os.kill(os.getpid(), signal.SIGKILL)

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


class QuarantinedSong:
    """A healthy track whose process was killed twice from outside."""

    def __init__(self, repo: Path, folder: Path, is_remote: bool) -> None:
        write_song(folder / "song.wav", 1)
        out = f"local://{folder}/out" if is_remote else folder / "out"
        self.table = folder / "results.jsonl"
        self.words = batch_words(write_list(folder, "song.wav"), repo, out)
        self.words += ["--results", str(self.table)]
        for _ in range(2):
            process = subprocess.run([sys.executable, "-c", KILLED, *self.words], env=environment())
            assert process.returncode == -signal.SIGKILL
        assert self.run() == "quarantined"

    def run(self, *flags: str) -> str:
        main([*self.words, *flags])
        [row] = read_table(self.table)
        self.error = row["error"]
        return str(row["status"])


@pytest.fixture(params=[False, True], ids=["local", "remote"])
def song(repo: Path, tmp_path: Path, request: pytest.FixtureRequest) -> QuarantinedSong:
    return QuarantinedSong(repo, tmp_path, request.param)


def test_force_releases_a_quarantined_track(
    song: QuarantinedSong, capsys: pytest.CaptureFixture[str]
) -> None:
    assert song.run() == "quarantined"
    assert "or use --force" in capsys.readouterr().err
    assert song.run("--force") == "done"


def test_error_says_what_to_remove_to_release_a_track(song: QuarantinedSong) -> None:
    path = Path(song.error.partition("remove ")[2].removeprefix("local://"))
    for file in [path] if path.is_file() else list(path.iterdir()):
        file.unlink()
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
