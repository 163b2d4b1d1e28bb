"""Fail the n-th system call of each kind, for every n in turn, and repeat the work undisturbed.

Afterwards there is no incomplete file under a final name; the work has succeeded, or said in one
line what failed, without a traceback; and the next run completes it, with the same bytes. The calls
are those below the folder of the work: input, model, temporary files and output.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.report import Limits, Report
from tests.chaos.scenarios import (
    SCENARIOS,
    Scenario,
    clean,
    fork,
    leftovers,
    prepare,
    results,
    wait,
)
from tests.chaos.shim import KINDS, Shim, restart_with_shim

ERRORS = ("ENOSPC", "EIO", "EACCES", "EMFILE", "EINTR")
_NO_WORDS = ("Traceback", "please report", "Exception in", "Exception ignored")


class Tester:
    """Runs a scenario with one failing call after the other."""

    def __init__(self, folder: Path, scenario: Scenario, shim: Shim, report: Report) -> None:
        self.folder = folder
        self.scenario = scenario
        self.shim = shim
        self.report = report
        self.log = folder.parent / "log"
        self.counts = self._count()
        self.expected = results(folder)
        clean(folder)

    def _work(self, kind: str | None = None, at: int = 0, error: int = 0) -> int | None:
        self.log.unlink(missing_ok=True)

        def run() -> int:
            return self.scenario.run(
                self.folder,
                lambda: self.shim.arm(self.folder, kind, at, error),
                lambda: self.disarm(),
            )

        return wait(fork(run, self.log, self.folder / "tmp"))

    def disarm(self) -> None:
        """Disarm, and write down the counts."""
        (self.folder.parent / "counts").write_text(json.dumps(self.shim.disarm()))

    def _count(self) -> dict[str, int]:
        clean(self.folder)
        code = self._work()
        if code != 0:
            raise AssertionError(f"{self.scenario.name} failed undisturbed: {self.log.read_text()}")
        counts: dict[str, int] = json.loads((self.folder.parent / "counts").read_text())
        return counts

    def cases(self) -> Iterator[tuple[str, int, str]]:
        """Yield kinds, numbers and errors, so that all kinds of calls come early."""
        for kind in KINDS:
            for at in range(1, self.counts[kind] + 1):
                for name in ERRORS:
                    yield kind, at, name

    def test(self, kind: str, at: int, name: str) -> None:  # noqa: C901 (a list of checks)
        """Run one case."""
        clean(self.folder)
        place = f"{self.scenario.name}: {name} at {kind} {at}"
        code = self._work(kind, at, getattr(errno, name))
        text = self.log.read_text(errors="replace")
        find = self.report.find
        if code is None:
            find("hangs", f"{place}: {text[-300:]}")
        elif code < 0 or code == 70:
            find("crash", f"{place}: {code} {text[-900:]}")
        elif any(word in text for word in _NO_WORDS):
            find("traceback", f"{place}: {text[-900:]}")
        elif code and not text.strip():
            find("silent", place)
        try:
            found = results(self.folder)
        except (ValueError, KeyError) as error:
            found = {}
            find("invalid file", f"{place}: {error}")
        wrong = [
            path
            for path in found
            if "results" not in path and found[path] != self.expected.get(path)
        ]
        if wrong:
            find("partial file", f"{place}: {wrong}")
        if code == 0 and found != self.expected:
            find("lost result", f"{place}: only {sorted(found)}, {text[-300:]}")
        self.report.counts["succeeded" if code == 0 else "failed, clearly"] += 1
        again = self._work()
        if again != 0:
            find("not repeatable", f"{place}: {again} {self.log.read_text()[-600:]}")
        elif results(self.folder) != self.expected:
            find("other bytes", f"{place}: {sorted(results(self.folder))}")
        elif left := leftovers(self.folder):
            # The removal of a temporary folder may be what fails; it lies in nobody's way.
            if kind in ("open", "close", "unlink") and all(
                "demucs-infer-" in path for path in left
            ):
                self.report.counts["temporary folders that could not be removed"] += 1
            else:
                find("leftovers", f"{place}: {left}")


def run(limits: Limits, *, names: tuple[str, ...] = tuple(SCENARIOS)) -> Report:
    """Fail calls until the limits are reached; a larger step than 1 tries some of them."""
    restart_with_shim()
    shim = Shim()
    report = Report("faults", limits.seed)
    deadline = time.monotonic() + limits.seconds
    chosen = os.environ.get("CHAOS_SCENARIOS", ",".join(names)).split(",")
    done = 0
    for name in chosen:
        top = Path(tempfile.mkdtemp(prefix="chaos-faults-"))
        folder = top / "work"
        folder.mkdir()
        os.environ["DEMUCS_INFER_CACHE"] = str(top / "cache")
        try:
            prepare(folder)
            tester = Tester(folder, SCENARIOS[name], shim, report)
            report.figures[f"calls of {name}"] = tester.counts
            cases = [*tester.cases()]
            step = 1 if limits.count is None else max(1, len(cases) * len(chosen) // limits.count)
            selected = cases[limits.first :: step] if limits.first < len(cases) else []
            tried = 0
            for kind, at, error in selected:
                if time.monotonic() > deadline:
                    break
                tester.test(kind, at, error)
                tried += 1
            report.figures[f"cases of {name}"] = f"{tried} of {len(cases)}, from {limits.first}"
            done += tried
        finally:
            shutil.rmtree(top, ignore_errors=True)
    report.figures["cases"] = done
    shim.remove()
    return report
