"""A million tracks on a thousand workers, without either: discrete events, measured service times.

    python tools/simulate_cluster.py                  # the tables of docs/million-songs.md
    python tools/simulate_cluster.py --measure        # what a worker takes, on this machine

Time is that of a worker that reads, separates and writes side by side, takes tasks of some rows
from one queue, dies now and then, and leaves the unfinished rows of its task to others.
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

# Reading and writing (mp3 in, four flac files out) as `--measure` found them; the rest of the GPUs'
# rows is assumed: 38 x real time is what people published for one network on a 3090 Ti.
FILES = {"read": 0.0045, "write": 0.0073, "bytes_in": 40_000.0, "bytes_out": 340_000.0}
USUAL = {"track_seconds": 0.1, **FILES}
WORKERS = [
    Benchmark(name="one CPU thread", separate=0.58, start_seconds=30, **USUAL),
    Benchmark(name="38 x real time", separate=1 / 38, start_seconds=60, **USUAL),
    Benchmark(name="300 x real time", separate=1 / 300, start_seconds=60, **USUAL),
]

PCM = 44_100 * 2 * 4  # bytes of a second of decoded stereo
ORDERS: dict[str, Callable[[Lengths], Lengths]] = {
    "as it comes": lambda lengths: lengths,
    "longest first": lambda lengths: np.sort(lengths)[::-1],
    "shortest first": np.sort,
}


def catalogue(tracks: int, seed: int = 0) -> Lengths:
    """Lengths in seconds: songs about four minutes long, one in a thousand a mix of hours."""
    chance = np.random.default_rng(seed)
    lengths = np.clip(chance.lognormal(np.log(215), 0.4, tracks), 20, 3600)
    mixes = chance.random(tracks) < 1e-3
    lengths[mixes] = chance.uniform(3600, 3 * 3600, mixes.sum())
    return lengths


@dataclass(frozen=True, kw_only=True)
class World:
    """What the workers are like."""

    workers: int = 1000
    rows_per_task: int = 16
    shards: bool = False
    """Every worker has its own share of the rows from the start, instead of one queue for all."""

    slow_share: float = 0.02
    """So many workers take `slowness` times as long."""

    slowness: float = 2.0
    deaths_per_hour: float = 0.01
    """Of a worker; it is back after the time of a start."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run went, in hours."""

    makespan: float
    ideal: float
    """With all workers alike, immortal, and busy to the end."""

    idle: float
    """Share of the workers' time after the queue was empty."""

    crash_count: int
    lost: float
    """Work that was done twice."""


def simulate(lengths: Lengths, bench: Benchmark, world: World) -> Outcome:
    """Run the events to the end."""
    chance = np.random.default_rng(world.seed)
    factors = np.where(chance.random(world.workers) < world.slow_share, world.slowness, 1.0)
    queues = _queues(lengths, world)
    free = [(bench.start_seconds, worker) for worker in range(world.workers)]
    heapq.heapify(free)
    ends = np.full(world.workers, float(bench.start_seconds))
    crash_count, lost = 0, 0.0
    mean_life = 3600 / world.deaths_per_hour if world.deaths_per_hour else np.inf
    while free:
        now, worker = heapq.heappop(free)
        queue = queues[worker % len(queues)]
        if not queue:
            continue
        task = queue.popleft()
        # The first track is read before there is anything to separate.
        times = bench.track_seconds + task * bench.seconds_per_second
        times[0] += task[0] * bench.read / 2
        done = now + np.cumsum(times * factors[worker])
        death = now + chance.exponential(mean_life)
        if death >= done[-1]:
            ends[worker] = done[-1]
            heapq.heappush(free, (done[-1], worker))
            continue
        finished = int(np.searchsorted(done, death))
        queue.appendleft(task[finished:])
        crash_count += 1
        lost += death - (done[finished - 1] if finished else now)
        ends[worker] = death
        back = death + bench.start_seconds
        # A worker that had left because nothing was to do would take this up: the one that died
        # stands for it.
        heapq.heappush(free, (back, worker))
    work = float((bench.track_seconds + lengths * bench.seconds_per_second).sum())
    makespan = float(ends.max())
    return Outcome(
        makespan=makespan / 3600,
        ideal=(bench.start_seconds + work / world.workers) / 3600,
        idle=float((makespan - ends).mean() / makespan),
        crash_count=crash_count,
        lost=lost / 3600,
    )


def _queues(lengths: Lengths, world: World) -> list[deque[Lengths]]:
    count = world.workers if world.shards else 1
    shares = [lengths[i::count] for i in range(count)]
    size = world.rows_per_task
    return [deque(share[at : at + size] for at in range(0, len(share), size)) for share in shares]


def tables(tracks: int, world: World) -> None:
    """What the page shows."""
    lengths = catalogue(tracks)
    hours = lengths.sum() / 3600
    print(f"{tracks} tracks, {hours:.0f} h of sound, longest {lengths.max() / 3600:.1f} h")
    for bench in WORKERS:
        print(f"\n{bench.name}: {json.dumps(asdict(bench))}\n")
        print("| engine | rows a task | order | makespan | over ideal | idle | deaths | lost |")
        print("|---|---|---|---|---|---|---|---|")
        for shards, size, order in [
            (False, 16, "as it comes"), (False, 16, "longest first"), (False, 16, "shortest first"),
            (False, 1, "as it comes"), (False, 1, "longest first"), (False, 1, "shortest first"),
            (False, 64, "as it comes"), (True, 16, "as it comes"),
        ]:  # fmt: skip
            told = replace(world, shards=shards, rows_per_task=size)
            found = simulate(ORDERS[order](lengths), bench, told)
            over = found.makespan / found.ideal - 1
            print(
                f"| {'shards' if shards else 'queue'} | {size} | {order} | {found.makespan:.2f} h "
                f"| {over:.1%} | {found.idle:.1%} | {found.crash_count} | {found.lost:.1f} h |"
            )
        files = lengths.sum() * (bench.bytes_in + bench.bytes_out)
        sound = files + lengths.sum() * PCM * 5
        rate = files * 8 / (found.ideal * 3600) / 1e9
        print(f"\nfiles moved: {files / 1e12:.1f} TB, {rate:.2f} Gbit/s on average;")
        print(f"with decoded sound between machines: {sound / 1e12:.0f} TB")


def measured(seconds: float) -> Benchmark:
    """What one thread takes of the processor, so that other work on the machine does not count."""
    import torch

    from demucs_infer.api import Separator
    from demucs_infer.batch.request import SeparationRequest
    from demucs_infer.distributed.benchmark import measure
    from demucs_infer.htdemucs import HTDemucs
    from tests.bench.shapes import TRANSFORMER

    torch.set_num_threads(1)
    network = HTDemucs(**TRANSFORMER).eval()  # random weights take as long as any
    separator = Separator.from_model(network, device="cpu")
    order = SeparationRequest(format="flac")
    return measure(separator, order, name="measured", seconds=seconds, clock=process_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of sound, to measure")
    parser.add_argument("--tracks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(asdict(measured(args.seconds)), indent=1))
    else:
        tables(args.tracks, World(workers=args.workers))


if __name__ == "__main__":
    main()
