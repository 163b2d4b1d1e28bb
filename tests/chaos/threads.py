"""Use one Separator from many threads, change and close it in between, fork, spawn, and await it.

Every result is that of a single thread or an error of the package's tree; nothing hangs.
"""

import asyncio
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demucs_infer.api import Separator
from demucs_infer.errors import DemucsError
from tests.chaos.report import Limits, Report
from tests.chaos.scenarios import prepare
from tests.helpers.audio_signals import make_noise
from tests.helpers.batch_runs import MODEL
from tests.helpers.cli_process import RATE

THREADS = 16


def separate(repo: str, seed: int) -> Tensor:
    """Return the vocals of a song, in this process or a new one."""
    torch.set_num_threads(1)
    with Separator(MODEL, Path(repo), device="cpu") as separator:
        return separator.run(make_noise(2, RATE, seed), sample_rate=RATE)["vocals"].clone()


def _use_from_threads(repo: str, report: Report, rng: random.Random) -> None:
    """Run, stream and abandon tracks in all threads; some change settings."""
    expected = {seed: separate(repo, seed) for seed in range(4)}
    with Separator(MODEL, Path(repo), device="cpu") as separator:

        def work(number: int) -> None:
            seed = number % 4
            audio = make_noise(2, RATE, seed)
            if number % 5 == 4:
                for _ in separator.stream(audio, sample_rate=RATE):
                    break  # closed by the collector, perhaps in another thread
                return
            if number % 7 == 6:
                separator.update_parameter(overlap=0.25)  # the default: nothing changes
            stems = separator.run(audio, sample_rate=RATE)
            if not torch.equal(stems["vocals"], expected[seed]):
                report.find("other numbers", f"thread {number}, seed {seed}")

        _gather(report, work, rng)
    report.counts["used from threads"] += THREADS


def _close_from_threads(repo: str, report: Report, rng: random.Random) -> None:
    """Close the separator while others use it."""
    separator = Separator(MODEL, Path(repo), device="cpu")

    def work(number: int) -> None:
        time.sleep(rng.random() * 0.05)
        if number == THREADS // 2:
            separator.close()
            return
        try:
            separator.run(make_noise(2, RATE, number), sample_rate=RATE)
        except (DemucsError, ValueError, RuntimeError) as error:
            report.counts[f"after close: {type(error).__name__}"] += 1

    _gather(report, work, rng)
    report.counts["closed in between"] += 1


def _close_generators(repo: str, report: Report, rng: random.Random) -> None:
    """Close a generator from a thread that did not begin it."""
    with Separator(MODEL, Path(repo), device="cpu") as separator:
        streams = []
        for seed in range(THREADS):
            stream = separator.stream(make_noise(2, 3 * RATE, seed), sample_rate=RATE)
            next(iter(stream))
            streams.append(stream)
        _gather(report, lambda number: streams[number].close(), rng)
        separator.run(make_noise(2, RATE, 0), sample_rate=RATE)
    report.counts["generators closed elsewhere"] += THREADS


def _start_processes(repo: str, report: Report, rng: random.Random) -> None:
    """Separate in processes that are forked and spawned after the import."""
    expected = separate(repo, 1)
    for method in ("fork", "spawn"):
        context: Any = multiprocessing.get_context(method)
        with context.Pool(1) as pool:
            stems = pool.apply_async(separate, (repo, 1)).get(timeout=60)
        if not torch.equal(stems, expected):
            report.find("other numbers", method)
        report.counts[f"processes by {method}"] += 1


def _use_asyncio(repo: str, report: Report, rng: random.Random) -> None:
    """Separate in threads of an event loop, and cancel some."""
    expected = separate(repo, 2)

    async def work() -> None:
        with Separator(MODEL, Path(repo), device="cpu") as separator:

            def run() -> Tensor:
                stems = separator.run(make_noise(2, RATE, 2), sample_rate=RATE)
                return stems["vocals"]

            tasks = [asyncio.create_task(asyncio.to_thread(run)) for _ in range(8)]
            await asyncio.sleep(0.01)
            tasks[3].cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, asyncio.CancelledError):
                    continue
                if isinstance(result, BaseException) or not torch.equal(result, expected):
                    report.find("asyncio", repr(result)[:300])

    asyncio.run(work())
    report.counts["event loops"] += 1


def _gather(report: Report, work: Any, rng: random.Random) -> None:
    """Run `work` in all threads at once; an error or a hang is a finding."""
    barrier = threading.Barrier(THREADS)

    def begin(number: int) -> None:
        barrier.wait(30)
        work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(begin, number) for number in range(THREADS)]:
            try:
                future.result(timeout=60)
            except Exception as error:
                report.find(type(error).__name__, f"{getattr(work, '__qualname__', '')}: {error!r}")


def run(limits: Limits) -> Report:
    """Repeat all parts until the time is over."""
    report = Report("threads", limits.seed)
    deadline = time.monotonic() + limits.seconds
    torch.set_num_threads(1)
    top = Path(tempfile.mkdtemp(prefix="chaos-threads-"))
    os.environ["DEMUCS_INFER_CACHE"] = str(top / "cache")
    try:
        prepare(top)
        rng = random.Random(limits.seed)
        repo, rounds = str(top / "repo"), 0
        _start_processes(repo, report, rng)
        while time.monotonic() < deadline and rounds != limits.count:
            for part in (_use_from_threads, _close_from_threads, _close_generators, _use_asyncio):
                part(repo, report, rng)
            rounds += 1
        report.figures["cases"] = rounds
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return report
