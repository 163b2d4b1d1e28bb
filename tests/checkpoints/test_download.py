"""Downloads against a server that cuts, lies and stalls: the right bytes, or no file."""

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
class Behaviour:
    """What the server does next, and what it was asked."""

    cuts: list[int] = field(default_factory=list)
    """After how many bytes to hang up, one for each of the next answers."""
    codes: list[int] = field(default_factory=list)
    ranges: bool = True
    slip: int = 0
    """How far behind the byte that was asked for an answer begins."""
    span: int | None = None
    """The longest part that is sent at once."""
    etag: str | None = '"one"'
    content: bytes = CONTENT
    has_length: bool = True
    redirect: str | None = None
    asked: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        behaviour: Behaviour = self.server.behaviour  # type: ignore[attr-defined]
        behaviour.asked.append(
            {"path": self.path, **{k.lower(): v for k, v in self.headers.items()}}
        )
        if behaviour.codes:
            self.send_error(behaviour.codes.pop(0))
            return
        if behaviour.redirect:
            self.send_response(302)
            self.send_header("Location", behaviour.redirect)
            self.end_headers()
            return
        self.answer(behaviour)

    def answer(self, behaviour: Behaviour) -> None:
        content, start = behaviour.content, 0
        wanted = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if wanted and behaviour.ranges and condition in (None, behaviour.etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + behaviour.slip
            if start >= len(content):
                self.send_error(416)
                return
            whole = len(content)
            content = content[: start + behaviour.span] if behaviour.span else content
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{whole}")
        else:
            self.send_response(200)
        if behaviour.has_length:
            self.send_header("Content-Length", str(len(content) - start))
        if behaviour.etag:
            self.send_header("ETag", behaviour.etag)
        self.end_headers()
        cut = behaviour.cuts.pop(0) if behaviour.cuts else len(content)
        self.wfile.write(content[start : start + cut])


@dataclass
class Server:
    url: str
    behaviour: Behaviour


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)  # between attempts
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    behaviour = Behaviour()
    running.behaviour = behaviour  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield Server(f"http://127.0.0.1:{running.server_port}/x.th", behaviour)
    running.shutdown()
    thread.join()
    running.server_close()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_file_arrives(tmp_path: Path, server: Server) -> None:
    seen: list[tuple[int, int | None]] = []
    wanted = DownloadRequest([server.url], tmp_path / "deep" / "x.th", DIGEST)
    assert fetch(wanted, lambda done, total: seen.append((done, total))) == DIGEST
    assert wanted.path.read_bytes() == CONTENT
    assert left(wanted.path.parent) == ["x.th"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("digest", [DIGEST, None])
def test_a_cut_is_resumed(tmp_path: Path, server: Server, digest: str | None) -> None:
    server.behaviour.cuts = [400_000, 100_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", digest))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    ranges = [asked.get("range") for asked in server.behaviour.asked]
    assert ranges == [None, "bytes=400000-", "bytes=500000-"]
    assert server.behaviour.asked[1]["if-range"] == '"one"'


def test_a_cut_is_resumed_by_another_call(tmp_path: Path, server: Server) -> None:
    """What one process got is not asked for again by the next."""
    server.behaviour.cuts = [300_000, 0, 0, 0]
    wanted = DownloadRequest([server.url], tmp_path / "x.th", DIGEST)
    with pytest.raises(DownloadError, match="cut after 300000 of 1024000"):
        fetch(wanted)
    assert not wanted.path.exists()
    server.behaviour.asked.clear()
    fetch(wanted)
    assert wanted.path.read_bytes() == CONTENT
    assert [asked.get("range") for asked in server.behaviour.asked] == ["bytes=300000-"]
    assert left(tmp_path) == ["x.th"]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(
    tmp_path: Path, server: Server
) -> None:
    server.behaviour.cuts = [300_000, 0, 0, 0]
    server.behaviour.content = CONTENT[::-1]
    wanted = DownloadRequest([server.url], tmp_path / "x.th")
    with pytest.raises(DownloadError):
        fetch(wanted)
    server.behaviour.content, server.behaviour.etag = CONTENT, '"two"'
    fetch(wanted)
    assert wanted.path.read_bytes() == CONTENT


def test_a_server_without_ranges_is_asked_again(tmp_path: Path, server: Server) -> None:
    server.behaviour.ranges, server.behaviour.etag = False, None
    server.behaviour.cuts = [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert (tmp_path / "x.th").read_bytes() == CONTENT


@pytest.mark.parametrize("digest", [DIGEST, None])
@pytest.mark.parametrize("slip", [-7, 7])
def test_another_part_than_was_asked_for_is_not_used(
    tmp_path: Path, server: Server, slip: int, digest: str | None
) -> None:
    server.behaviour.slip, server.behaviour.cuts = slip, [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", digest))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    ranges = [asked.get("range") for asked in server.behaviour.asked]
    assert ranges == [None, "bytes=300000-", None]


def test_a_part_that_ends_early_is_not_the_file(tmp_path: Path, server: Server) -> None:
    server.behaviour.span, server.behaviour.cuts = 400_000, [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th"))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    ranges = [asked.get("range") for asked in server.behaviour.asked]
    assert ranges == [None, "bytes=300000-", "bytes=700000-"]


def test_the_tag_of_one_address_is_not_taken_for_that_of_another(
    tmp_path: Path, server: Server
) -> None:
    wanted = DownloadRequest([server.url], tmp_path / "x.th")
    for etag, content in (('"one"', CONTENT), (None, CONTENT[::-1])):
        server.behaviour.etag, server.behaviour.content = etag, content
        server.behaviour.cuts = [300_000, 0, 0, 0]
        with pytest.raises(DownloadError):
            fetch(wanted)
    server.behaviour.etag, server.behaviour.content = '"one"', CONTENT
    fetch(wanted)
    assert wanted.path.read_bytes() == CONTENT


def test_without_digest_or_tag_nothing_is_resumed(tmp_path: Path, server: Server) -> None:
    """Two halves of two files would go unnoticed."""
    server.behaviour.etag = None
    server.behaviour.cuts = [300_000]
    fetch(DownloadRequest([server.url], tmp_path / "x.th"))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    assert [asked.get("range") for asked in server.behaviour.asked] == [None, None]


def test_a_part_that_is_too_long_is_thrown_away(tmp_path: Path, server: Server) -> None:
    (tmp_path / "x.th.part").write_bytes(bytes(len(CONTENT) + 5))
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert (tmp_path / "x.th").read_bytes() == CONTENT


def test_the_wrong_bytes_leave_nothing(tmp_path: Path, server: Server) -> None:
    server.behaviour.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match=f"expected {DIGEST}"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert left(tmp_path) == []


def test_the_next_address_is_tried(tmp_path: Path, server: Server) -> None:
    """Four failures at the first mirror's, two different kinds; then the original."""
    server.behaviour.codes = [404]
    urls = [server.url + "?mirror", server.url]
    fetch(DownloadRequest(urls, tmp_path / "x.th", DIGEST))
    assert [asked["path"] for asked in server.behaviour.asked] == ["/x.th?mirror", "/x.th"]


def test_a_tired_server_is_asked_again(tmp_path: Path, server: Server) -> None:
    server.behaviour.codes = [503, 429, 500]
    fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert len(server.behaviour.asked) == 4


def test_all_that_failed_is_in_the_error(tmp_path: Path, server: Server) -> None:
    server.behaviour.codes = [404, 403]
    with pytest.raises(DownloadError) as caught:
        fetch(DownloadRequest([server.url + "?a", server.url + "?b"], tmp_path / "x.th", DIGEST))
    message = str(caught.value)
    assert all(part in message for part in ("?a", "404", "?b", "403", DIGEST, str(tmp_path)))


@pytest.mark.parametrize("has_length", [True, False])
def test_too_much_is_refused(tmp_path: Path, server: Server, has_length: bool) -> None:
    server.behaviour.has_length = has_length
    with pytest.raises(DownloadError, match="more than the 1000"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST, max_bytes=1000))
    assert not (tmp_path / "x.th").exists()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_only_the_web_is_asked(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http and https"):
        fetch(DownloadRequest([url], tmp_path / "x.th"))


def test_a_redirection_does_not_lead_out_of_the_web(tmp_path: Path, server: Server) -> None:
    server.behaviour.redirect = "file:///etc/hostname"
    with pytest.raises(DownloadError):
        fetch(DownloadRequest([server.url], tmp_path / "x.th"))
    assert left(tmp_path) == []


def test_a_redirection_is_followed(tmp_path: Path, server: Server) -> None:
    class Once(Handler):
        def do_GET(self) -> None:
            behaviour: Behaviour = self.server.behaviour  # type: ignore[attr-defined]
            if "?moved" in self.path:
                self.send_response(302)
                self.send_header("Location", server.url)
                self.end_headers()
            else:
                self.answer(behaviour)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Once)
    running.behaviour = server.behaviour  # type: ignore[attr-defined]
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


def test_the_proxy_of_the_environment_is_used(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stands in for a proxy: it is sent the whole address of a host that is not."""
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/x.th"))
    monkeypatch.delenv("no_proxy", raising=False)
    fetch(DownloadRequest(["http://weights.invalid/x.th"], tmp_path / "x.th", DIGEST))
    assert server.behaviour.asked[0]["path"] == "http://weights.invalid/x.th"


def test_a_caller_can_stop_it(tmp_path: Path, server: Server) -> None:
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


def test_two_processes_fetch_it_once(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "x.th"
    command = [sys.executable, "-c", FETCH, server.url, str(path), DIGEST]
    both = [subprocess.Popen(command, env=dict(os.environ)) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert path.read_bytes() == CONTENT
    assert len(server.behaviour.asked) == 1
    assert left(tmp_path) == ["x.th"]


def test_a_dead_process_does_not_keep_its_lock(tmp_path: Path, server: Server) -> None:
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
    server.behaviour.cuts = [300_000]
    with pytest.warns(UserWarning, match=r"x\.th\.lock|not supported"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert (tmp_path / "x.th").read_bytes() == CONTENT
    assert left(tmp_path) == ["x.th"]


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
    assert left(tmp_path) == ["x.th"]


def test_failed_download_without_locks_leaves_no_partial_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    server.behaviour.cuts = [300_000, 0, 0, 0]
    with pytest.warns(UserWarning), pytest.raises(DownloadError, match="cut"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
    assert left(tmp_path) == []


def test_other_errors_of_the_lock_are_raised(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fetch(DownloadRequest([server.url], tmp_path / "x.th", DIGEST))
