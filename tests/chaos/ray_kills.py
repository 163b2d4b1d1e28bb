"""Kill random workers of a batch on Ray again and again, while the work must finish.

Ray replaces a worker that has died; what it had separated is continued. Afterwards every song has
its stems, with the bytes of an undisturbed run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.chaos.report import Limits, Report
from tests.chaos.scenarios import clean, leftovers, prepare, results
from tests.helpers.batch_runs import model_flags, write_list
from tests.helpers.cli_process import ROOT, environment, write_song

SONGS = 12
SECONDS = 40.0  # of each song
_WORKER = b"ray::MapWorker"  # Ray names processes by what they run


def _find_workers(driver: int) -> list[int]:
    """Return the processes below the driver that separate."""
    parents: dict[int, int] = {}
    workers = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                parents[int(path.name)] = int(
                    (path / "stat").read_text().rpartition(")")[2].split()[1]
                )
                if (path / "cmdline").read_bytes().startswith(_WORKER):
                    workers.append(int(path.name))

    def is_below(process: int) -> bool:
        while process := parents.get(process, 0):
            if process == driver:
                return True
        return False

    return [process for process in sorted(workers) if is_below(process)]


class RayKiller:
    """Runs a batch with two workers on Ray."""

    def __init__(self, folder: Path, report: Report, rng: random.Random) -> None:
        self.folder = folder
        self.report = report
        self.rng = rng
        self.log = folder.parent / "log"
        for seed in range(SONGS):
            write_song(folder / f"in/{seed}.wav", SECONDS + seed, seed=seed)
        write_list(folder, *(f"in/{seed}.wav" for seed in range(SONGS)))
        self.words = ["batch", str(folder / "list.txt"), *model_flags(folder / "repo")]
        self.words += ["-o", str(folder / "out"), "--progress", "json"]

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        """Start the command with its output in the log."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "demucs_infer", *self.words, *words],
                cwd=ROOT,
                env=environment() | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder / "tmp")},
                stdout=log,
                stderr=log,
            )

    def finish(self) -> int:
        """Run the work undisturbed on this machine, and return the exit code."""
        return self.start().wait()

    def disturb(self, number: int, kills: int, deadline: float) -> int:
        """Kill workers of one run until it has ended; return how many."""
        process = self.start("--engine", "ray", "--workers", "2", "--rows-per-task", "1")
        done = 0
        while process.poll() is None:
            time.sleep(self.rng.random() * 6.0)
            workers = _find_workers(process.pid)
            if workers and done < kills:
                with suppress(ProcessLookupError):
                    os.kill(self.rng.choice(workers), signal.SIGKILL)
                    done += 1
            if time.monotonic() > deadline + 90:
                self.report.find("hangs", f"run {number}: {self.log.read_text()[-600:]}")
                process.terminate()
                process.wait()
        text = self.log.read_text()
        rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"track"')]
        for row in rows:
            self.report.counts[f"tracks {row['status']}"] += 1
        if process.returncode and all(row["status"] != "quarantined" for row in rows):
            self.report.find("exit code", f"run {number}: {process.returncode} {text[-600:]}")
        if "Traceback" in text:
            self.report.find("traceback", f"run {number}: {text[-900:]}")
        return done


def run(limits: Limits) -> Report:
    """Kill workers until the limits are reached."""
    report = Report("kills on Ray", limits.seed)
    deadline = time.monotonic() + limits.seconds
    top = Path(tempfile.mkdtemp(prefix="chaos-ray-"))
    folder = top / "work"
    folder.mkdir()
    try:
        prepare(folder)
        killer = RayKiller(folder, report, random.Random(limits.seed))
        assert killer.finish() == 0, killer.log.read_text()
        expected = results(folder)
        kills, number = 0, 0
        while time.monotonic() < deadline and kills < (limits.count or 1 << 30):
            clean(folder)
            kills += killer.disturb(number, (limits.count or 1 << 30) - kills, deadline)
            code = killer.finish()
            if code:
                report.find("not finished", f"run {number}: {code} {killer.log.read_text()[-600:]}")
            elif results(folder) != expected:
                report.find("lost or other bytes", f"run {number}: {sorted(results(folder))}")
            elif left := [path for path in leftovers(folder) if not path.startswith("tmp/")]:
                report.find("leftovers", f"run {number}: {left}")
            number += 1
        report.figures |= {"runs": number, "SIGKILL of workers": kills}
        report.figures["tracks"] = number * SONGS
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return report
