"""Drivers of Ray runs whose workers do nothing; tests run them in a process of their own."""

import os
from collections.abc import Iterable, Iterator

from demucs_infer.distributed.manifest import ResultRow, TrackRow
from demucs_infer.distributed.ray_engine import Cluster, run
from tests.helpers.processes import peak_kilobytes

ROWS = 100_000


class LargeManifest:
    """A manifest of `ROWS` rows."""

    def __iter__(self) -> Iterator[TrackRow]:
        return (TrackRow(path=f"{n}.wav", source=f"/songs/{n}.wav") for n in range(ROWS))


class InstantWorker:
    """Return a result for each row at once."""

    def __call__(self, rows: Iterable[TrackRow]) -> Iterator[ResultRow]:
        return ({"track": row.path, "status": "done", "error": "-" * 200} for row in rows)


class GpuListWorker:
    """Return the GPUs that the worker may use."""

    def __call__(self, rows: Iterable[TrackRow]) -> Iterator[ResultRow]:
        return ({"gpus": os.environ["CUDA_VISIBLE_DEVICES"]} for _ in rows)


def print_assigned_gpus() -> None:
    """Run two rows on a GPU that Ray is told of, although there is none."""
    import ray

    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    rows = [TrackRow(path=f"{n}.wav", source=f"/songs/{n}.wav") for n in range(2)]
    for result in run(rows, GpuListWorker, Cluster(workers=1, gpus=1.0, rows_per_task=1)):
        print(result["gpus"])
    ray.shutdown()


def print_memory_growth() -> None:
    """Print the number of results, and the bytes by which memory grew after the first tenth."""
    count = early = 0
    for _ in run(LargeManifest(), InstantWorker, Cluster(workers=1, rows_per_task=500)):
        count += 1
        if count == ROWS // 10:
            early = peak_kilobytes()
    grown = (peak_kilobytes() - early) * 1024
    print(count, grown)
