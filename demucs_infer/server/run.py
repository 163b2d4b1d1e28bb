"""Run the application with uvicorn until it is told to stop."""

import logging
import signal
import socket
import time
from types import FrameType

import uvicorn

from demucs_infer.devices import choose_device
from demucs_infer.server.app import create_app
from demucs_infer.server.connections import make_protocol
from demucs_infer.server.queue import JobQueue
from demucs_infer.server.settings import ServerSettings

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Shuts down in steps: load balancers first, then event streams, then requests."""

    def __init__(self, config: uvicorn.Config, jobs: JobQueue) -> None:
        super().__init__(config)
        self._jobs = jobs
        self._exit_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first SIGTERM; shut down at any other signal."""
        seconds = self._jobs.settings.drain_seconds
        if sig != signal.SIGTERM or self._jobs.is_draining or not seconds:
            super().handle_exit(sig, frame)
            return
        self._jobs.is_draining = True
        self._exit_at = time.monotonic() + seconds

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down; uvicorn asks ten times a second."""
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self._exit_at = None
            super().handle_exit(signal.SIGTERM, None)
        return bool(await super().on_tick(counter))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._jobs.drain()
        await super().shutdown(sockets)


def serve(settings: ServerSettings) -> bool:
    """Serve until a signal arrives; return False if the server could not start.

    Raises if the settings, or a file or device they refer to, are invalid.
    """
    for device in settings.devices:
        choose_device(device)
    if settings.is_exposed:
        logger.warning(
            "other machines can reach %s and no API key is set: set api_keys, or public if a proxy "
            "authenticates clients",
            settings.host,
        )
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # configured by the command line
        access_log=False,
        server_header=False,
        # By then, running requests have ended with an error that states the reason.
        timeout_graceful_shutdown=round(settings.shutdown_seconds) + 5,
        http=make_protocol(settings.header_seconds, settings.stall_seconds),
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        h11_max_incomplete_event_size=1 << 16,
    )
    server = _Server(config, app.state.jobs)
    try:
        server.run()
    except SystemExit:  # uvicorn has logged the reason
        if app.state.failure:
            raise app.state.failure from None
        logger.error(
            "cannot listen at %s, port %s: set another port or host, or end the program "
            "that uses this one",
            settings.host,
            settings.port,
        )
        return False
    return server.started
