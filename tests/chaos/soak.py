"""Work for a long time, and watch that memory, descriptors, threads and temporary files stay flat.

A server and the library share one process: songs that are separated, damaged and cancelled ones,
requests that fail, and `separate_to` in between. The figures are read and printed after each
minute. `--share 0.3` pauses between pieces of work, so that they take 30 % of a core at most.
"""

import gc
import io
import json
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch

from demucs_infer.api import Separator
from demucs_infer.errors import DemucsError
from demucs_infer.system.malloc import limit_heaps
from tests.chaos.report import Limits, Report
from tests.chaos.scenarios import prepare
from tests.helpers.batch_runs import MODEL
from tests.helpers.server_process import client, song

WARM_UP_SHARE = 0.25
GROWTH_MEGABYTES = 40


def _measure(temp: Path) -> dict[str, int]:
    """Return megabytes, descriptors, threads and temporary files of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "megabytes": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": threading.active_count(),
        "temporary files": sum(1 for _ in temp.rglob("*")),
    }


class Worker:
    """Does one piece of work after the other."""

    def __init__(self, folder: Path, web: object, report: Report, seed: int) -> None:
        self.folder = folder
        self.web = web
        self.report = report
        self.rng = random.Random(seed)
        self.separator = Separator(MODEL, folder / "repo", device="cpu")

    def step(self) -> None:
        """Do a random piece of work."""
        kind = self.rng.choice(("request", "request", "damaged", "cancel", "library", "stream"))
        self.report.counts[kind] += 1
        getattr(self, f"_{kind}")(song(0.5 + self.rng.random(), self.rng.randrange(50)))

    def _request(self, audio: bytes) -> None:
        query = self.rng.choice(("", "?format=flac", "?format=mp3", "?two_stems=vocals"))
        answer = self.web.post(f"/v1/separate{query}", content=audio)  # type: ignore[attr-defined]
        if answer.status_code != 200:
            self.report.find("request", f"{answer.status_code} {answer.text[:300]}")

    def _damaged(self, audio: bytes) -> None:
        at = self.rng.randrange(60)
        broken = audio[:at] + self.rng.randbytes(40) + audio[at + 40 :]
        answer = self.web.post("/v1/separate", content=broken)  # type: ignore[attr-defined]
        if answer.status_code not in (200, 400, 413, 415, 422):
            self.report.find("damaged", f"{answer.status_code} {answer.text[:300]}")

    def _cancel(self, audio: bytes) -> None:
        answer = self.web.post("/v1/jobs?shifts=5", content=audio)  # type: ignore[attr-defined]
        if answer.status_code < 300:
            self.web.delete(f"/v1/jobs/{answer.json()['id']}")  # type: ignore[attr-defined]

    def _library(self, audio: bytes) -> None:
        out = self.folder / "out"
        try:
            self.separator.separate_to(io.BytesIO(audio), out, self.rng.choice(("wav", "flac")))
        except DemucsError as error:
            self.report.find("library", str(error))
        shutil.rmtree(out, ignore_errors=True)

    def _stream(self, audio: bytes) -> None:
        for _ in self.separator.stream(audio):
            if self.rng.random() < 0.3:
                break


def run(limits: Limits) -> Report:
    """Work until the time is over."""
    report = Report("soak", limits.seed)
    top = Path(tempfile.mkdtemp(prefix="chaos-soak-"))
    os.environ["DEMUCS_INFER_CACHE"] = str(top / "cache")
    torch.set_num_threads(1)
    limit_heaps()  # as the command does
    folder = top / "work"
    folder.mkdir()
    prepare(folder)
    tempfile.tempdir = str(folder / "tmp")
    begin, begin_cpu = time.monotonic(), time.process_time()
    rows: list[dict[str, float]] = []
    interval = max(min(60.0, limits.seconds / 8), 0.5)
    settings = {"models": (MODEL,), "max_store_bytes": 20_000_000, "keep_seconds": 60.0}
    try:
        with client(folder / "repo", folder / "data", **settings) as web:
            worker = Worker(folder, web, report, limits.seed)
            steps = 0
            while (now := time.monotonic() - begin) < limits.seconds:
                if now >= len(rows) * interval:
                    rows.append({"seconds": round(now), **_measure(folder / "tmp")})
                    print(json.dumps({**rows[-1], "steps": steps}), flush=True)
                worker.step()
                pause = (time.process_time() - begin_cpu) / limits.share
                time.sleep(max(0.0, min(pause - (time.monotonic() - begin), 5.0)))
                steps += 1
            rows.append({"seconds": round(now), **_measure(folder / "tmp")})
            report.figures["cases"] = steps
    finally:
        tempfile.tempdir = None
        shutil.rmtree(top, ignore_errors=True)
    report.figures["over time"] = rows
    warm = rows[max(int(len(rows) * WARM_UP_SHARE), 1) :]
    for name, allowed in (("megabytes", GROWTH_MEGABYTES), ("descriptors", 8), ("threads", 6)):
        growth = warm[-1][name] - warm[0][name]
        report.figures[f"growth of {name}"] = growth
        if growth > allowed:
            report.find("growth", f"{name}: {[row[name] for row in rows]}")
    if warm[-1]["temporary files"] > 4:
        report.find("growth", f"temporary files: {[row['temporary files'] for row in rows]}")
    return report
