"""Run the application with uvicorn until it is told to stop."""

import logging
import socket

import uvicorn

from demucs_infer.devices import choose_device
from demucs_infer.server.app import create_app
from demucs_infer.server.connections import make_protocol
from demucs_infer.server.queue import JobQueue
from demucs_infer.server.settings import ServerSettings

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Closes event streams first, so that they do not delay the shutdown."""

    def __init__(self, config: uvicorn.Config, jobs: JobQueue) -> None:
        super().__init__(config)
        self._jobs = jobs

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
        return False
    return server.started
