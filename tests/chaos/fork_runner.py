"""Run cases one after the other in a forked process that is replaced when it dies.

The process has limits of memory and of time a case, and reports each case when it has ended: so a
case that crashes the interpreter, takes too long or too much memory is known, and the run goes on
behind it.
"""

import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.report import Limits, Report

CASE_SECONDS = 10.0
CASE_BYTES = 2 * 2**30
_SEPARATOR = "\x1f"

RunCase = Callable[[int], str]
"""Runs the case of a number and returns its outcome; "!kind" and a detail for a finding."""


class CaseError(Exception):
    """Raised for an outcome that contradicts a promise."""


def run_cases(
    report: Report, limits: Limits, run_case: RunCase, describe: Callable[[int], str]
) -> None:
    """Run the cases from `limits.first` on, until the time is over or all are done."""
    deadline = time.monotonic() + limits.seconds
    number = limits.first
    stop = None if limits.count is None else limits.first + limits.count
    peak = 0
    while time.monotonic() < deadline and (stop is None or number < stop):
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            _run_child(run_case, number, stop, deadline, writer)
        os.close(writer)
        number, peak = follow_child(report, process, reader, number, peak, describe)
    report.figures["cases"] = number - limits.first
    report.figures["peak_megabytes"] = round(peak / 2**20)


def _run_child(
    run_case: RunCase, number: int, stop: int | None, deadline: float, writer: int
) -> None:
    """Run cases and write a line for each; never returns."""
    status = Path("/proc/self/statm").read_text().split()
    size = int(status[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + CASE_BYTES, size + CASE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        while time.monotonic() < deadline and (stop is None or number < stop):
            outcome = run_case(number).replace("\n", " ")[:1000]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(writer, f"{outcome}{_SEPARATOR}{peak}\n".encode(errors="replace"))
            number += 1
    except BaseException as error:
        os.write(writer, f"!harness {type(error).__name__}: {error}{_SEPARATOR}0\n".encode())
        os._exit(3)
    os._exit(0)


def follow_child(
    report: Report,
    process: int,
    reader: int,
    number: int,
    peak: int,
    describe: Callable[[int], str],
) -> tuple[int, int]:
    """Count the lines of a child until it ends; return the number of the next case."""
    rest = b""
    is_late = False
    while True:
        ready, _, _ = select.select([reader], [], [], CASE_SECONDS)
        if not ready:
            is_late = True
            os.kill(process, signal.SIGKILL)
        data = os.read(reader, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            outcome, _, size = line.decode().partition(_SEPARATOR)
            peak = max(peak, int(size))
            if outcome.startswith("!"):
                kind, _, detail = outcome[1:].partition(" ")
                report.find(f"{kind} {detail.partition(':')[0]}", f"{describe(number)}: {detail}")
            else:
                report.counts[outcome] += 1
            number += 1
    os.close(reader)
    _, status = os.waitpid(process, 0)
    if is_late:
        report.find("slow", f"{describe(number)}: more than {CASE_SECONDS:g} s")
        number += 1
    elif os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        report.find(f"crash {name}", f"{describe(number)}: killed by {name}")
        number += 1
    elif os.WEXITSTATUS(status):
        number += 1 if os.WEXITSTATUS(status) != 3 else 0
    return number, peak
