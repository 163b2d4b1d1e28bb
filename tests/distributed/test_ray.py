"""Workers on Ray make the same stems, survive crashes, and leave no track blamed for a shutdown."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from demucs_infer.cli.main import main
from demucs_infer.distributed.manifest import ResultRow
from tests.helpers.batch_runs import (
    batch_words,
    model_flags,
    read_table,
    stem_digests,
    write_list,
    write_mixed_manifest,
)
from tests.helpers.cli_process import RATE, environment, save, write_song
from tests.helpers.oracles import require_module

pytestmark = pytest.mark.slow

COMMAND = [
    sys.executable,
    "-c",
    "import sys, tests.helpers.crashing_worker; sys.exit(tests.helpers.crashing_worker.main())",
]


@pytest.fixture(autouse=True)
def ray_is_installed() -> None:
    require_module("ray.data")


def write_square_wave(path: Path) -> None:
    """Write what crashes the workers of `tests.helpers.crashing_worker`."""
    wave = torch.ones(2, 2 * RATE)
    wave[:, torch.arange(2 * RATE) % 100 < 50] = -1
    path.parent.mkdir(exist_ok=True)
    save(path, 0.25 * wave)


class RayRun:
    """The batch command with two workers on Ray, whose files are in `log`."""

    def __init__(
        self, manifest: Path, repo: Path, out: Path, log: Path, rows_per_task: int, **env: str
    ) -> None:
        log.mkdir()
        self.log = log
        words = ["batch", str(manifest), *model_flags(repo), "-o", str(out), "--engine", "ray"]
        words += ["--workers", "2", "--rows-per-task", str(rows_per_task), "--progress", "json"]
        self.process = subprocess.Popen(
            [*COMMAND, *words],
            env=environment() | {"CRASH_LOG": str(log)} | env,
            stderr=subprocess.PIPE,
        )

    def results(self, kill_after: int | None = None) -> list[ResultRow]:
        """Return all results; after some of them, kill a worker."""
        results: list[ResultRow] = []
        with self.process:
            assert self.process.stderr
            for line in self.process.stderr:
                if not line.startswith(b"{"):
                    continue
                results.append(json.loads(line))
                if len(results) == kill_after:
                    pids = [file.name for file in self.log.iterdir() if file.name.isdigit()]
                    alive = [int(pid) for pid in pids if Path("/proc", pid).exists()]
                    os.kill(alive[0], signal.SIGKILL)
            self.process.wait(timeout=60)
        return results

    def count_network_calls(self) -> int:
        return sum(file.stat().st_size for file in self.log.iterdir())


def test_track_that_is_listed_again_is_separated_once(repo: Path, tmp_path: Path) -> None:
    """Two workers get it at the same time: one waits in the network until the other has it."""
    write_song(tmp_path / "song.wav", 3)
    manifest = write_list(tmp_path, *["song.wav"] * 4)
    run = RayRun(manifest, repo, tmp_path / "out", tmp_path / "log", 1, CRASH_MEET="2")
    results = run.results()
    assert run.process.returncode == 0
    assert Counter(row["status"] for row in results) == {"done": 1, "skipped": 3}
    assert len(list(run.log.glob("*.given"))) == 2
    assert len({json.dumps(row["stems"]) for row in results}) == 1


def test_shutdown_is_not_counted_as_a_crash(repo: Path, tmp_path: Path) -> None:
    """The driver is terminated twice while both workers are in the same tracks."""
    names = [f"{n}.wav" for n in range(8)]  # so many that the second worker gets some of them
    for n, name in enumerate(names):
        write_song(tmp_path / name, 1, seed=n)
    manifest, out = write_list(tmp_path, *names), tmp_path / "out"
    for n in range(2):
        run = RayRun(
            manifest, repo, out, tmp_path / f"log{n}", 1, CRASH_MEET="2", CRASH_SLEEP="3600"
        )
        with run.process:
            while sum(file.stat().st_size > 0 for file in run.log.iterdir()) < 2:
                assert run.process.poll() is None
                time.sleep(0.05)
            assert len(list(out.rglob("attempts"))) == 2
            run.process.send_signal(signal.SIGTERM)
            _, error = run.process.communicate(timeout=60)
        assert run.process.returncode == 143 and b"the same command continues" in error
    assert main(batch_words(manifest, repo, out)) == 0


@pytest.mark.usefixtures("one_thread")
def test_run_survives_crashes(repo: Path, tmp_path: Path) -> None:
    """Of 60 files one is corrupt and one crashes its worker; another worker is killed.

    Then a second run, locally and on Ray, does nothing; and a local one makes the same stems.
    """
    write_square_wave(tmp_path / "in/crashing.wav")
    manifest, out = write_mixed_manifest(tmp_path, 59), tmp_path / "ray"

    run = RayRun(manifest, repo, out, tmp_path / "log", rows_per_task=6)
    results = run.results(kill_after=12)
    assert run.process.returncode == 1
    failures = {
        row["track"]: (row["status"], row["fault"])
        for row in results
        if row["status"] not in ("done", "skipped")
    }
    assert failures == {
        "in/corrupt.wav": ("failed", "input"),
        "in/crashing.wav": ("quarantined", "other"),
    }
    assert len({row["track"] for row in results}) == len(results) == 60
    assert read_table(out / "results.jsonl") == results
    # Two crashes by the square wave and one by our signal, each followed by another worker.
    assert len(list(run.log.iterdir())) >= 2 + 3
    assert run.count_network_calls()
    stems = stem_digests(out)
    assert len(stems) == 58 * 4

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")}
    assert main(batch_words(manifest, repo, out)) == 1
    statuses = Counter(row["status"] for row in read_table(out / "results.jsonl"))
    assert statuses == {"skipped": 58, "failed": 1, "quarantined": 1}

    again = RayRun(manifest, repo, out, tmp_path / "again", rows_per_task=1)
    assert Counter(row["status"] for row in again.results()) == statuses
    assert again.process.returncode == 1
    assert list(again.log.iterdir()) and not again.count_network_calls()
    assert times == {path: path.stat().st_mtime_ns for path in times}, "no stem was written again"

    (tmp_path / "in/crashing.wav").unlink()
    assert main(batch_words(manifest, repo, tmp_path / "local")) == 1
    assert stem_digests(tmp_path / "local") == stems


def run_driver(function: str) -> list[bytes]:
    """Return the words that a function of `ray_memory_driver` prints in a process of its own."""
    code = f"from tests.helpers import ray_memory_driver; ray_memory_driver.{function}()"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, check=True
    ).stdout.split()


def test_workers_get_gpus() -> None:
    """The worker does not compute on its GPU: Ray is only told of one."""
    assert run_driver("print_assigned_gpus") == [b"0", b"0"]


def test_memory_of_the_driver_does_not_grow_with_the_manifest() -> None:
    count, grown = map(int, run_driver("print_memory_growth"))
    assert count == 100_000
    # The last 90 000 results are more than 90 MB as Python objects.
    assert grown < 25e6
