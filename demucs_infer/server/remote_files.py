"""Download tracks from, and copy stems to, URLs that clients name and the operator allows."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
from anyio import to_thread
from starlette.requests import ClientDisconnect, Request

from demucs_infer.errors import is_disk_full
from demucs_infer.server.admission import UploadPlace
from demucs_infer.server.cache import MANIFEST, CachedStems
from demucs_infer.server.errors import ApiError, from_exception
from demucs_infer.server.http_client import HttpClient, RemoteError, UrlRefusedError
from demucs_infer.server.schemas import REMOTE_FIELDS
from demucs_infer.server.settings import ServerSettings
from demucs_infer.server.uploads import Upload, UploadWriter
from demucs_infer.server.urls import AllowedPrefixes, RemoteUrl, parse_url
from demucs_infer.system import storage

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 3
_RESOLVE_SECONDS = 5.0
_SETTINGS = {"url": "allowed_inputs", "output": "allowed_outputs", "webhook": "allowed_webhooks"}
_FILE_NAME = re.compile(r"[^\x00-\x1f\\/?#*%]+")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class JobTargets:
    """Where the stems of a job are copied to, and where its end is announced."""

    output: str = ""
    webhook: str = ""


NO_TARGETS = JobTargets()


class RemoteFiles:
    """The URLs that clients may name, and the files there."""

    def __init__(self, settings: ServerSettings) -> None:
        self.clients = {
            field: HttpClient(AllowedPrefixes.parse(getattr(settings, name)))
            for field, name in _SETTINGS.items()
        }
        """The client for each of the fields in `REMOTE_FIELDS`."""

        self._max_seconds = settings.upload_seconds

    def check(self, field: str, text: str) -> RemoteUrl:
        """Return the URL in a field of a request; raise `ApiError` if it is not allowed."""
        allowed, setting = self.clients[field].allowed, _SETTINGS[field]
        if not allowed:
            raise ApiError(
                "url_not_allowed",
                f"{field}: the operator of this server allows no URLs here ({setting} is empty)",
            )
        try:
            url = parse_url(text)
        except ValueError as error:
            raise ApiError("invalid_url", f"{field}: {error}") from error
        if field == "webhook" and url.is_store:
            raise ApiError("invalid_url", f"{field}: scheme {url.scheme}: expected https")
        if not allowed.allow(url):
            raise ApiError(
                "url_not_allowed",
                f"{field}: not below one of the prefixes that the operator allows ({setting})",
            )
        return url

    def read_targets(self, fields: Mapping[str, Any]) -> JobTargets:
        """Return the checked `output` and `webhook` of a request."""
        targets = {}
        for name in ("output", "webhook"):
            text = fields.get(name) or ""
            if name == "output" and text:
                text = f"{text.rstrip('/')}/"  # a folder
                if self.check(name, text).query:
                    raise ApiError("invalid_url", "output: a folder, which has no query")
            targets[name] = str(self.check(name, text)) if text else ""
        return JobTargets(**targets)

    # ── inputs ──

    async def check_input(self, text: str) -> RemoteUrl:
        """Return the URL of a track; raise `ApiError` for what can be refused before a download.

        The download checks everything again: a name may have other addresses by then.
        """
        url = self.check("url", text)
        if not url.is_store:
            with anyio.move_on_after(_RESOLVE_SECONDS):  # then the download will tell
                await _call("url", url, partial(self.clients["url"].check_host, url))
        return url

    async def download(
        self,
        text: str,
        place: UploadPlace,
        writer: UploadWriter,
        *,
        request: Request | None = None,
        on_progress: Callable[[int, int | None], None] = lambda _, __: None,
    ) -> Upload:
        """Return the track at a URL, within the limits of an upload.

        Raises `ApiError` if it cannot be downloaded, or if the client of `request` disconnects
        meanwhile. `on_progress` is called with the bytes received, and with those of the whole
        track, or None if the other server does not state them.
        """
        url = self.check("url", text)
        total: int | None = None

        def check_size(size: int) -> None:
            nonlocal total
            writer.expect(size)
            total = size

        def receive(data: bytes) -> None:
            place.receive(len(data))
            writer.write(data)
            on_progress(writer.size, total)

        async def copy() -> None:
            with place.limit_time():
                if url.is_store:
                    await _read_object(url, receive, check_size)
                else:
                    await self.clients["url"].get(url, receive, check_size)

        await _call("url", url, partial(_unless_disconnected, request, copy) if request else copy)
        return writer.finish(url.file_name)

    # ── outputs ──

    async def upload(self, stems: CachedStems, text: str) -> None:
        """Copy stems to a folder, the manifest last; raise `ApiError` if that fails."""
        folder = self.check("output", text)
        for stem in stems.stems:
            await self._put(folder, stem.path.name, stem.path)
        manifest = json.dumps(stems.public_manifest(), indent=2, ensure_ascii=False) + "\n"
        await self._put(folder, MANIFEST, manifest.encode())

    async def _put(self, folder: RemoteUrl, name: str, content: Path | bytes) -> None:
        if not _FILE_NAME.fullmatch(name):
            raise ApiError("output_failed", f"output: {name!r} cannot be part of a URL")
        url = self.check("output", f"{folder}{name if folder.is_store else quote(name, safe='')}")
        for attempt in range(_ATTEMPTS):
            try:
                with anyio.fail_after(self._max_seconds):
                    await _call("output", url, partial(self._put_once, url, content))
                return
            except (ApiError, TimeoutError) as error:
                if attempt == _ATTEMPTS - 1 or getattr(error, "code", "") == "url_not_allowed":
                    raise ApiError("output_failed", str(error) or "output: too slow") from error
            await anyio.sleep(4**attempt)

    async def _put_once(self, url: RemoteUrl, content: Path | bytes) -> None:
        if url.is_store:
            if isinstance(content, Path):
                await _run(storage.upload, content, str(url))
            else:
                await _run(storage.write_text, str(url), content.decode())
            return
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        status = await self.clients["output"].send_body("PUT", url, [], size, _iter_blocks(content))
        if not 200 <= status < 300:
            raise RemoteError(f"its server responded with {status}")


def pop_remote_fields(fields: dict[str, Any], *allowed: str) -> dict[str, str]:
    """Remove and return the fields that are URLs; raise `ApiError` for one that is not allowed."""
    popped = {name: fields.pop(name) for name in REMOTE_FIELDS if name in fields}
    for name, text in popped.items():
        if not isinstance(text, str):
            raise ApiError("invalid_url", f"{name}: expected a URL")
        if text and name not in allowed:
            raise ApiError("invalid_parameters", f"{name}: possible for jobs only")
    return {name: text for name, text in popped.items() if text}


async def _call(field: str, url: RemoteUrl, work: Callable[[], Awaitable[None]]) -> None:
    """Await a transfer; raise `ApiError` if it fails for whatever reason."""
    try:
        await work()
    except (ApiError, TimeoutError):
        raise
    except UrlRefusedError as error:
        raise ApiError("url_not_allowed", f"{field}: {error}") from error
    except RemoteError as error:
        raise ApiError("remote_failed", f"{field}: {error}") from error
    except FileNotFoundError as error:
        raise ApiError("remote_failed", f"{field}: there is no such file") from error
    except Exception as error:  # the drivers of stores raise errors of their own
        if is_disk_full(error):
            raise
        logger.warning("%s %s://%s failed: %s", field, url.scheme, url.authority, error)
        message = f"{field}: the store cannot be used: see the server log"
        raise ApiError("remote_failed", message) from error


async def _unless_disconnected(request: Request, work: Callable[[], Awaitable[None]]) -> None:
    """Await `work`, but cancel it and raise `ApiError` if the client disconnects."""
    with anyio.CancelScope() as scope:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await work()
        finally:
            watcher.cancel()
    if scope.cancelled_caught:
        raise from_exception(ClientDisconnect(), "the client disconnected during the download")


async def _run(function: Callable[..., _Value], *arguments: object) -> _Value:
    """Call a function that blocks; if its time is up, it is left alone to end by itself."""
    return await to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


async def _read_object(
    url: RemoteUrl, receive: Callable[[bytes], None], on_size: Callable[[int], None]
) -> None:
    """Pass an object of a store to `receive`, block by block, after its size to `on_size`."""
    with ExitStack() as stack:
        file = await _run(stack.enter_context, storage.open_binary(str(url), _BLOCK_BYTES))
        size = getattr(file, "size", None)  # of fsspec's buffered files
        if isinstance(size, int):
            on_size(size)
        while data := await _run(file.read, _BLOCK_BYTES):
            receive(data)


async def _iter_blocks(content: Path | bytes) -> AsyncIterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    async with await anyio.open_file(content, "rb") as file:
        while data := await file.read(_BLOCK_BYTES):
            yield data
