"""Run track workers on a Ray cluster, where Ray Data distributes tasks of manifest rows.

Ray retries the task of a crashed worker without limit, but a track that has crashed its worker
twice is quarantined and not tried again. Only manifest rows and result rows pass through Ray:
decoded audio is many times larger than the files, so each worker reads and writes files itself.
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

# Different from the CPUs of any worker, as Ray merges stages that request the same resources.
_READER_CPUS = 0.01
_MAX_LISTENERS = 100_000  # workers that may wait for one shutdown notice
_SHUTDOWN_SECONDS = 3.0  # time limit for the workers to withdraw their attempts

WorkerFactory = Callable[[], Callable[[Iterable[TrackRow]], Iterator[ResultRow]]]
"""Makes a worker in the process that it runs in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The Ray cluster to use, and the resources to request from it."""

    address: str | None = None
    """As in `ray.init`; None starts a cluster on this machine that ends with the run."""

    workers: int = 1
    """Maximum number of workers; fewer start if the cluster has no room."""

    gpus: float = 0.0
    """GPUs per worker; with 0.5, two workers share one."""

    cpus: float = 1.0
    """CPU cores per worker, for decoding and encoding, and for the network without a GPU."""

    rows_per_task: int = 16
    """Rows that are handed out together; a crash repeats the unfinished ones."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.rows_per_task < 1 or self.gpus < 0 or self.cpus < 0:
            raise ValueError(
                f"{self}: workers and rows_per_task must be at least 1, gpus and cpus at least 0"
            )


def run(
    rows: Iterable[TrackRow], make_worker: WorkerFactory, cluster: Cluster
) -> Generator[ResultRow, None, None]:
    """Yield result rows as they are finished; memory does not grow with the number of rows.

    `rows` and `make_worker` are pickled: one task on the cluster reads the rows.

    Raises:
        ValueError: if Ray is not installed.
    """
    ray = _import_ray()
    is_owner = not ray.is_initialized()
    if is_owner:
        _start(ray, cluster)
    notice = ray.remote(num_cpus=0, max_concurrency=_MAX_LISTENERS)(_ShutdownNotice).remote()
    try:
        # A cluster that was started for this run has room for all workers at once.
        has_room = is_owner and cluster.address is None and not cluster.gpus
        min_workers = cluster.workers if has_room else 1
        yield from _run_tasks(ray, rows, make_worker, notice, cluster, min_workers)
    except BaseException:  # Ray is about to kill workers in the middle of their tracks
        with suppress(Exception):
            ray.get(notice.send.remote(), timeout=_SHUTDOWN_SECONDS)
        raise
    finally:
        if is_owner:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("the Ray engine needs Ray: pip install 'ray[data]'") from error
    return ray


def _start(ray: Any, cluster: Cluster) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address is None:
        options |= {"include_dashboard": False, "object_store_memory": 200 << 20}
        if not cluster.gpus:
            # One more for the task that reads the manifest.
            options["num_cpus"] = max(1, round(cluster.workers * cluster.cpus)) + 1
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=cluster.address, **options)
    # Ray installs a handler that exits without cleaning up: restore the caller's.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _run_tasks(
    ray: Any,
    rows: Iterable[TrackRow],
    make_worker: WorkerFactory,
    notice: Any,
    cluster: Cluster,
    min_workers: int,
) -> Iterator[ResultRow]:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # One block per task, so that tasks are spread evenly and the reader feels back-pressure.
    context.target_min_block_size = context.target_max_block_size = 1
    with ray.data.DataContext.current(context):
        tasks = ray.data.from_items([{"task": ""}], override_num_blocks=1).map_batches(
            _ManifestReader(rows, cluster.rows_per_task), batch_size=None, num_cpus=_READER_CPUS
        )
        results = tasks.map_batches(
            _Actor,
            fn_constructor_args=(make_worker, notice),
            batch_size=1,  # a task; with GPUs, Ray requires a number
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus or None,
            compute=ray.data.ActorPoolStrategy(
                min_size=min_workers,
                max_size=cluster.workers,
                # A task queued at a busy worker would end last: the next free worker takes it.
                max_tasks_in_flight_per_actor=1,
            ),
        )
        for item in results.iter_rows():
            yield from json.loads(item["results"])


@dataclass(frozen=True)
class _ManifestReader:
    """Cuts the manifest into tasks, as JSON."""

    rows: Iterable[TrackRow]
    rows_per_task: int

    def __call__(self, _: Any) -> Iterator[dict[str, list[str]]]:
        task: list[dict[str, Any]] = []
        for row in self.rows:
            task.append(asdict(row))
            if len(task) == self.rows_per_task:
                yield {"task": [json.dumps(task)]}
                task = []
        if task:
            yield {"task": [json.dumps(task)]}


class _ShutdownNotice:
    """Signals shutdown, so that workers can withdraw their open attempts."""

    def __init__(self) -> None:
        self._is_sent = asyncio.Event()
        self._listeners = 0

    async def wait(self) -> None:
        """Return when the notice is sent."""
        self._listeners += 1
        await self._is_sent.wait()

    async def acknowledge(self) -> None:
        """Report that one listener has withdrawn its attempts."""
        self._listeners -= 1

    async def send(self) -> None:
        """Return when all listeners have acknowledged the notice."""
        self._is_sent.set()
        while self._listeners:
            await asyncio.sleep(0.01)


class _Actor:
    """A track worker with the interface that Ray Data expects."""

    def __init__(self, make_worker: WorkerFactory, notice: Any) -> None:
        self._worker = make_worker()
        threading.Thread(target=_withdraw_on_shutdown, args=(notice,), daemon=True).start()

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        for task in block["task"]:
            rows = [TrackRow(**fields) for fields in json.loads(str(task))]
            yield {"results": [json.dumps(list(self._worker(rows)))]}


def _withdraw_on_shutdown(notice: Any) -> None:
    import ray

    ray.get(notice.wait.remote())
    withdraw_all()
    notice.acknowledge.remote()
