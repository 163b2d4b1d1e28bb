"""Close connections of clients that send nothing, send headers slowly, or do not read responses.

uvicorn can only limit the number of connections, and then answers 503 to all others, including
health checks. Here, a connection without a request is closed after a time limit, or earlier if
there are too many. `middleware.AccessMiddleware` limits the number of requests.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_MAX_WAITING = 256
"""Limit for connections without a request, above which the oldest of them is closed."""


class TimedProtocol(H11Protocol):
    """HTTP/1.1 with time limits; `make_protocol` sets them for one server."""

    header_seconds: ClassVar[float]
    """Time limit from the start of a connection, or the last response, to the next request."""

    stall_seconds: ClassVar[float]
    """Time limit for a client that does not read its response."""

    max_waiting: ClassVar[int]
    waiting: ClassVar["dict[TimedProtocol, asyncio.TimerHandle]"]
    """The connections without a request, in the order in which they began to wait."""

    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time limit of the headers."""
        super().connection_made(transport)
        self._update_waiting()

    def data_received(self, data: bytes) -> None:
        """End the time limit if the headers are complete."""
        super().data_received(data)
        self._update_waiting()

    def on_response_complete(self) -> None:
        """Start the time limit for the next request on this connection."""
        super().on_response_complete()
        self._update_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        self._stop_waiting()
        self._stop_stall_timer()

    def pause_writing(self) -> None:
        """Start the time limit of a client that does not read."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """End the time limit of a client that reads again."""
        super().resume_writing()
        self._stop_stall_timer()

    def _update_waiting(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        has_request = cycle is not None and not cycle.response_complete
        if has_request or self.transport.is_closing():
            self._stop_waiting()
        elif self not in self.waiting:
            while len(self.waiting) >= self.max_waiting:
                next(iter(self.waiting)).close()
            self.waiting[self] = self.loop.call_later(self.header_seconds, self.close)

    def _stop_waiting(self) -> None:
        timer = self.waiting.pop(self, None)
        if timer is not None:
            timer.cancel()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def close(self) -> None:
        """Close the connection, even if a response has not been sent completely."""
        self._stop_waiting()
        self.transport.abort()


def make_protocol(header_seconds: float, stall_seconds: float) -> type[TimedProtocol]:
    """Return the protocol of one server; uvicorn makes an instance of it per connection."""
    limits = {"header_seconds": header_seconds, "stall_seconds": stall_seconds}
    names = limits | {"waiting": {}, "max_waiting": _count_spare_files()}
    return type("TimedProtocol", (TimedProtocol,), names)


def _count_spare_files() -> int:
    """Return how many connections may wait, so that file descriptors are left for requests."""
    try:
        import resource
    except ImportError:  # Windows
        return _MAX_WAITING
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_WAITING if soft < 0 else max(min(_MAX_WAITING, soft // 4), 16)
