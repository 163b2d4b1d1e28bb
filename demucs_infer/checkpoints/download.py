"""Fetch one file over HTTP: resumed after a cut, checked as it arrives, complete or not there."""

from __future__ import annotations

import hashlib
import http.client
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, Protocol

from demucs_infer.errors import DownloadError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Progress = Callable[[int, "int | None"], None]
"""Told how many bytes have arrived, of how many (`None`: the server does not say)."""

ATTEMPTS = 4
"""For each address, each going on where the one before was cut."""

MAX_BYTES = 8 * 2**30
TIMEOUT_SECONDS = 30
BLOCK = 2**18
_USER_AGENT = "demucs-infer"
_CUT = (
    OSError,
    http.client.HTTPException,
)  # what a broken connection raises; URLError is an OSError


@dataclass(frozen=True, slots=True)
class DownloadRequest:
    """A file to fetch."""

    urls: Sequence[str]
    """The same bytes at each; tried in this order."""
    path: Path
    sha256: str | None = None
    max_bytes: int = MAX_BYTES


class _RejectedError(Exception):
    """What this address offers is not the file; asking it again will not help."""


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def fetch(wanted: DownloadRequest, progress: Progress | None = None) -> str:
    """Bring `wanted.path` into being, from the first address that has it; returns its sha256.

    Only one process fetches a file at a time: a second one waits, and finds it there.
    """
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with locked(wanted.path.with_name(wanted.path.name + ".lock")):
        if wanted.path.exists():
            return sha256_of(wanted.path)
        problems = []
        for url in wanted.urls:
            try:
                return _fetch_from(url, wanted, progress or _silent)
            except _RejectedError as problem:
                problems.append(f"{url}: {problem}")
        raise DownloadError(
            f"could not download {wanted.path.name}. Tried {'; '.join(problems) or 'no address'}. "
            f"It can also be put by hand to {wanted.path}"
            + (f" (sha256 {wanted.sha256})." if wanted.sha256 else ".")
        )


@contextmanager
def shown(name: str, *, hidden: bool | None = False) -> Iterator[Progress]:
    """A `Progress` with a bar on the error stream, from the first byte that arrives on.

    `hidden` is None for a bar where there is a terminal.
    """
    from tqdm import tqdm  # only for those who wait for a download

    with ExitStack() as stack:
        bars: list[tqdm[NoReturn]] = []

        def arrived(done: int, total: int | None) -> None:
            if not bars:
                text = f"downloading {name}"
                bar = tqdm(desc=text, unit="B", unit_scale=True, disable=hidden, leave=False)
                bars.append(stack.enter_context(bar))
            bars[0].total = total
            bars[0].update(done - bars[0].n)

        yield arrived


def sha256_of(path: Path) -> str:
    """The digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _feed(digest, file)
    return digest.hexdigest()


def _silent(done: int, total: int | None) -> None:
    """Nobody wants to know."""


def _feed(digest: _Hash, file: IO[bytes]) -> None:
    while block := file.read(BLOCK):
        digest.update(block)


def _fetch_from(url: str, wanted: DownloadRequest, progress: Progress) -> str:
    """All of the file from one address, with a new attempt after each cut."""
    part = wanted.path.with_name(wanted.path.name + ".part")
    for attempt in range(ATTEMPTS):
        try:
            digest = _attempt(url, part, wanted, progress)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the part is not a beginning of what is there now
                _discard(part)
            elif error.code < 500 and error.code != 429:
                raise _RejectedError(f"HTTP {error.code} {error.reason}") from error
            cut: Exception = error
        except _CUT as error:
            cut = error
        else:
            return _finish(part, digest, wanted)
        if attempt < ATTEMPTS - 1:
            time.sleep(0.2 * 2**attempt)
    raise _RejectedError(str(getattr(cut, "reason", cut)) or type(cut).__name__) from cut


def _attempt(url: str, part: Path, wanted: DownloadRequest, progress: Progress) -> str:
    """What one connection brings, added to `part`; the digest of the whole."""
    done = part.stat().st_size if part.exists() else 0
    tag = _tag_file(part)
    request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT})
    if done and (tag.exists() or wanted.sha256):
        request.add_header("Range", f"bytes={done}-")
        if tag.exists():
            request.add_header("If-Range", tag.read_text("ascii"))
    with _open(request) as answer:
        if answer.status != 206:
            done = 0
        elif _first_byte(answer) != done:
            _discard(part)  # so that the next attempt asks for all of it
            raise ConnectionError(f"asked from byte {done} on, it sent another part of the file")
        total = _total(answer, done)
        if total is not None and total > wanted.max_bytes:
            raise _RejectedError(f"it is {total} bytes, more than the {wanted.max_bytes} allowed")
        etag = answer.headers.get("ETag", "")
        if etag.startswith('"') and etag.isascii():
            tag.write_text(etag, "ascii")
        elif not done:
            tag.unlink(missing_ok=True)  # it named what another address sent
        return _receive(answer, part, done, total, wanted.max_bytes, progress)


def _receive(
    answer: http.client.HTTPResponse,
    part: Path,
    done: int,
    total: int | None,
    limit: int,
    progress: Progress,
) -> str:
    digest = hashlib.sha256()
    with part.open("r+b" if done else "w+b") as file:
        _feed(digest, file)
        progress(done, total)
        while block := answer.read(BLOCK):
            file.write(block)
            digest.update(block)
            done += len(block)
            if done > limit:
                raise _RejectedError(f"it is more than the {limit} bytes allowed")
            progress(done, total)
    if total is not None and done != total:
        raise ConnectionError(f"the connection was cut after {done} of {total} bytes")
    return digest.hexdigest()


def _finish(part: Path, digest: str, wanted: DownloadRequest) -> str:
    if wanted.sha256 is not None and digest != wanted.sha256:
        _discard(part)
        raise _RejectedError(f"what it sends has the sha256 {digest} and not {wanted.sha256}")
    part.replace(wanted.path)
    _tag_file(part).unlink(missing_ok=True)
    return digest


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)


def _tag_file(part: Path) -> Path:
    """Where the server's name for this version of the file is kept, to go on with the same one."""
    return part.with_name(part.name + ".etag")


def _range(answer: http.client.HTTPResponse) -> re.Match[str] | None:
    return re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))


def _first_byte(answer: http.client.HTTPResponse) -> int | None:
    found = _range(answer)
    return int(found[1]) if found else None


def _total(answer: http.client.HTTPResponse, done: int) -> int | None:
    """Bytes of the whole file: a part may end before the file does."""
    found = _range(answer) if answer.status == 206 else None
    if found and found[2] != "*":
        return int(found[2])
    length = answer.headers.get("Content-Length", "")
    return done + int(length) if length.isdigit() else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirections, but none that would leave an encrypted connection."""

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
            raise _RejectedError(f"it leads from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Ask over http or https alone; proxies and certificates as the environment has them."""
    if request.type not in ("http", "https"):
        raise _RejectedError("only http and https addresses are used")
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
    answer: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_SECONDS)
    return answer


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; the system lets go of it whatever happens to us."""
    with path.open("a+b") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        else:
            while True:  # it gives up after ten seconds
                with suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
            yield  # closing the file unlocks it
