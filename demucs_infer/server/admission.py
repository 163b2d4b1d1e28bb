"""Decide which clients may upload now, and which get a place in the queue, without using HTTP.

An upload counts against the limit of the queue only while it arrives at a minimum rate. One that
stalls blocks nobody else, and is cancelled when there are too many uploads.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import anyio

from demucs_infer.server.errors import ApiError, from_exception, stopping

_GRACE_SECONDS = 10.0
"""How long an upload may fall behind the minimum rate."""

_MAX_AHEAD_SECONDS = 5.0
"""How long, at most, an upload counts as arriving after its last bytes."""


@dataclass(slots=True, eq=False)
class Slot:
    """A reserved place in the queue."""

    client: str
    name: str
    on_release: Callable[[str], None]
    is_held: bool = True

    def release(self) -> None:
        """Free the place; do nothing the second time."""
        if self.is_held:
            self.is_held = False
            self.on_release(self.name)


@dataclass(slots=True, eq=False)
class UploadPlace:
    """An upload in progress, with its time limits."""

    client: str
    min_rate: float
    max_seconds: float
    name: str = "upload"
    """What it is called in messages."""

    started_at: float = field(default_factory=anyio.current_time)
    size: int = 0
    has_given_way: bool = False
    _ahead_until: float = 0.0
    _scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    def receive(self, size: int) -> None:
        """Count bytes that have arrived."""
        now = anyio.current_time()
        self.size += size
        ahead = max(self._ahead_until, now) + size / self.min_rate
        self._ahead_until = min(ahead, now + _MAX_AHEAD_SECONDS)
        self._update_deadline()

    @property
    def is_arriving(self) -> bool:
        """Whether bytes arrive at the minimum rate."""
        return anyio.current_time() < self._ahead_until

    @contextmanager
    def limit_time(self) -> Iterator[None]:
        """Cancel the block and raise `ApiError` if the upload is too slow, or has to give way."""
        self.started_at = anyio.current_time()
        self._scope = anyio.CancelScope()  # each can be entered once
        if self.has_given_way:
            self._scope.cancel()
        self._update_deadline()
        with self._scope:
            yield
        if not self._scope.cancelled_caught:
            return
        elapsed = anyio.current_time() - self.started_at
        if self.has_given_way:
            message = f"the {self.name} stalled, and its place was needed"
        elif elapsed >= self.max_seconds:
            message = f"the {self.name} took longer than {self.max_seconds:g} s"
        else:
            message = f"the {self.name} was slower than {self.min_rate:g} bytes per second"
        raise from_exception(TimeoutError(), message)

    def give_way(self) -> None:
        """Cancel the upload: another one needs its place."""
        self.has_given_way = True
        self._scope.cancel()

    def _update_deadline(self) -> None:
        last_progress = max(self._ahead_until, self.started_at)
        at_minimum_rate = self.started_at + self.size / self.min_rate
        deadline = min(last_progress, at_minimum_rate) + _GRACE_SECONDS
        self._scope.deadline = min(deadline, self.started_at + self.max_seconds)


class SlotCounter(Protocol):
    """Counts the places in the queue that are taken: of this server, or of several."""

    def count(self, client: str) -> tuple[int, int]:
        """Return the number of places taken, in total and by a client."""

    def add(self, client: str, max_total: float, max_per_client: int) -> str | None:
        """Take a place and return its name, or None above a limit (`max_per_client` 0: none)."""

    def remove_slot(self, slot: str) -> None:
        """Free a place."""


@dataclass(slots=True, eq=False)
class LocalSlots:
    """The places of this server alone, each with the name of its client."""

    _taken: Counter[str] = field(default_factory=Counter)

    def count(self, client: str) -> tuple[int, int]:
        """Return the number of places taken, in total and by a client."""
        return self._taken.total(), self._taken[client]

    def add(
        self,
        client: str,
        max_total: float,
        max_per_client: int,  # noqa: ARG002 (of the protocol)
    ) -> str | None:
        """Take a place and return its name, or None above `max_total`.

        The limit per client was checked by `Admission` when the upload began.
        """
        if self._taken.total() >= max_total:
            return None
        self._taken[client] += 1
        return client

    def remove_slot(self, slot: str) -> None:
        """Free a place."""
        self._taken[slot] -= 1
        self._taken += Counter()  # drops clients without a slot


@dataclass(slots=True, eq=False, kw_only=True)
class Admission:
    """Limits the places in the queue and the uploads, in total and per client."""

    max_queue: int
    max_per_client: int
    """0: no limit."""

    min_upload_rate: float
    max_upload_seconds: float
    estimate_wait: Callable[[], int]
    """Returns the seconds until a place may be free."""

    is_closed: bool = False
    slots: SlotCounter = field(default_factory=LocalSlots)
    held: set[str] = field(default_factory=set)
    """Names of the places that requests of this server have taken."""

    _uploads: list[UploadPlace] = field(default_factory=list)

    @contextmanager
    def begin_upload(self, client: str) -> Iterator[UploadPlace]:
        """Yield a place for an upload before its body is read; raise `ApiError` if there is none.

        `reserve` turns it into a place in the queue.
        """
        self._check(client)
        if len(self._uploads) >= 2 * self.max_queue:
            stalled = [place for place in self._uploads if not place.is_arriving]
            if not stalled:
                raise self._busy()
            self._remove(min(stalled, key=lambda place: place.started_at)).give_way()
        place = UploadPlace(client, self.min_upload_rate, self.max_upload_seconds)
        self._uploads.append(place)
        try:
            yield place
        finally:
            if place in self._uploads:
                self._uploads.remove(place)

    def reserve(self, place: UploadPlace) -> Slot:
        """Reserve a place in the queue for a complete upload; raise `ApiError` if it is full."""
        if place in self._uploads:
            self._uploads.remove(place)
        slot = self._take(place.client, self.max_queue, self.max_per_client)
        if slot is None:
            self._check_limits(place.client)
            raise self._busy()
        return slot

    def take_slot(self, client: str) -> Slot:
        """Take a place in the queue, even if it is full."""
        slot = self._take(client, inf, 0)
        assert slot is not None
        return slot

    def forget(self, slot: Slot) -> None:
        """Leave a place to its job, which may be finished by another server."""
        self.held.discard(slot.name)

    def _take(self, client: str, max_total: float, max_per_client: int) -> Slot | None:
        name = self.slots.add(client, max_total, max_per_client)
        if name is None:
            return None
        self.held.add(name)
        return Slot(client, name, self._on_release)

    def _check(self, client: str) -> None:
        if self.is_closed:
            raise stopping()
        self._check_limits(client)

    def _check_limits(self, client: str) -> None:
        arriving = sum(place.is_arriving for place in self._uploads)
        total, by_client = self.slots.count(client)
        if total + arriving >= self.max_queue:
            raise self._busy()
        uploading = sum(place.client == client for place in self._uploads)
        if self.max_per_client and by_client + uploading >= self.max_per_client:
            raise ApiError(
                "too_many",
                f"too many requests from this client (limit {self.max_per_client})",
                self.estimate_wait(),
            )

    def _busy(self) -> ApiError:
        return ApiError("busy", "the queue is full: try again later", self.estimate_wait())

    def _remove(self, place: UploadPlace) -> UploadPlace:
        self._uploads.remove(place)
        return place

    def _on_release(self, name: str) -> None:
        self.held.discard(name)
        self.slots.remove_slot(name)


@dataclass(slots=True, eq=False)
class MemoryBudget:
    """Limits the bytes of request bodies in memory; others wait, first come, first served."""

    max_bytes: int
    _held: int = 0
    _turn: anyio.Lock = field(default_factory=anyio.Lock)
    _freed: anyio.Event = field(default_factory=anyio.Event)

    @asynccontextmanager
    async def hold(self, size: int, seconds: float) -> AsyncIterator[None]:
        """Reserve `size` bytes in the block; raise `ApiError` if none are free for `seconds`."""
        size = min(size, self.max_bytes)
        try:
            with anyio.fail_after(seconds):
                async with self._turn:
                    while self._held + size > self.max_bytes:
                        await self._freed.wait()
                    self._held += size
        except TimeoutError as error:
            raise ApiError("busy", "too many large bodies: try again later", 60) from error
        try:
            yield
        finally:
            self._held -= size
            self._freed.set()
            self._freed = anyio.Event()
