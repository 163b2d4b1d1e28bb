"""Test downloads from a server with faults: they give the right bytes, or no file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.checkpoints import download
from demucs_infer.checkpoints.download import DownloadRequest, fetch
from demucs_infer.errors import DownloadError
from demucs_infer.system.checksum import sha256_file

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Behavior:
    """Faults of the server, and the requests it received."""

    cuts: list[int] = field(default_factory=list)
    """Bytes after which to close the connection, for each of the next responses."""
    codes: list[int] = field(default_factory=list)
    ranges: bool = True
    slip: int = 0
    """Offset of a partial response from the requested byte."""
    span: int | None = None
    """Maximum size of a partial response."""
    etag: str | None = '"one"'
    content: bytes = CONTENT
    has_length: bool = True
    redirect: str | None = None
    requests: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        behavior: Behavior = self.server.behavior  # type: ignore[attr-defined]
        behavior.requests.append(
            {"path": self.path, **{k.lower(): v for k, v in self.headers.items()}}
        )
        if behavior.codes:
            self.send_error(behavior.codes.pop(0))
            return
        if behavior.redirect:
            self.send_response(302)
            self.send_header("Location", behavior.redirect)
            self.end_headers()
            return
        self.send_content(behavior)

    def send_content(self, behavior: Behavior) -> None:
        content, start = behavior.content, 0
        wanted = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if wanted and behavior.ranges and condition in (None, behavior.etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + behavior.slip
            if start >= len(content):
                self.send_error(416)
                return
            whole = len(content)
            content = content[: start + behavior.span] if behavior.span else content
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{whole}")
        else:
            self.send_response(200)
        if behavior.has_length:
            self.send_header("Content-Length", str(len(content) - start))
        if behavior.etag:
            self.send_header("ETag", behavior.etag)
        self.end_headers()
        cut = behavior.cuts.pop(0) if behavior.cuts else len(content)
        self.wfile.write(content[start : start + cut])


@dataclass
class Server:
    url: str
    behavior: Behavior


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)  # between attempts
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    behavior = Behavior()
    running.behavior = behavior  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield Server(f"http://127.0.0.1:{running.server_port}/x.th", behavior)
    running.shutdown()
    thread.join()
    running.server_close()


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_file_is_downloaded_with_progress(tmp_path: Path, server: Server) -> None:
    seen: list[tuple[int, int | None]] = []
    wanted = DownloadRequest([server.url], tmp_path / "deep" / "x.th", DIGEST)
    assert fetch(wanted, lambda done, total: seen.append((done, total))) == DIGEST
    assert wanted.path.read_bytes() == CONTENT
    assert list_files(wanted.path.parent) == ["x.th"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("digest", [DIGEST, None])
def test_lost_connection_is_resumed(tmp_path: Path, server: Server, digest: str | None) -> None:
    server.behavior.cuts = [400_000, 100_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", digest))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    ranges = [request.get("range") for request in server.behavior.requests]
    assert ranges == [None, "bytes=400000-", "bytes=500000-"]
    assert server.behavior.requests[1]["if-range"] == '"one"'


def test_partial_file_is_resumed_by_the_next_call(tmp_path: Path, server: Server) -> None:
    """Bytes that one process received are not requested again by the next."""
    server.behavior.cuts = [300_000, 0, 0, 0]
    wanted = DownloadRequest([server.url], tmp_path / "x.th", DIGEST)
    with pytest.raises(DownloadError, match="cut after 300000 of 1024000"):
        fetch(wanted)
    assert not wanted.path.exists()
    server.behavior.requests.clear()
    fetch(wanted)
    assert wanted.path.read_bytes() == CONTENT
    assert [request.get("range") for request in server.behavior.requests] == ["bytes=300000-"]
    assert list_files(tmp_path) == ["x.th"]


def test_changed_file_is_downloaded_from_its_start(tmp_path: Path, server: Server) -> None:
    server.behavior.cuts = [300_000, 0, 0, 0]
    server.behavior.content = CONTENT[::-1]
    wanted = DownloadRequest([server.url], tmp_path / "x.th")
    with pytest.raises(DownloadError):
        fetch(wanted)
    server.behavior.content, server.behavior.etag = CONTENT, '"two"'
    fetch(wanted)
    assert wanted.path.read_bytes() == CONTENT


def test_server_without_ranges_sends_the_whole_file_again(tmp_path: Path, server: Server) -> None:
    server.behavior.ranges, server.behavior.etag = False, None
    server.behavior.cuts = [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert (tmp_path / "x.th").read_bytes() == CONTENT


@pytest.mark.parametrize("digest", [DIGEST, None])
@pytest.mark.parametrize("slip", [-7, 7])
def test_wrong_range_of_a_response_is_discarded(
    tmp_path: Path, server: Server, slip: int, digest: str | None
) -> None:
    server.behavior.slip, server.behavior.cuts = slip, [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", digest))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    ranges = [request.get("range") for request in server.behavior.requests]
    assert ranges == [None, "bytes=300000-", None]


def test_range_that_ends_early_is_continued(tmp_path: Path, server: Server) -> None:
    server.behavior.span, server.behavior.cuts = 400_000, [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th"))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    ranges = [request.get("range") for request in server.behavior.requests]
    assert ranges == [None, "bytes=300000-", "bytes=700000-"]


def test_etag_is_not_sent_to_another_url(tmp_path: Path, server: Server) -> None:
    wanted = DownloadRequest([server.url], tmp_path / "x.th")
    for etag, content in (('"one"', CONTENT), (None, CONTENT[::-1])):
        server.behavior.etag, server.behavior.content = etag, content
        server.behavior.cuts = [300_000, 0, 0, 0]
        with pytest.raises(DownloadError):
            fetch(wanted)
    server.behavior.etag, server.behavior.content = '"one"', CONTENT
    fetch(wanted)
    assert wanted.path.read_bytes() == CONTENT


def test_download_without_digest_or_etag_is_not_resumed(tmp_path: Path, server: Server) -> None:
    """Halves of two different files could not be told from a whole one."""
    server.behavior.etag = None
    server.behavior.cuts = [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th"))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    assert [request.get("range") for request in server.behavior.requests] == [None, None]


def test_partial_file_longer_than_the_file_is_discarded(tmp_path: Path, server: Server) -> None:
    (tmp_path / "x.th.part").write_bytes(bytes(len(CONTENT) + 5))
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert (tmp_path / "x.th").read_bytes() == CONTENT


def test_file_with_wrong_digest_is_deleted(tmp_path: Path, server: Server) -> None:
    server.behavior.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match=f"expected {DIGEST}"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert list_files(tmp_path) == []


def test_next_url_is_tried_after_an_error(tmp_path: Path, server: Server) -> None:
    """An error of the mirror leads to the original."""
    server.behavior.codes = [404]
    urls = [server.url + "?mirror", server.url]
    fetch(DownloadRequest(urls, tmp_path / "x.th", DIGEST))
    assert [request["path"] for request in server.behavior.requests] == ["/x.th?mirror", "/x.th"]


def test_temporary_http_errors_are_retried(tmp_path: Path, server: Server) -> None:
    server.behavior.codes = [503, 429, 500]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert len(server.behavior.requests) == 4


def test_error_lists_the_problem_of_each_url(tmp_path: Path, server: Server) -> None:
    server.behavior.codes = [404, 403]
    with pytest.raises(DownloadError) as caught:
        fetch(DownloadRequest([server.url + "?a", server.url + "?b"], tmp_path / "x.th", DIGEST))
    message = str(caught.value)
    assert all(part in message for part in ("?a", "404", "?b", "403", DIGEST, str(tmp_path)))


@pytest.mark.parametrize("has_length", [True, False])
def test_file_above_the_size_limit_is_refused(
    tmp_path: Path, server: Server, has_length: bool
) -> None:
    server.behavior.has_length = has_length
    with pytest.raises(DownloadError, match="the limit is 1000"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST, max_bytes=1000))
    assert not (tmp_path / "x.th").exists()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_schemes_other_than_http_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http and https"):
        fetch(DownloadRequest([url], tmp_path / "x.th"))


def test_redirection_to_a_file_is_refused(tmp_path: Path, server: Server) -> None:
    server.behavior.redirect = "file:///etc/hostname"
    with pytest.raises(DownloadError):
        fetch(DownloadRequest([server.url], tmp_path / "x.th"))
    assert list_files(tmp_path) == []


def test_redirection_is_followed(tmp_path: Path, server: Server) -> None:
    class Once(Handler):
        def do_GET(self) -> None:
            behavior: Behavior = self.server.behavior  # type: ignore[attr-defined]
            if "?moved" in self.path:
                self.send_response(302)
                self.send_header("Location", server.url)
                self.end_headers()
            else:
                self.send_content(behavior)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Once)
    running.behavior = server.behavior  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{running.server_port}/x.th?moved"
    try:
        fetch(DownloadRequest([url], tmp_path / "x.th", DIGEST))
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
    assert (tmp_path / "x.th").read_bytes() == CONTENT


def test_proxy_of_the_environment_is_used(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server acts as a proxy: it receives the full URL of a host that does not exist."""
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/x.th"))
    monkeypatch.delenv("no_proxy", raising=False)
    fetch(DownloadRequest(["http://weights.invalid/x.th"], tmp_path / "x.th", DIGEST))
    assert server.behavior.requests[0]["path"] == "http://weights.invalid/x.th"


def test_exception_of_the_progress_callback_stops_the_download(
    tmp_path: Path, server: Server
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int | None) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST), stop)
    assert not (tmp_path / "x.th").exists()
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert sha256_file(tmp_path / "x.th") == DIGEST


FETCH = """
import sys
from pathlib import Path
from demucs_infer.checkpoints.download import DownloadRequest, fetch
assert fetch(DownloadRequest([sys.argv[1]], Path(sys.argv[2]), sys.argv[3])) == sys.argv[3]
assert "torch" not in sys.modules
"""


def test_two_processes_download_a_file_once(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "x.th"
    command = [sys.executable, "-c", FETCH, server.url, str(path), DIGEST]
    both = [subprocess.Popen(command, env=dict(os.environ)) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert path.read_bytes() == CONTENT
    assert len(server.behavior.requests) == 1
    assert list_files(tmp_path) == ["x.th"]


def test_lock_of_a_dead_process_is_released(tmp_path: Path, server: Server) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from demucs_infer.checkpoints.download import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): os._exit(9)"
    )
    lock = tmp_path / "x.th.lock"
    done: Any = subprocess.run([sys.executable, "-c", code, str(lock)], check=False)
    assert done.returncode == 9
    assert lock.exists()
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))


@pytest.fixture(params=["ENOLCK", "ENOTSUP", "ENOSYS"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail every lock call, as some network file systems do."""
    number = getattr(errno, request.param)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.usefixtures("no_locks")
def test_download_works_on_file_system_without_locks(tmp_path: Path, server: Server) -> None:
    server.behavior.cuts = [300_000]
    with pytest.warns(UserWarning, match=r"x\.th\.lock|not supported"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    assert list_files(tmp_path) == ["x.th"]


def test_downloads_without_locks_do_not_share_a_partial_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    request = DownloadRequest([server.url], tmp_path / "x.th", DIGEST)
    nested: list[str] = []

    def download_again(done: int, total: int | None) -> None:
        if done and not nested:
            nested.append("running")
            nested.append(fetch(request))

    with pytest.warns(UserWarning, match="No locks available"):
        assert fetch(request, download_again) == DIGEST
    assert nested == ["running", DIGEST]
    assert request.path.read_bytes() == CONTENT
    assert list_files(tmp_path) == ["x.th"]


def test_failed_download_without_locks_leaves_no_partial_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    server.behavior.cuts = [300_000, 0, 0, 0]
    with pytest.warns(UserWarning), pytest.raises(DownloadError, match="cut"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert list_files(tmp_path) == []


def test_other_errors_of_the_lock_are_raised(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
