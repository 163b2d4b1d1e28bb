"""Run two sides in turn, A B A B ..., so that ratios hold on a machine whose speed drifts."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: the runs of both sides, their medians, and the spread of the ratio."""

    case: str
    audio_seconds: float
    ours: list[Figures]
    theirs: list[Figures]
    error_db: float | None

    def median(self, side: str, figure: str) -> float:
        """Return the median of a figure of one side."""
        return statistics.median(run[figure] for run in getattr(self, side))

    def ratios(self) -> list[float]:
        """Return the ratio of times of every pair, sorted."""
        return sorted(b["seconds"] / a["seconds"] for a, b in zip(self.ours, self.theirs))

    def peaks(self, side: str) -> str:
        """Format the median and the worst peak: one run that exceeds memory is one too many."""
        worst = max(run["peak"] for run in getattr(self, side))
        return f"{self.median(side, 'peak'):.0f} ({worst:.0f})"

    def markdown(self) -> str:
        """Format the comparison as a row of the table."""
        ratios = self.ratios()
        times = [self.audio_seconds / self.median(side, "seconds") for side in ("ours", "theirs")]
        error = "" if self.error_db is None else f"{self.error_db:.0f} dB"
        cells = [
            self.case,
            f"{times[0]:.2f} ×",
            f"{times[1]:.2f} ×",
            f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            f"{self.median('ours', 'cpu'):.1f} / {self.median('theirs', 'cpu'):.1f}",
            f"{self.peaks('ours')} / {self.peaks('theirs')}",
            error,
            f"{100 * self.median('ours', 'outside'):.1f} %" if "outside" in self.ours[0] else "",
        ]
        return f"| {' | '.join(cells)} |"


COLUMNS = [
    "case",
    "ours, × real time",
    "theirs",
    "ratio, median (spread)",
    "CPU s",
    "peak MiB (worst)",
    "error",
    "engine",
]
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def environment(side: str) -> dict[str, str]:
    """Return the environment of a side: only our own sides may import this checkout."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return env | ({"PYTHONPATH": str(ROOT)} if side in ("ours", "one", "two") else {})


class Worker:
    """A process of one side that has loaded its model and waits for orders."""

    def __init__(self, side: str, python: str, order: dict[str, Any]) -> None:
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(script), side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(side),
        )
        self.ask(order | {"do": "load"})

    def ask(self, order: dict[str, Any]) -> Figures:
        """Send an order and wait for its figures."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the benchmark worker exited: {self._process.args!r}")
        figures: Figures = json.loads(line)
        return figures

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def decibels(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the level of the reference above that of the difference."""
    difference = (reference - other).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / difference.clamp_min(1e-30)))


def compare(
    case: str, order: dict[str, Any], *, python: str, side: str, pairs: int, work: Path
) -> Row:
    """Take `pairs` interleaved runs of ours and `side`, after one warm-up each."""
    workers = {"ours": Worker("ours", sys.executable, order), side: Worker(side, python, order)}
    answers = {name: work / f"{name}.pt" for name in workers}
    for name, worker in workers.items():
        worker.ask({"do": "run", "keep": str(answers[name])})
    runs: dict[str, list[Figures]] = {name: [] for name in workers}
    for _ in range(pairs):
        for name, worker in workers.items():
            time.sleep(0.3)  # until the other side's idle threads stop spinning
            runs[name].append(worker.ask({"do": "run"}))
    for worker in workers.values():
        worker.close()
    loaded = [torch.load(answers[name], weights_only=True) for name in (side, "ours")]
    error = decibels(*loaded)
    return Row(case, order["seconds"], runs["ours"], runs[side], error)


def time_commands(commands: Sequence[Sequence[str]], side: str, cwd: Path) -> Figures:
    """Run processes side by side and add up what the operating system accounts for them."""
    script = str(Path(__file__).with_name("account.py"))
    env = environment(side)
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", script, *command],
            env=env,
            cwd=cwd,
            stdout=pipe,
            stderr=pipe,
        )
        for command in commands
    ]
    figures = {"seconds": 0.0, "cpu": 0.0, "peak": 0.0}
    for process in processes:
        account, words = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{process.args!r} failed: {words.decode()[-2000:]}")
        took: Figures = json.loads(account)
        figures["seconds"] = max(figures["seconds"], took["seconds"])
        figures["cpu"] += took["cpu"]
        figures["peak"] += took["peak"]
    return figures


def compare_commands(
    case: str,
    seconds: float,
    commands: dict[str, Sequence[Sequence[str]]],
    *,
    pairs: int,
    work: Path,
) -> Row:
    """Run the commands of two sides in turn."""
    runs = time_sides(commands, pairs=pairs, work=work)
    (row,) = rows_of(case, seconds, runs).values()
    return row


def time_sides(
    commands: dict[str, Sequence[Sequence[str]]], *, pairs: int, work: Path
) -> dict[str, list[Figures]]:
    """Run whole commands in turn; the first round warms the page cache and is not counted."""
    runs: dict[str, list[Figures]] = {side: [] for side in commands}
    for _ in range(pairs + 1):
        for side, together in commands.items():
            runs[side].append(time_commands(together, side, work))
    return {side: figures[1:] for side, figures in runs.items()}


def rows_of(case: str, seconds: float, runs: dict[str, list[Figures]]) -> dict[str, Row]:
    """Return the comparison of the first side with each of the others, by their names."""
    ours, *others = runs
    return {name: Row(case, seconds, runs[ours], runs[name], None) for name in others}
