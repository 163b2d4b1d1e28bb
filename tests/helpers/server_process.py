"""Helpers for server tests: the application in this process, or in a process of its own."""

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
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import environment

RATE = 8000
FAST = "9d0a6f1c"
"""The fastest model of `cli_process.make_repo`."""


def song(seconds: float = 1.0, seed: int = 0, rate: int = RATE, channels: int = 2) -> bytes:
    """Return the bytes of a wav file with noise."""
    file = io.BytesIO()
    wav = make_noise(channels, round(seconds * rate), seed)
    soundfile.write(file, wav.T.numpy(), rate, format="WAV")
    return file.getvalue()


def decode_wav(data: bytes) -> Any:
    """Return the samples of a wav file as (T, C)."""
    return soundfile.read(io.BytesIO(data), always_2d=True)[0]


def make_settings(repo: Path, data: Path, **more: Any) -> ServerSettings:
    values = {"repo": repo, "models": (FAST, "bag"), "devices": ("cpu",), "access_log": False}
    values["allowed_hosts"] = ("testserver",)
    return ServerSettings(data_dir=data, **{**values, **more})


@contextmanager
def client(repo: Path, data: Path, **more: Any) -> Iterator[TestClient]:
    """Yield a client of an application in this process, once its model is loaded."""
    with TestClient(
        create_app(make_settings(repo, data, **more)), raise_server_exceptions=False
    ) as web:
        wait_until(lambda: web.get("/readyz").status_code == 200)
        yield web


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Wait until `condition()` is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"condition not met within {seconds} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Server:
    """A `demucs-infer serve` process."""

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
        wait_until(self.is_up)

    def is_up(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(self.process.communicate()[1].decode())
        with suppress(OSError):
            return self.call("GET", "/livez")[0] == 200
        return False

    def is_ready(self) -> bool:
        return self.call("GET", "/readyz")[0] == 200

    def call(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Send a request and return the status and the body of the response."""
        header_fields = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, header_fields, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def json(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        return json.loads(self.call(method, path, body, **headers)[1])

    def kill(self) -> None:
        """Kill the process without a chance to clean up."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=30)

    def stop(self) -> int:
        """Terminate the process and return its exit code."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        return int(self.process.returncode)


@contextmanager
def run_server(*words: str | Path, **variables: str) -> Iterator[Server]:
    """Yield a server that is ready, and end it afterwards."""
    server = Server(*words, **variables)
    try:
        wait_until(server.is_ready)
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
