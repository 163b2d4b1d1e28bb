"""Collect results as they come, within a limit of time, and keep them if something goes wrong."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Result:
    """One figure, or one check."""

    part: str
    name: str
    value: float | None = None
    unit: str = ""
    passed: bool | None = None
    """Whether the figure is as good as it must be; None: nothing is required of it."""
    note: str = ""

    def markdown(self) -> str:
        """Format as a row of the table."""
        value = "" if self.value is None else f"{self.value:.4g} {self.unit}"
        verdict = {True: "ok", False: "**FAILED**", None: ""}[self.passed]
        return f"| {self.part} | {self.name} | {value} | {verdict} | {self.note} |"


HEADER = "| part | what | value | | |\n|---|---|---|---|---|"


@dataclass
class Report:
    """The results so far, which are written to a folder after each of them."""

    folder: Path
    machine: dict[str, str]
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Print a result and write all of them."""
        self.results.append(result)
        print(result.markdown(), flush=True)
        content = {"machine": self.machine, "results": [asdict(each) for each in self.results]}
        (self.folder / "gpu.json").write_text(json.dumps(content, indent=1))
        rows = "\n".join(each.markdown() for each in self.results)
        machine = ", ".join(f"{name} {text}" for name, text in self.machine.items())
        (self.folder / "gpu.md").write_text(f"{machine}\n\n{HEADER}\n{rows}\n")

    @property
    def failures(self) -> list[Result]:
        """Checks that did not pass."""
        return [each for each in self.results if each.passed is False]


class Part:
    """A part of the run with a limit of time: what does not begin in time is skipped."""

    def __init__(self, report: Report, name: str, seconds: float) -> None:
        self._report, self._name = report, name
        self._end = time.monotonic() + seconds

    def add(
        self,
        name: str,
        value: float | None,
        unit: str = "",
        *,
        least: float | None = None,
        most: float | None = None,
        note: str = "",
    ) -> None:
        """Report a figure, and whether it is at least `least` or at most `most`."""
        passed: bool | None = None
        if value is not None and (least is not None or most is not None):
            passed = (least is None or value >= least) and (most is None or value <= most)
            bound = f">= {least:g}" if most is None else f"<= {most:g}"
            note = f"must be {bound} {unit}" + (f"; {note}" if note else "")
        self._report.add(
            Result(part=self._name, name=name, value=value, unit=unit, passed=passed, note=note)
        )

    def run(self, name: str, step: Callable[[], None]) -> None:
        """Run a step; report an error as a failure, and go on with the next one."""
        if time.monotonic() > self._end:
            self.add(name, None, note="skipped: the time of this part is over")
            return
        started = time.monotonic()
        try:
            step()
        except Exception as error:  # noqa: BLE001 (one step must not cost the others)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._report.add(Result(part=self._name, name=name, passed=False, note=text))
            with (self._report.folder / "errors.txt").open("a") as file:
                file.write(f"{self._name}, {name}\n{traceback.format_exc()}\n")
        print(f"  ({name}: {time.monotonic() - started:.1f} s)", flush=True)


@contextmanager
def write_to(folder: Path, machine: dict[str, str]) -> Iterator[Report]:
    """Open a report in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "gpu.md", "errors.txt", "profile.txt"):
        (folder / name).unlink(missing_ok=True)
    print(HEADER)
    yield Report(folder, machine)
