"""The same workers on a Ray cluster: Ray Data hands out tasks, with back-pressure, and retries.

It retries a task whose worker died for ever; that ends here because a track that killed its worker
twice is answered instead of tried. Sound never travels through Ray: rows go in, answers come out,
and each worker reads, separates and writes side by side, for decoded sound has many times the
bytes of the files.
"""

import asyncio
import json
import logging
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from demucs_infer.batch.attempts import withdraw_all
from demucs_infer.distributed.manifest import ResultRow, TrackRow

# A share unlike any worker's: Ray would make one task of two stages that ask for the same.
_READER_CPUS = 0.01
_MANY = 100_000  # workers that may listen to one bell
_PATIENCE_SECONDS = 3.0  # for all of them to leave; some may be dead

Make = Callable[[], Callable[[Iterable[TrackRow]], Iterator[ResultRow]]]
"""Makes a worker, in the process it will work in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Which cluster, and what of it."""

    address: str | None = None
    """As `ray.init` takes it; None starts one on this machine, which ends with the run."""

    workers: int = 1
    """How many at most; fewer start if there is no room."""

    gpus: float = 0.0
    """Of a worker; 0.5 puts two on one GPU."""

    cpus: float = 1.0
    """Of a worker: they decode and encode beside the network, or run it."""

    rows_per_task: int = 16
    """What is done again, apart from what was finished, when a worker dies."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.rows_per_task < 1 or self.gpus < 0 or self.cpus < 0:
            raise ValueError(f"{self} needs a worker, a row a task, and no negative resources")


def run(rows: Iterable[TrackRow], make: Make, cluster: Cluster) -> Generator[ResultRow, None, None]:
    """The answers, as they come; memory here does not grow with the number of rows.

    `rows` and `make` are pickled: the rows are read on the cluster, by one task.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _start(ray, cluster)
    bell = ray.remote(num_cpus=0, max_concurrency=_MANY)(_ShutdownNotice).remote()
    try:
        # On a cluster of our own there is room for all of them; elsewhere they come as they can.
        is_made_for_us = ours and cluster.address is None and not cluster.gpus
        least = cluster.workers if is_made_for_us else 1
        yield from _answers(ray, rows, make, bell, cluster, least)
    except BaseException:  # given up: Ray is about to kill workers in the middle of their tracks
        with suppress(Exception):
            ray.get(bell.ring.remote(), timeout=_PATIENCE_SECONDS)
        raise
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'demucs-infer[ray]'") from error
    return ray


def _start(ray: Any, cluster: Cluster) -> None:
    told: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address is None:
        told |= {
            "num_cpus": max(1, round(cluster.workers * cluster.cpus)) + 1,  # and one that reads
            "include_dashboard": False,
            "object_store_memory": 200 << 20,
        }
        if cluster.gpus:
            del told["num_cpus"]
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=cluster.address, **told)
    # Ray answers it by an end without cleaning up; whoever called us knows better.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _answers(
    ray: Any, rows: Iterable[TrackRow], make: Make, bell: Any, cluster: Cluster, least: int
) -> Iterator[ResultRow]:
    """What the workers answer, of which there are `least` from the beginning."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Every task a block of its own, so that tasks go round and the reader is held back.
    context.target_min_block_size = context.target_max_block_size = 1
    with ray.data.DataContext.current(context):
        tasks = ray.data.from_items([{"task": ""}], override_num_blocks=1).map_batches(
            _ManifestReader(rows, cluster.rows_per_task), batch_size=None, num_cpus=_READER_CPUS
        )
        answers = tasks.map_batches(
            _Actor,
            fn_constructor_args=(make, bell),
            batch_size=1,  # a task; with GPUs, Ray wants a number
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus or None,
            compute=ray.data.ActorPoolStrategy(
                min_size=least,
                max_size=cluster.workers,
                # Whoever is free gets the next: what waits at a busy worker outlasts the run.
                max_tasks_in_flight_per_actor=1,
            ),
        )
        for item in answers.iter_rows():
            yield from json.loads(item["answers"])


@dataclass(frozen=True)
class _ManifestReader:
    """Cuts the rows into tasks, as text."""

    rows: Iterable[TrackRow]
    size: int

    def __call__(self, _: Any) -> Iterator[dict[str, list[str]]]:
        task: list[dict[str, Any]] = []
        for row in self.rows:
            task.append(asdict(row))
            if len(task) == self.size:
                yield {"task": [json.dumps(task)]}
                task = []
        if task:
            yield {"task": [json.dumps(task)]}


class _ShutdownNotice:
    """Rung when a run is given up, for the workers to say whom they would leave behind."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._listeners = 0

    async def listen(self) -> None:
        """Comes back when it rings."""
        self._listeners += 1
        await self._rung.wait()

    async def leave(self) -> None:
        """A listener is ready for its end."""
        self._listeners -= 1

    async def ring(self) -> None:
        """Comes back when all that listened have left."""
        self._rung.set()
        while self._listeners:
            await asyncio.sleep(0.01)


class _Actor:
    """A worker, as Ray Data wants it."""

    def __init__(self, make: Make, bell: Any) -> None:
        self._worker = make()
        threading.Thread(target=_listen, args=(bell,), daemon=True).start()

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        for task in block["task"]:
            rows = [TrackRow(**fields) for fields in json.loads(str(task))]
            yield {"answers": [json.dumps(list(self._worker(rows)))]}


def _listen(bell: Any) -> None:
    import ray

    ray.get(bell.listen.remote())
    withdraw_all()
    bell.leave.remote()
