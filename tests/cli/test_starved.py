"""Test what the command says when memory runs out, or nothing comes out of a pipe."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.batch_runs import model_flags
from tests.helpers.cli_process import environment, make_repo, write_song


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starved")
    make_repo(folder / "repo")
    write_song(folder / "song.wav", 1)
    return folder


def start(folder: Path, *words: str, before: str = "") -> "subprocess.Popen[str]":
    code = f"import sys; {before}\nfrom demucs_infer.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words, *model_flags(folder / "repo"), "--force"]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip


# How the threads that encode fail where no more threads can be started.
NO_THREADS = """
import threading
import torch
start = threading.Thread.start
def fail(self):
    if self._target is torch.set_num_threads:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = fail
"""


def test_threads_that_cannot_be_limited_compute_all_the_same(folder: Path) -> None:
    process = start(folder, "song.wav", before=f"exec({NO_THREADS!r})")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "Traceback" not in error and "BrokenThreadPool" not in error


IMPATIENT = "from demucs_infer.cli import separate; separate._PIPE_SECONDS = 0.1"
"""Tells at once, rather than after seconds, that the command waits for a pipe."""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_command_tells_that_it_waits_for_a_pipe(folder: Path) -> None:
    pipe = folder / "pipe.wav"
    os.mkfifo(pipe)
    process = start(folder, "pipe.wav", "--progress", "none", before=IMPATIENT)
    try:
        assert process.stderr
        assert process.stderr.readline() == "waiting for a program that writes to pipe.wav\n"
        with pipe.open("wb") as file:
            file.write((folder / "song.wav").read_bytes())
        assert process.wait(60) == 0
        assert list((folder / "separated").glob("*/pipe/vocals.wav"))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_waiting_for_a_pipe_can_be_interrupted(folder: Path) -> None:
    pipe = folder / "never.wav"
    os.mkfifo(pipe)
    process = start(folder, "never.wav", before=IMPATIENT)
    assert process.stderr
    process.stderr.readline()
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in error
    assert time.monotonic() - begin < 10
