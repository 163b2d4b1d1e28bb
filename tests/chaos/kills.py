"""Kill, terminate and stop the command, a batch and a server at random moments; finish the work.

Afterwards every song has its stems, with the bytes of an undisturbed run, and nothing else is left.
A process that is stopped goes on after a second one has tried the same work.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from demucs_infer.cli.main import main
from tests.chaos.report import Limits, Report
from tests.chaos.scenarios import clean, fork, leftovers, prepare, results, wait
from tests.helpers.batch_runs import MODEL, model_flags
from tests.helpers.server_process import free_port

SECONDS = 25.0  # of each song
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)


class Killer:
    """Kills work in one folder."""

    def __init__(self, folder: Path, report: Report, rng: random.Random) -> None:
        self.folder = folder
        self.report = report
        self.rng = rng
        self.log = folder.parent / "log"
        flags = [*model_flags(folder / "repo"), "-q", "-o", str(folder / "out")]
        self.words = {
            "command": [str(folder / "in/0.wav"), str(folder / "in/1.wav"), *flags],
            "batch": ["batch", str(folder / "list.txt"), *flags],
        }
        self.expected: dict[str, dict[str, str]] = {}
        self.duration: dict[str, float] = {}
        for name in self.words:
            clean(folder)
            begin = time.monotonic()
            assert self.finish(name) == 0, self.log.read_text()
            self.duration[name] = time.monotonic() - begin
            self.expected[name] = results(folder)

    def start(self, name: str) -> int:
        """Start the work as a command of its own."""

        def work() -> int:
            sys.argv = ["demucs-infer", *self.words[name]]
            return int(main())

        return fork(work, self.log, self.folder / "tmp")

    def finish(self, name: str) -> int | None:
        """Run the work undisturbed."""
        return wait(self.start(name))

    def disturb(self, name: str, number: int) -> None:  # noqa: C901 (a list of checks)
        """Kill the work a few times, then finish it."""
        clean(self.folder)
        self.log.unlink(missing_ok=True)
        kills = self.rng.randrange(1, 6)
        place = f"case {number}: {name}"
        for _ in range(kills):
            kind = self.rng.choice(SIGNALS)
            place += f" {kind.name}"
            process = self.start(name)
            # Half of them early, in the same place, as if the track were the reason.
            share = self.rng.choice((0.3, 1.1))
            time.sleep(self.rng.random() * self.duration[name] * share)
            with suppress(ProcessLookupError):
                os.kill(process, kind)
            self.report.counts[f"{kind.name} of {name}"] += 1
            if kind == signal.SIGSTOP:
                second = self.start(name)
                time.sleep(self.rng.random() * self.duration[name])
                os.kill(process, signal.SIGCONT)
                if wait(second) is None:
                    self.report.find("hangs", f"{place}: the second process")
            code = wait(process)
            if code is None:
                self.report.find("hangs", place)
            elif code not in (0, 143, -signal.SIGKILL, -signal.SIGTERM):
                text = self.log.read_text()
                # The second process may have begun before the one that was stopped.
                is_locked = "another process" in text or "another run" in text
                if kind != signal.SIGSTOP or not is_locked:
                    self.report.find("exit code", f"{place}: {code} {text[-500:]}")
        code = self.finish(name)
        text = self.log.read_text()
        if code != 0:
            self.report.find("not finished", f"{place}: {code} {text[-500:]}")
        elif results(self.folder) != self.expected[name]:
            self.report.find("lost or other bytes", f"{place}: {sorted(results(self.folder))}")
        elif left := leftovers(self.folder):
            # A process that is killed cannot remove what it has in the folder of the system.
            left = [path for path in left if not path.startswith("tmp/")]
            if left:
                self.report.find("leftovers", f"{place}: {left}")
        if "Traceback" in text:
            self.report.find("traceback", f"{place}: {text[-900:]}")


class ServerKiller:
    """Kills servers of one folder while they have jobs."""

    def __init__(self, folder: Path, report: Report, rng: random.Random) -> None:
        self.folder = folder
        self.report = report
        self.rng = rng
        self.log = folder.parent / "server-log"
        self.songs = [(folder / f"in/{n}.wav").read_bytes() for n in range(2)]
        process, url = self.start()
        ids = [self.post(url, song) for song in self.songs]
        self.expected = [self.fetch(url, id) for id in ids]
        os.kill(process, signal.SIGTERM)
        wait(process)

    def start(self) -> tuple[int, str]:
        """Start a server, and return its process and address once it answers."""
        port = free_port()
        words = [
            "serve",
            "--port",
            str(port),
            "--repo",
            str(self.folder / "repo"),
            "--models",
            MODEL,
        ]
        words += ["--devices", "cpu", "--data-dir", str(self.folder / "data")]

        def work() -> int:
            sys.argv = ["demucs-infer", *words]
            return int(main())

        process, url = fork(work, self.log, self.folder / "tmp"), f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
                return process, url
            time.sleep(0.01)
        raise AssertionError(self.log.read_text()[-2000:])

    def post(self, url: str, song: bytes) -> str:
        """Begin a job and return its id."""
        with urllib.request.urlopen(f"{url}/v1/jobs", song, timeout=30) as answer:
            return str(json.load(answer)["id"])

    def fetch(self, url: str, id: str) -> list[bytes]:
        """Return the stems of a job when it has ended."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"{url}/v1/jobs/{id}", timeout=30) as answer:
                state: dict[str, Any] = json.load(answer)
            if state["status"] in ("done", "failed"):
                break
            time.sleep(0.02)
        if state["status"] != "done":
            raise AssertionError(f"job {state}")
        stems = []
        for name in ("drums", "bass", "other", "vocals"):
            with urllib.request.urlopen(f"{url}/v1/jobs/{id}/stems/{name}", timeout=30) as answer:
                stems.append(answer.read())
        return stems

    def disturb(self, number: int) -> None:
        """Kill a server with jobs, and get their stems from the next one."""
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        self.log.unlink(missing_ok=True)
        kind = self.rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
        place = f"case {number}: server {kind.name}"
        self.report.counts[f"{kind.name} of server"] += 1
        process, url = self.start()
        try:
            ids = [self.post(url, song) for song in self.songs]
            time.sleep(self.rng.random() * 1.0)
            os.kill(process, kind)
            if kind == signal.SIGSTOP:
                time.sleep(0.3)
                os.kill(process, signal.SIGCONT)
            else:
                if wait(process) is None:
                    self.report.find("hangs", place)
                process, url = self.start()
            stems = [self.fetch(url, id) for id in ids]
            if stems != self.expected:
                self.report.find("other bytes", place)
        except (AssertionError, OSError) as error:
            self.report.find("lost job", f"{place}: {error}")
        finally:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
            if wait(process) is None:
                self.report.find("hangs", f"{place}: at the end")
        if "Traceback" in (text := self.log.read_text()):
            self.report.find("traceback", f"{place}: {text[-900:]}")


def run(limits: Limits) -> Report:
    """Kill work until the limits are reached."""
    report = Report("kills", limits.seed)
    deadline = time.monotonic() + limits.seconds
    torch.set_num_threads(1)
    top = Path(tempfile.mkdtemp(prefix="chaos-kills-"))
    os.environ["DEMUCS_INFER_CACHE"] = str(top / "cache")
    folder = top / "work"
    folder.mkdir()
    try:
        prepare(folder, SECONDS)
        killer = Killer(folder, report, random.Random(limits.seed))
        server = ServerKiller(folder, report, random.Random(limits.seed))
        number = limits.first
        while time.monotonic() < deadline:
            kills = sum(count for name, count in report.counts.items() if name.startswith("SIG"))
            if limits.count is not None and kills >= limits.count:
                break
            name = ("command", "batch", "command", "server")[number % 4]
            killer.rng = server.rng = random.Random(f"{limits.seed} {number}")
            if name == "server":
                server.disturb(number)
            else:
                killer.disturb(name, number)
            number += 1
            report.figures["cases"] = number - limits.first
            report.figures["signals"] = kills
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return report
