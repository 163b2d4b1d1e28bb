"""Download a file over HTTP, hash it on arrival, and give it its final name when it is complete.

Only `urllib` is used, so that listing and downloading models needs no HTTP package.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, Protocol

from filelock import FileLock

from demucs_infer.checkpoints.mistaken_files import describe_mistaken_file
from demucs_infer.errors import DownloadError
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.durability import make_folder, rename_file, sync_file
from demucs_infer.system.process_lock import NO_LOCKS
from demucs_infer.system.progress_bars import choose_bar_class

Progress = Callable[[int, "int | None"], None]
"""Callback `(received bytes, total bytes)`; the total is `None` if the server does not send it."""

ATTEMPTS = 4
"""Tries per URL; each resumes where the previous one was cut off."""

MAX_BYTES = 8 * 2**30
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 2**18
_USER_AGENT = "demucs-infer"
_CONNECTION_ERRORS = (OSError, http.client.HTTPException)  # URLError is an OSError


@dataclass(frozen=True, slots=True)
class DownloadRequest:
    """A file to download."""

    urls: Sequence[str]
    """Addresses of the same file, tried in this order."""
    path: Path
    sha256: str | None = None
    max_bytes: int = MAX_BYTES
    advice: str = ""
    """What to do if the sha256 differs, as the end of a sentence."""


class _RejectedError(Exception):
    """Raised when a URL cannot give the requested file, so that trying it again is pointless."""


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def fetch(request: DownloadRequest, progress: Progress | None = None) -> str:
    """Download `request.path` from the first URL that works, and return its sha256.

    While one process downloads a file, others wait for it and then use it. Raises `DownloadError`
    with the problem of each URL if none works.
    """
    path = request.path
    make_folder(path.parent)
    with hold_lock(path.with_name(path.name + ".lock")) as is_locked:
        if path.exists():
            return sha256_file(path)
        part = partial_path(path, "part", is_locked=is_locked)
        problems = []
        try:
            for url in request.urls:
                try:
                    return _fetch_from(url, part, request, progress or _ignore_progress)
                except _RejectedError as error:
                    problems.append(f"{url}: {error}")
        finally:
            if not is_locked:  # no later download can resume it
                _discard(part)
        raise DownloadError(
            f"{path.name} could not be downloaded ({'; '.join(problems) or 'no URL'}): check the "
            f"network and try again, or copy the file to {path}"
            + (f" (sha256 {request.sha256})" if request.sha256 else "")
        )


@contextmanager
def progress_bar(name: str, *, hidden: bool | None = False) -> Iterator[Progress]:
    """Yield a callback that draws a progress bar on stderr or in a notebook, once data arrives.

    `hidden=None` draws it only on a terminal.
    """
    import tqdm  # imported here as most runs download nothing

    with ExitStack() as stack:
        bars: list[tqdm.tqdm[NoReturn]] = []

        def on_progress(done: int, total: int | None) -> None:
            if not bars:
                text = f"downloading {name}"
                bar_class = choose_bar_class(tqdm)
                bar = bar_class(
                    desc=text, total=total, unit="B", unit_scale=True, disable=hidden, leave=False
                )
                bars.append(stack.enter_context(bar))
            bars[0].total = total
            bars[0].update(done - bars[0].n)

        yield on_progress


def _ignore_progress(done: int, total: int | None) -> None:
    """Do nothing: the default callback."""


def _update_digest(digest: _Hash, file: IO[bytes]) -> None:
    while block := file.read(BLOCK_BYTES):
        digest.update(block)


def _fetch_from(url: str, part: Path, request: DownloadRequest, progress: Progress) -> str:
    """Download from one URL, resuming after each lost connection."""
    for attempt in range(ATTEMPTS):
        try:
            digest = _attempt(url, part, request, progress)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the part is longer than the file on the server
                _discard(part)
            elif error.code < 500 and error.code != 429:
                raise _RejectedError(f"HTTP {error.code} {error.reason}") from error
            last_error: Exception = error
        except _CONNECTION_ERRORS as error:
            last_error = error
        else:
            return _finish(part, digest, request)
        if attempt < ATTEMPTS - 1:
            time.sleep(0.2 * 2**attempt)
    reason = getattr(last_error, "reason", last_error)
    text = getattr(reason, "strerror", None) or str(reason) or type(last_error).__name__
    raise _RejectedError(text) from last_error


def _attempt(url: str, part: Path, request: DownloadRequest, progress: Progress) -> str:
    """Download the rest of `part` over one connection; return the digest of the whole file."""
    done = part.stat().st_size if part.exists() else 0
    etag_path = _etag_path(part)
    http_request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT})
    if done and (etag_path.exists() or request.sha256):
        http_request.add_header("Range", f"bytes={done}-")
        if etag_path.exists():
            http_request.add_header("If-Range", etag_path.read_text("ascii"))
    with _open(http_request) as response:
        if response.status != 206:
            done = 0
        elif _first_byte(response) != done:
            _discard(part)  # so that the next attempt starts from the beginning
            raise ConnectionError(
                f"the server did not send the requested range, which starts at byte {done}"
            )
        total = _total_bytes(response, done)
        if total is not None and total > request.max_bytes:
            raise _RejectedError(f"too large: {total} bytes, the limit is {request.max_bytes}")
        if total is None and request.sha256 is None and not response.chunked:
            raise _RejectedError("the server does not state the size, so a cut would go unnoticed")
        etag = response.headers.get("ETag", "")
        if etag.startswith('"') and etag.isascii():
            etag_path.write_text(etag, "ascii")
        elif not done:
            etag_path.unlink(missing_ok=True)  # this ETag is from another URL
        return _receive(response, part, done, total, request.max_bytes, progress)


def _receive(
    response: http.client.HTTPResponse,
    part: Path,
    done: int,
    total: int | None,
    limit: int,
    progress: Progress,
) -> str:
    digest = hashlib.sha256()
    with part.open("r+b" if done else "w+b") as file:
        _update_digest(digest, file)
        progress(done, total)
        while block := response.read(BLOCK_BYTES):
            file.write(block)
            digest.update(block)
            done += len(block)
            if done > limit:
                raise _RejectedError(f"too large: the limit is {limit} bytes")
            progress(done, total)
    if total is not None and done != total:
        raise ConnectionError(f"the connection was cut after {done} of {total} bytes")
    return digest.hexdigest()


def _finish(part: Path, digest: str, request: DownloadRequest) -> str:
    with part.open("r+b") as file:
        mistake = describe_mistaken_file(file.read(64))
        sync_file(file)  # otherwise a power loss may leave zeros under the final name
    if mistake:
        _discard(part)
        raise _RejectedError(f"the server sent {mistake}")
    if request.sha256 is not None and digest != request.sha256:
        _discard(part)
        problem = f"sha256 mismatch: expected {request.sha256}, got {digest}"
        raise _RejectedError(problem + request.advice)
    rename_file(part, request.path)
    _etag_path(part).unlink(missing_ok=True)
    return digest


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _etag_path(part).unlink(missing_ok=True)


def _etag_path(part: Path) -> Path:
    """Return the path of a part's ETag, which shows if the server has another version now."""
    return part.with_name(part.name + ".etag")


def _match_range(response: http.client.HTTPResponse) -> re.Match[str] | None:
    return re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))


def _first_byte(response: http.client.HTTPResponse) -> int | None:
    match = _match_range(response)
    return int(match[1]) if match else None


def _total_bytes(response: http.client.HTTPResponse, done: int) -> int | None:
    """Return the size of the whole file, or `None` if the server does not send it."""
    match = _match_range(response) if response.status == 206 else None
    if match and match[2] != "*":
        return int(match[2])
    length = response.headers.get("Content-Length", "")
    return done + int(length) if length.isdigit() else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirections, except those from https to plain http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.type == "https" and urllib.parse.urlsplit(newurl).scheme != "https":
            raise _RejectedError(f"redirection from https to {newurl} refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Open an http or https URL, through the proxies that environment variables name."""
    if request.type not in ("http", "https"):
        raise _RejectedError("only http and https URLs are supported")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_SECONDS)
    return response


@contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Lock a file against other processes; yield whether this succeeded.

    The system releases the lock if this process dies. On a file system without locks (some NFS
    servers), this warns and yields `False`: the caller must then write to a unique path.
    """
    lock = FileLock(path)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"cannot lock {path} ({error.strerror}): continuing without a lock, so several "
            "processes may download the same file",
            stacklevel=5,
        )
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def partial_path(path: Path, suffix: str, *, is_locked: bool) -> Path:
    """Return the path for an incomplete version of `path`, which is unique without a lock."""
    unique = "" if is_locked else f".{uuid.uuid4().hex}"
    return path.with_name(f"{path.name}{unique}.{suffix}")
