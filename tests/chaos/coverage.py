"""Mutate checkpoints and configurations as coverage leads: needs `pip install atheris`.

The reader is instrumented. A file that reaches a line or a comparison which none has reached before
is kept, and mutated further, by its structure or anywhere. Every file is checked as in
`tests.chaos.checkpoints`.
"""

import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["demucs_infer.checkpoints", "demucs_infer.custom", "demucs_infer.states"]
):
    from tests.chaos.checkpoints import Fuzzer

from tests.chaos.fork_runner import CASE_SECONDS, follow_child
from tests.chaos.report import Limits, Report

_MAX_BYTES = 1 << 18


class _Guided:
    """What atheris calls; the first byte of its files is the number of a seed."""

    def __init__(self, fuzzer: Fuzzer, top: Path, writer: int) -> None:
        self.fuzzer = fuzzer
        self.top = top
        self.writer = writer

    def run(self, data: bytes) -> None:
        """Load a file, and report the outcome."""
        if not data:
            return
        seed = self.fuzzer.seeds[data[0] % len(self.fuzzer.seeds)]
        outcome = self.fuzzer.load(seed, data[1:]).replace("\n", " ")[:1000]
        if outcome.startswith("!"):
            digest = hashlib.sha256(data).hexdigest()[:12]
            path = Path(tempfile.gettempdir(), f"chaos-finding-{digest}{seed.suffix}")
            path.write_bytes(data[1:])
            outcome += f" ({path})"
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        size = pages * os.sysconf("SC_PAGE_SIZE")
        os.write(self.writer, f"{outcome}\x1f{size}\n".encode(errors="replace"))

    def mutate(self, data: bytes, max_size: int, number: int) -> bytes:
        """Return a file mutated by its structure, or by libFuzzer."""
        rng = random.Random(number)
        if len(data) > 1 and rng.random() < 0.6:
            seed = self.fuzzer.seeds[data[0] % len(self.fuzzer.seeds)]
            try:
                return (data[:1] + self.fuzzer.mutate(seed.kind, data[1:], rng))[:max_size]
            except Exception:  # the structure is gone already
                pass
        return bytes(atheris.Mutate(data, max_size))


def run(limits: Limits) -> Report:
    """Load files until the limits are reached."""
    report = Report("checkpoints, guided by coverage", limits.seed)
    top = Path(tempfile.mkdtemp(prefix="chaos-coverage-"))
    (top / "models").mkdir()
    (top / "corpus").mkdir()
    try:
        fuzzer = Fuzzer(top / "models", limits)
        fuzzer.warm_up()
        for number, seed in enumerate(fuzzer.seeds):
            (top / "corpus" / str(number)).write_bytes(bytes([number]) + seed.data)
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            log = os.open(top / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            guided = _Guided(fuzzer, top, writer)
            words = [sys.argv[0], str(top / "corpus"), f"-max_len={_MAX_BYTES}", "-len_control=0"]
            words += [f"-seed={limits.seed + 1}", f"-max_total_time={round(limits.seconds)}"]
            words += [f"-timeout={round(CASE_SECONDS)}", "-rss_limit_mb=2048"]
            words += [f"-artifact_prefix={top}/", f"-runs={limits.count or -1}"]
            atheris.Setup(words, guided.run, custom_mutator=guided.mutate)
            atheris.Fuzz()  # ends the process
        os.close(writer)
        cases, peak = follow_child(report, process, reader, 0, 0, lambda n: f"case {n}")
        report.figures["cases"] = cases
        report.figures["peak_megabytes"] = round(peak / 2**20)
        log_text = (top / "log").read_text(errors="replace")
        states = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log_text)
        for name, values in zip(("counters", "features", "files kept"), zip(*states)):
            report.figures[name] = f"{values[0]} at first, {values[-1]} at the end"
        if not states:
            report.find("harness", log_text[-1000:])
    finally:
        shutil.rmtree(top)
    return report
