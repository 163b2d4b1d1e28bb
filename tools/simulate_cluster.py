"""Simulate a million tracks on a thousand workers, as discrete events with measured service times.

    python tools/simulate_cluster.py                  # the tables of docs/batch.md
    python tools/simulate_cluster.py --measure        # benchmark of a worker on this machine

A worker reads, separates and writes in parallel, takes tasks of several rows from one queue, and
crashes now and then; other workers take the unfinished rows of its task.
"""

import argparse
import heapq
import json
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from demucs_infer.distributed.planner import Benchmark

Lengths = np.ndarray[tuple[int], np.dtype[np.float64]]

# mp3 in, four flac files out, as measured by `--measure`. The speed of GPUs is assumed: 38 x real
# time is a published figure for one network on a 3090 Ti.
USUAL = {
    "track_seconds": 0.1,
    "read": 0.0045,
    "write": 0.0073,
    "bytes_in": 40_000.0,
    "bytes_out": 340_000.0,
}
WORKERS = [
    Benchmark(name="one CPU thread", separate=0.58, start_seconds=30, **USUAL),
    Benchmark(name="38 x real time", separate=1 / 38, start_seconds=60, **USUAL),
    Benchmark(name="300 x real time", separate=1 / 300, start_seconds=60, **USUAL),
]

PCM_BYTES_PER_SECOND = 44_100 * 2 * 4  # decoded stereo
ORDERS: dict[str, Callable[[Lengths], Lengths]] = {
    "as it comes": lambda lengths: lengths,
    "longest first": lambda lengths: np.sort(lengths)[::-1],
    "shortest first": np.sort,
}


def draw_lengths(tracks: int, seed: int = 0) -> Lengths:
    """Draw lengths in seconds: songs of about four minutes, one in a thousand a mix of hours."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(215), 0.4, tracks), 20, 3600)
    mixes = rng.random(tracks) < 1e-3
    lengths[mixes] = rng.uniform(3600, 3 * 3600, mixes.sum())
    return lengths


@dataclass(frozen=True, kw_only=True)
class ClusterModel:
    """Number, speed and reliability of the workers."""

    workers: int = 1000
    rows_per_task: int = 16
    shards: bool = False
    """Give every worker a fixed share of the rows, instead of one queue for all."""

    slow_share: float = 0.02
    """Share of workers that take `slowness` times as long."""

    slowness: float = 2.0
    crashes_per_hour: float = 0.01
    """Of each worker; it restarts at once."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Duration of a run, in hours."""

    makespan: float
    ideal: float
    """With equal workers that never crash and are busy to the end."""

    idle: float
    """Share of the workers' time after their last track."""

    crash_count: int
    lost: float
    """Work that was repeated."""


def simulate(lengths: Lengths, benchmark: Benchmark, cluster: ClusterModel) -> Outcome:
    """Process all events."""
    rng = np.random.default_rng(cluster.seed)
    factors = np.where(rng.random(cluster.workers) < cluster.slow_share, cluster.slowness, 1.0)
    queues = make_queues(lengths, cluster)
    free = [(benchmark.start_seconds, worker) for worker in range(cluster.workers)]
    heapq.heapify(free)
    ends = np.full(cluster.workers, float(benchmark.start_seconds))
    crash_count, lost = 0, 0.0
    mean_uptime = 3600 / cluster.crashes_per_hour if cluster.crashes_per_hour else np.inf
    while free:
        now, worker = heapq.heappop(free)
        queue = queues[worker % len(queues)]
        if not queue:
            continue
        task = queue.popleft()
        # The first track is read before there is anything to separate.
        times = benchmark.track_seconds + task * benchmark.seconds_per_second
        times[0] += task[0] * benchmark.read / 2
        done = now + np.cumsum(times * factors[worker])
        crash = now + rng.exponential(mean_uptime)
        if crash >= done[-1]:
            ends[worker] = done[-1]
            heapq.heappush(free, (done[-1], worker))
            continue
        finished = int(np.searchsorted(done, crash))
        queue.appendleft(task[finished:])
        crash_count += 1
        lost += crash - (done[finished - 1] if finished else now)
        ends[worker] = crash
        back = crash + benchmark.start_seconds
        # An idle worker would take these rows up at once; the restarted one stands for it.
        heapq.heappush(free, (back, worker))
    work = float((benchmark.track_seconds + lengths * benchmark.seconds_per_second).sum())
    makespan = float(ends.max())
    return Outcome(
        makespan=makespan / 3600,
        ideal=(benchmark.start_seconds + work / cluster.workers) / 3600,
        idle=float((makespan - ends).mean() / makespan),
        crash_count=crash_count,
        lost=lost / 3600,
    )


def make_queues(lengths: Lengths, cluster: ClusterModel) -> list[deque[Lengths]]:
    """Split the tracks into tasks, in one queue or in one for each worker."""
    count = cluster.workers if cluster.shards else 1
    shares = [lengths[i::count] for i in range(count)]
    size = cluster.rows_per_task
    return [deque(share[at : at + size] for at in range(0, len(share), size)) for share in shares]


def print_tables(tracks: int, cluster: ClusterModel) -> None:
    """Print the tables of the documentation."""
    lengths = draw_lengths(tracks)
    hours = lengths.sum() / 3600
    print(f"{tracks} tracks, {hours:.0f} h of sound, longest {lengths.max() / 3600:.1f} h")
    for benchmark in WORKERS:
        print(f"\n{benchmark.name}: {json.dumps(asdict(benchmark))}\n")
        print("| engine | rows a task | order | makespan | over ideal | idle | crashes | lost |")
        print("|---|---|---|---|---|---|---|---|")
        for shards, size, order in [
            (False, 16, "as it comes"), (False, 16, "longest first"), (False, 16, "shortest first"),
            (False, 1, "as it comes"), (False, 1, "longest first"), (False, 1, "shortest first"),
            (False, 64, "as it comes"), (True, 16, "as it comes"),
        ]:  # fmt: skip
            variant = replace(cluster, shards=shards, rows_per_task=size)
            run = simulate(ORDERS[order](lengths), benchmark, variant)
            over = run.makespan / run.ideal - 1
            print(
                f"| {'shards' if shards else 'queue'} | {size} | {order} | {run.makespan:.2f} h "
                f"| {over:.1%} | {run.idle:.1%} | {run.crash_count} | {run.lost:.1f} h |"
            )
        files = lengths.sum() * (benchmark.bytes_in + benchmark.bytes_out)
        sound = files + lengths.sum() * PCM_BYTES_PER_SECOND * 5
        rate = files * 8 / (run.ideal * 3600) / 1e9
        print(f"\nfiles moved: {files / 1e12:.1f} TB, {rate:.2f} Gbit/s on average;")
        print(f"with decoded sound between machines: {sound / 1e12:.0f} TB")


def measure_thread(seconds: float) -> Benchmark:
    """Measure the processor time of one thread, independent of other work on the machine."""
    import torch

    from demucs_infer.api import Separator
    from demucs_infer.batch.request import Request
    from demucs_infer.distributed.benchmark import measure
    from demucs_infer.htdemucs import HTDemucs
    from tests.bench.shapes import TRANSFORMER

    torch.set_num_threads(1)
    network = HTDemucs(**TRANSFORMER).eval()  # random weights are as fast as any
    separator = Separator.from_model(network, device="cpu")
    request = Request().replace({"format": "flac"})
    return measure(separator, request, name="measured", seconds=seconds, clock=process_time)


def main() -> None:
    """Print the table of estimates and simulated runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of audio, to measure")
    parser.add_argument("--tracks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(asdict(measure_thread(args.seconds)), indent=1))
    else:
        print_tables(args.tracks, ClusterModel(workers=args.workers))


if __name__ == "__main__":
    main()
