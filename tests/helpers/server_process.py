"""What the tests of the server share: an application in this process, or one of its own."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import soundfile
from fastapi.testclient import TestClient

from demucs_infer.server import ServerSettings, create_app
from tests.helpers.cli_process import environment
from tests.helpers.networks import noise

RATE = 8000
FAST = "9d0a6f1c"
"""The quickest of the models in `shell.make_repo`."""


def song(seconds: float = 1.0, seed: int = 0, rate: int = RATE, channels: int = 2) -> bytes:
    """A wav of noise."""
    file = io.BytesIO()
    wav = noise(channels, round(seconds * rate), seed)
    soundfile.write(file, wav.T.numpy(), rate, format="WAV")
    return file.getvalue()


def load(data: bytes) -> Any:
    """(T C)"""
    return soundfile.read(io.BytesIO(data), always_2d=True)[0]


def settings(repo: Path, data: Path, **more: Any) -> ServerSettings:
    values = {"repo": repo, "models": (FAST, "bag"), "devices": ("cpu",), "access_log": False}
    return ServerSettings(data_dir=data, **{**values, **more})


@contextmanager
def client(repo: Path, data: Path, **more: Any) -> Iterator[TestClient]:
    """The application in this process, once its model is there."""
    with TestClient(
        create_app(settings(repo, data, **more)), raise_server_exceptions=False
    ) as found:
        until(lambda: found.get("/readyz").status_code == 200)
        yield found


def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for something that happens elsewhere."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Server:
    """`demucs-infer serve` in a process of its own."""

    def __init__(self, *words: str | Path, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "demucs_infer", "serve", "--port", self.port]
        self.process = subprocess.Popen(
            [str(word) for word in (*command, "--devices", "cpu", *words)],
            env={**environment(), **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        until(self.is_up)

    def is_up(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(self.process.communicate()[1].decode())
        with suppress(OSError):
            return self.call("GET", "/livez")[0] == 200
        return False

    def is_ready(self) -> bool:
        return self.call("GET", "/readyz")[0] == 200

    def call(
        self, verb: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """(Status, body) of a request."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, named, method=verb)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def json(self, verb: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        return json.loads(self.call(verb, path, body, **headers)[1])

    def kill(self) -> None:
        """End it as a power cut would."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=30)

    def stop(self) -> int:
        """Ask it to end, and say how it did."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        return int(self.process.returncode)


@contextmanager
def running(*words: str | Path, **variables: str) -> Iterator[Server]:
    """A server that is ready, and surely ended."""
    server = Server(*words, **variables)
    try:
        until(server.is_ready)
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
