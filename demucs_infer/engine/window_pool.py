"""Run the windows of tracks that are separated at the same time, in turn, in shared threads.

Every track has a stream of its own, so that an error or a cancellation concerns no other track.
Only the windows meet here: clients take turns, and so do the tracks of each client. A track's own
windows run in order.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Thread
from typing import Any

from demucs_infer.system.threads import count_threads, limit_threads


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class WindowTask:
    """Windows of one track that run as one batch."""

    items: list[Any]
    run: Callable[[list[Any]], list[Any]]
    """Returns a result for each item, also if the items are those of several tasks."""

    size: int
    """Number of windows."""

    limit: int
    """Largest number of windows that may run together."""

    key: Hashable
    """Tasks of different tracks with equal keys may run as one batch; None: alone."""

    threads: int
    """Threads of torch to run on."""

    at_a_time: int
    """How many batches may run at the same time, each on so many threads."""

    future: "Future[list[Any]]" = field(default_factory=Future)


class WindowQueue:
    """The windows of one track that wait for their turn."""

    def __init__(self, pool: "WindowPool") -> None:
        self._pool = pool
        self.tasks: deque[WindowTask] = deque()

    @property
    def num_threads(self) -> int:
        """All threads of torch."""
        return self._pool.num_threads

    def submit(self, task: WindowTask) -> "Future[list[Any]]":
        """Queue windows, and return the future of their results."""
        self._pool.submit(self, task)
        return task.future


class WindowPool:
    """Threads that run the windows of several tracks in turn.

    Windows that need all threads of torch never run beside others. `on_batch` is called with the
    number of windows of each batch, from any thread.
    """

    def __init__(self, on_batch: Callable[[int], None] = lambda _: None) -> None:
        self._on_batch = on_batch
        self.num_threads = count_threads()
        """All threads of torch, as this pool was made."""
        self._changed = Condition()
        self._clients: OrderedDict[str, deque[WindowQueue]] = OrderedDict()
        """The tracks of each client; the first client, and its first track, are next."""
        self._threads: list[Thread] = []
        self._num_running = 0
        self._threads_of_running = 0
        """Threads of torch of each batch that runs."""
        self._num_started = 0
        """Batches that have started since none was running."""
        self._is_closed = False

    @contextmanager
    def open_queue(self, client: str) -> Iterator[WindowQueue]:
        """Open a queue for a track of `client`; at the end, windows that still wait are dropped."""
        queue = WindowQueue(self)
        with self._changed:
            self._clients.setdefault(client, deque()).append(queue)
        try:
            yield queue
        finally:
            with self._changed:
                self._clients[client].remove(queue)
                if not self._clients[client]:
                    del self._clients[client]
                for task in queue.tasks:
                    task.future.cancel()
                queue.tasks.clear()

    def submit(self, queue: WindowQueue, task: WindowTask) -> None:
        """Add windows to a queue; raise `RuntimeError` if the pool is closed."""
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the pool of windows is closed")
            queue.tasks.append(task)
            while len(self._threads) < task.at_a_time:
                name = f"demucs-window-{len(self._threads)}"
                thread = Thread(target=self._run_tasks, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._changed.notify()

    def close(self) -> None:
        """End the threads, after the batches that run; windows that still wait are cancelled."""
        with self._changed:
            self._is_closed = True
            for queues in self._clients.values():
                for queue in queues:
                    for task in queue.tasks:
                        task.future.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run_tasks(self) -> None:
        threads = 0
        while True:
            with self._changed:
                while not (batch := self._take_batch()):
                    if self._is_closed:
                        return
                    self._changed.wait()
                self._num_started = self._num_started + 1 if self._num_running else 1
                self._num_running += 1
                self._threads_of_running = batch[0].threads
                self._changed.notify()  # another thread may run the next batch beside this one
            if batch[0].threads != threads:
                threads = batch[0].threads
                limit_threads(threads)
            self._run_batch(batch)
            del batch
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def _run_batch(self, batch: list[WindowTask]) -> None:
        """Run tasks as one batch, and set their results."""
        try:
            self._on_batch(sum(task.size for task in batch))
            results = batch[0].run([item for task in batch for item in task.items])
        except BaseException as error:  # noqa: BLE001 (the stream of the track raises it)
            for task in batch:
                task.future.set_exception(error)
            return
        for task in batch:
            count = len(task.items)
            task.future.set_result(results[:count])
            results = results[count:]

    def _take_batch(self) -> list[WindowTask]:
        """Remove the tasks that are to run next, and return them; none if they have to wait."""
        turn = self._next_turn()
        if turn is None:
            return []
        if self._num_running and turn[1].tasks[0].threads != self._threads_of_running:
            # They cannot run beside those that run. Others may overtake them until all cores have
            # had a window, so that none is idle just because the number of threads changes.
            turn = self._next_turn(lambda task: task.threads == self._threads_of_running)
            if turn is None or self._num_started >= turn[1].tasks[0].at_a_time:
                return []
        first = turn[1].tasks[0]
        if self._num_running >= first.at_a_time:
            return []
        batch: list[WindowTask] = []
        size = 0
        while turn is not None:
            client, queue = turn
            task = queue.tasks.popleft()
            self._clients.move_to_end(client)
            self._clients[client].remove(queue)
            self._clients[client].append(queue)
            if task.future.set_running_or_notify_cancel():
                batch.append(task)
                size += task.size
            if not batch:
                return self._take_batch()
            if first.key is None:
                break
            turn = self._next_turn(partial(_fits_into_batch, first, first.limit - size))
        return batch

    def _next_turn(
        self, fits: Callable[[WindowTask], bool] = lambda _: True
    ) -> tuple[str, WindowQueue] | None:
        """Return the client and the track that are next, among those whose next task fits."""
        for client, queues in self._clients.items():
            for queue in queues:
                if queue.tasks and fits(queue.tasks[0]):
                    return client, queue
        return None


def _fits_into_batch(first: WindowTask, room: int, task: WindowTask) -> bool:
    return task.key == first.key and task.size <= room
