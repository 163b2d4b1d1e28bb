"""Run the application with uvicorn until somebody ends it."""

import logging
import socket

import uvicorn

from demucs_infer.devices import choose_device
from demucs_infer.server.app import create_app
from demucs_infer.server.queue import JobQueue
from demucs_infer.server.settings import ServerSettings

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Lets those who only watch go first, so that they hold nobody up."""

    def __init__(self, config: uvicorn.Config, jobs: JobQueue) -> None:
        super().__init__(config)
        self._jobs = jobs

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._jobs.drain()
        await super().shutdown(sockets)


def serve(settings: ServerSettings) -> bool:
    """Listen until a signal comes; whether it started at all.

    What is wrong with the settings, or with what they name, is an exception.
    """
    for device in settings.devices:
        choose_device(device)
    if settings.is_exposed:
        logger.warning(
            "%s can be reached from other machines and asks nobody for a key: "
            "set --api-key, or --public if something in front does",
            settings.host,
        )
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # the command line says where the lines go
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(round(settings.shutdown_seconds), 1),
        limit_concurrency=max(4 * settings.max_queue, 256),
        h11_max_incomplete_event_size=1 << 16,
    )
    server = _Server(config, app.state.jobs)
    try:
        server.run()
    except SystemExit:  # what it says is in its log
        if app.state.failure:
            raise app.state.failure from None
        return False
    return server.started
