"""A driver of a great many tracks that take no time: says what its memory grew by, in bytes."""

import os
from collections.abc import Iterable, Iterator

from demucs_infer.distributed.manifest import ResultRow, TrackRow
from demucs_infer.distributed.ray_engine import Cluster, run
from tests.helpers.networks import peak_kilobytes

ROWS = 100_000


class Rows:
    """A manifest."""

    def __iter__(self) -> Iterator[TrackRow]:
        return (TrackRow(path=f"{n}.wav", source=f"/songs/{n}.wav") for n in range(ROWS))


class Instant:
    """A worker that has nothing to do."""

    def __call__(self, rows: Iterable[TrackRow]) -> Iterator[ResultRow]:
        return ({"track": row.path, "status": "done", "error": "-" * 200} for row in rows)


class Seeing:
    """A worker that tells which GPUs it may use."""

    def __call__(self, rows: Iterable[TrackRow]) -> Iterator[ResultRow]:
        return ({"gpus": os.environ["CUDA_VISIBLE_DEVICES"]} for _ in rows)


def on_a_gpu() -> None:
    """Two rows, on a GPU that is not there."""
    import ray

    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    two = [TrackRow(path=f"{n}.wav", source=f"/songs/{n}.wav") for n in range(2)]
    for answer in run(two, Seeing, Cluster(workers=1, gpus=1.0, rows_per_task=1)):
        print(answer["gpus"])
    ray.shutdown()


def main() -> None:
    """(answers, bytes by which the peak grew after the first tenth of them)"""
    count = early = 0
    for _ in run(Rows(), Instant, Cluster(workers=1, rows_per_task=500)):
        count += 1
        if count == ROWS // 10:
            early = peak_kilobytes()
    grown = (peak_kilobytes() - early) * 1024
    print(count, grown)
