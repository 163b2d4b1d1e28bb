"""Announce finished jobs to the URLs that clients name: signed, repeated, kept over a restart."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from secrets import token_hex

import anyio

from demucs_infer.server.http_client import HttpClient, RemoteError, UrlRefusedError
from demucs_infer.server.urls import parse_url

logger = logging.getLogger(__name__)

DELAYS = (2.0, 10.0, 60.0, 300.0, 1800.0)
"""Seconds between the attempts; there is one more attempt than there are delays."""

_ATTEMPT_SECONDS = 10.0
_MAX_CONCURRENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A message that has not been delivered yet."""

    id: str
    url: str
    body: str
    attempts: int = 0


class Webhooks:
    """The messages to deliver, one file each until its receiver has accepted it.

    A message may arrive twice, if the server is killed just after it was accepted: its id is the
    same.
    """

    def __init__(self, folder: Path, client: HttpClient, secret: bytes) -> None:
        self._folder = folder
        self._client = client
        self._secret = secret
        self._turn = anyio.Semaphore(_MAX_CONCURRENT)
        self._tasks: set[asyncio.Task[None]] = set()
        self.delays = DELAYS
        self.counts: Counter[str] = Counter()
        """Messages that were `delivered` or have `failed`, and attempts that were `retried`."""

    def start(self) -> None:
        """Continue with the messages that an earlier process left."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                announcement = Announcement(**json.loads(path.read_text("utf-8")))
            except (OSError, ValueError, TypeError) as error:
                logger.error("the webhook %s is damaged and is deleted: %s", path.name, error)
                path.unlink(missing_ok=True)
                continue
            self._begin(announcement)

    def add(self, url: str, body: str) -> None:
        """Deliver a message in the background; it survives a restart from now on."""
        announcement = Announcement(id=token_hex(16), url=url, body=body)
        try:
            self._save(announcement)
        except OSError as error:  # on a full disk it is delivered all the same
            logger.error("the webhook %s cannot be saved: %s", announcement.id, error)
        self._begin(announcement)

    async def stop(self) -> None:
        """Stop; the next process continues."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, announcement: Announcement) -> None:
        task = asyncio.create_task(self._deliver(announcement))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _path(self, announcement: Announcement) -> Path:
        return self._folder / f"{announcement.id}.json"

    def _save(self, announcement: Announcement) -> None:
        path = self._path(announcement)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(announcement)), "utf-8")
        partial.replace(path)

    async def _deliver(self, announcement: Announcement) -> None:
        """Try until the receiver accepts the message, or for the last time."""
        while True:
            async with self._turn:
                problem = await self._attempt(announcement)
            announcement = replace(announcement, attempts=announcement.attempts + 1)
            if not problem or announcement.attempts > len(self.delays):
                break
            with suppress(OSError):
                self._save(announcement)
            await anyio.sleep(self.delays[announcement.attempts - 1])
            self.counts["retried"] += 1
        self.counts["failed" if problem else "delivered"] += 1
        if problem:
            logger.warning("webhook %s was not delivered: %s", announcement.id, problem)
        self._path(announcement).unlink(missing_ok=True)

    async def _attempt(self, announcement: Announcement) -> str:
        """Send a message once; return what went wrong, or an empty string."""
        body = announcement.body.encode()
        headers = [
            ("Content-Type", "application/json"),
            ("X-Demucs-Delivery", announcement.id),
            ("X-Demucs-Signature", sign(self._secret, body, int(time.time()))),
        ]
        try:
            with anyio.fail_after(_ATTEMPT_SECONDS):
                url = parse_url(announcement.url)
                status = await self._client.send_body("POST", url, headers, len(body), _once(body))
        except TimeoutError:
            return f"no response within {_ATTEMPT_SECONDS:g} s"
        except (RemoteError, UrlRefusedError, ValueError) as error:
            return str(error)
        return "" if 200 <= status < 300 else f"status {status}"


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def sign(secret: bytes, body: bytes, seconds: int) -> str:
    """Return the value of `X-Demucs-Signature` for a message that is sent at a time."""
    digest = hmac.new(secret, b"%d." % seconds + body, hashlib.sha256).hexdigest()
    return f"t={seconds},v1={digest}"
