"""Clients that are silent, slow or many: a server process stays reachable and keeps its limits."""

import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPResponse
from pathlib import Path

import pytest

from tests.helpers.server_process import FAST, Server, run_server, song, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")

HEADER_SECONDS = 3


@pytest.fixture(scope="module")
def server(repo: Path, data: Path) -> Iterator[Server]:
    words = ["--repo", repo, "--models", FAST, "--data-dir", data]
    words += ["--max-queue", 4, "--max-per-client", 3, "--header-seconds", HEADER_SECONDS]
    words += ["--stall-seconds", HEADER_SECONDS]
    with run_server(*map(str, words)) as running:
        yield running


def upload_head(server: Server, length: int = 10_000) -> bytes:
    head = f"POST /v1/separate HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


@pytest.fixture(scope="module", autouse=True)
def stalled_upload(server: Server) -> Iterator[socket.socket]:
    """Begin an upload that stalls, from its own address; its time passes during other tests."""
    with socket.socket() as line:
        line.bind(("127.0.0.99", 0))
        line.connect(("127.0.0.1", server.port))
        line.sendall(upload_head(server) + b"x")
        yield line


def connect(server: Server, stack: ExitStack, data: bytes = b"") -> socket.socket:
    line = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
    line.sendall(data)
    return line


def is_closed(line: socket.socket, seconds: float) -> bool:
    """Return whether the server closes the connection within `seconds`."""
    line.settimeout(seconds)
    with suppress(TimeoutError):
        try:
            while line.recv(65536):
                pass
        except ConnectionError:
            pass
        return True
    return False


def test_silent_connections_do_not_stop_the_server(server: Server) -> None:
    """Health, the page and separations work beside 300 connections that send nothing."""
    with ExitStack() as stack:
        silent = [connect(server, stack) for _ in range(300)]
        for path in ("/livez", "/readyz", "/health", "/"):
            assert server.call("GET", path)[0] == 200
        assert server.call("POST", "/v1/separate?shifts=0", song(0.3, 1))[0] == 200
        assert all(is_closed(line, 2 * HEADER_SECONDS) for line in silent)


def test_more_connections_than_file_descriptors_do_not_stop_health(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as stack:
            for _ in range(min(1500, hard - 200)):
                connect(server, stack)
            assert server.call("GET", "/livez")[0] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_headers_have_a_time_limit_however_slowly_they_arrive(server: Server) -> None:
    with ExitStack() as stack:
        line = connect(server, stack, b"GET /livez HTTP/1.1\r\nX-Slow: ")
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 3 * HEADER_SECONDS:
                line.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - began < 2 * HEADER_SECONDS


def test_client_that_does_not_read_is_disconnected(server: Server) -> None:
    with ExitStack() as stack:
        line = stack.enter_context(socket.socket())
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", server.port))
        request = f"GET /sample.wav HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n".encode()
        line.sendall(request * 40)
        table = Path(f"/proc/{server.process.pid}/net/tcp")
        port = line.getsockname()[1]
        row = f"0100007F:{server.port:04X} 0100007F:{port:04X} 01"  # established, for the server
        wait_until(lambda: row in table.read_text(), 5)
        wait_until(lambda: row not in table.read_text(), 4 * HEADER_SECONDS)


def test_stalled_upload_is_too_slow(stalled_upload: socket.socket) -> None:
    """Tested before uploads that need its place."""
    stalled_upload.settimeout(20)
    response = HTTPResponse(stalled_upload)
    response.begin()
    assert response.status == 408
    assert b"slower than" in response.read()


def test_stalled_uploads_do_not_take_places_of_others(server: Server) -> None:
    """Uploads of one byte each, more than the queue has places, from other addresses."""
    with ExitStack() as stack:
        for number in range(12):
            line = stack.enter_context(socket.socket())
            line.bind((f"127.0.0.{2 + number}", 0))
            line.connect(("127.0.0.1", server.port))
            line.sendall(upload_head(server) + b"x")
        time.sleep(0.3)
        assert server.call("POST", "/v1/separate?shifts=0", song(0.3, 2))[0] == 200


@pytest.mark.parametrize("name", ["X-API-Key", "X-Forwarded-For", "Authorization"])
def test_limit_per_client_is_not_passed_by_with_headers(server: Server, name: str) -> None:
    with ExitStack() as stack:
        for number in range(3):
            value = {"X-Forwarded-For": f"10.0.0.{number}"}.get(name, f"Bearer invented {number}")
            head = upload_head(server).replace(b"\r\n\r\n", f"\r\n{name}: {value}\r\n\r\n".encode())
            connect(server, stack, head + bytes(1000))
        time.sleep(0.3)
        status, body = server.call("POST", "/v1/separate?shifts=0", song(0.3, 3))
        assert (status, json.loads(body)["error"]["code"]) == (429, "too_many")
    wait_until(lambda: server.call("POST", "/v1/separate?shifts=0", song(0.3, 4))[0] == 200)
