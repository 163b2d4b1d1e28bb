"""Test that Ctrl-C waits neither for a long call of a network nor for a huge file."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from demucs_infer.api import Separator
from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.runner import BatchRunner
from tests.helpers.cli_process import RATE, environment, tree, write_song
from tests.helpers.networks import ScaleModel
from tests.helpers.requests import make_request

# The sixth window takes an hour, in a call that no signal interrupts: its thread blocks signals, so
# another thread gets them, as happens during a long kernel.
NETWORK = """
import ctypes, os, signal
from dataclasses import dataclass
import torch

@dataclass
class SlowParams:
    chunk_size: int
    output_stem_names: tuple[str, ...]

class Slow(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.windows = 0

    def forward(self, mix):
        self.windows += 1
        if self.windows == 6 and "SLOW" in os.environ:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            print("asleep", flush=True)
            ctypes.CDLL(None).sleep(3600)
        return {"low": mix * self.gain * 0.25, "high": mix * 0.75}
"""
CONFIG = {
    "model_type": "slow",
    "audio": {"sample_rate": RATE},
    "model": {"chunk_size": RATE, "output_stem_names": ["low", "high"]},
}


def start_process(folder: Path, *words: str, **more: str) -> "subprocess.Popen[bytes]":
    flags = "--config slow.json --checkpoint slow.pt --module slow --class Slow -d cpu -q"
    env = environment()
    env = {**env, "PYTHONPATH": f"{env['PYTHONPATH']}{os.pathsep}{folder}", **more}
    return subprocess.Popen(
        [sys.executable, "-m", "demucs_infer", *flags.split(), *words],
        cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background jobs ignore the interrupt, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="interrupts are sent as POSIX signals here")
@pytest.mark.parametrize("jobs", ["0", "1"])  # in the main thread, and in one that is joined
def test_interrupt_does_not_wait_for_running_window(jobs: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(NETWORK)
    (tmp_path / "slow.json").write_text(json.dumps(CONFIG))
    torch.save({"gain": torch.ones(1)}, tmp_path / "slow.pt")
    write_song(tmp_path / "song.wav", 12)

    process = start_process(tmp_path, "song.wav", "-o", "a", "-j", jobs, SLOW="1")
    assert process.stdout
    assert process.stdout.readline() == b"asleep\n"
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)  # a crowded machine's minutes, not the hour
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.count(b"interrupted") == 1 and b"Traceback" not in errors
    assert tree(tmp_path / "a")
    assert all(".partial" in name for name in tree(tmp_path / "a"))

    # Resumed, and from the beginning.
    processes = [start_process(tmp_path, "song.wav", "-o", out) for out in ("a", "b")]
    assert [process.communicate(timeout=120)[1] for process in processes] == [b"", b""]
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    stems = [name for name in tree(tmp_path / "a") if name.endswith(".wav")]
    assert len(stems) == 2
    for name in stems:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    manifest = json.loads(next((tmp_path / "a").rglob("stems.json")).read_text())
    assert manifest["resumed_seconds"] > 0


def test_closing_run_does_not_wait_for_digest_of_huge_file(tmp_path: Path) -> None:
    huge = tmp_path / "huge.wav"
    with huge.open("wb") as file:
        file.truncate(1 << 42)  # sparse: an hour of reading, and no disk space
    small = write_song(tmp_path / "small.wav", 1)
    batch = BatchRunner(
        Separator.from_model(ScaleModel(samplerate=RATE)),
        ModelSpec(name="scale"),
        make_request(),
    )
    jobs = [
        TrackJob(
            source=path,
            target=OutputPaths(folder=tmp_path / "out", track=path.name),
            track=path.name,
        )
        for path in (small, huge)
    ]
    run = batch.run(jobs)
    next(run)  # the small track is separated while the huge one is read
    closing = threading.Thread(target=run.close, daemon=True)
    closing.start()
    closing.join(60)
    is_closed = not closing.is_alive()
    os.truncate(huge, 0)  # so that a reader reaches the end
    assert is_closed
