"""Work of a server that can be disturbed: a song, a cancelled one, and what a crash has left.

`demucs-infer serve` runs in the main thread of a forked process, and its client in another thread.
"""

import http.client
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demucs_infer.cli.main import main
from tests.helpers.batch_runs import MODEL, STEMS

_SECONDS = 20.0
Arm = Callable[[], None]


class Refusal(Exception):
    """Raised when the server answers with an error, or a job has failed."""


class ServerClient:
    """A client of the server of this process."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.start = log.stat().st_size if log.exists() else 0
        self.port = 0
        self.is_over = threading.Event()

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return the status and the body of a response; raise `Refusal` if it is cut off."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.IncompleteRead as error:
            raise Refusal(f"the body of {path} is cut off: {error}") from error
        finally:
            connection.close()

    def json(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Return a JSON response; raise `Refusal` if it is an error, which must be well-formed."""
        status, data = self.call(method, path, body)
        values: dict[str, Any] = json.loads(data) if data else {}
        if status >= 400:
            error = values["error"]
            assert status in (410, 422, 500, 503, 507) and error["code"] and error["message"], data
            raise Refusal(f"{status} {error['code']}: {error['message']}")
        return values

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded, or could not be."""
        deadline = time.monotonic() + _SECONDS
        while not self.is_over.is_set():
            if not self.port:  # chosen by the system, and logged
                text = self.log.read_bytes()[self.start :]
                match = re.search(rb"running on http://127\.0\.0\.1:(\d+)", text)
                self.port = int(match[1]) if match else 0
            else:
                status, data = self.call("GET", "/readyz")
                if status == 200 or json.loads(data).get("message"):
                    return
            assert time.monotonic() < deadline, "the server does not become ready"
            time.sleep(0.01)
        raise Refusal("the server has not started")

    def send(self, audio: bytes) -> str:
        """Begin a job and return its id."""
        return str(self.json("POST", "/v1/jobs", audio)["id"])

    def fetch(self, id: str) -> dict[str, bytes]:
        """Return the stems of a job when it has ended; raise `Refusal` if it has failed."""
        deadline = time.monotonic() + _SECONDS
        while (state := self.json("GET", f"/v1/jobs/{id}"))["status"] in ("queued", "running"):
            assert time.monotonic() < deadline, f"a job that does not end: {state}"
            time.sleep(0.01)
        if state["status"] != "done":
            error = state["error"]
            assert error["code"] and error["message"], state
            raise Refusal(f"job {state['status']}: {error['code']}: {error['message']}")
        stems = {}
        for name in STEMS:
            status, stems[name] = self.call("GET", f"/v1/jobs/{id}/stems/{name}")
            if status != 200:
                raise Refusal(f"{status} {stems[name].decode()}")
        return stems


def _serve(folder: Path, visit: Callable[[ServerClient], int], arm: Arm, disarm: Arm) -> int:
    """Run the command until its client has ended; return the worse of their exit codes."""
    client = ServerClient(folder.parent / "log")
    words = ["serve", "--repo", folder / "repo", "--models", MODEL, "--devices", "cpu"]
    words += ["--port", "0", "--data-dir", folder / "data", "--no-access-log"]
    outcome: list[int | BaseException] = []

    def run_client() -> None:
        try:
            outcome.append(visit(client))
        except BaseException as error:
            outcome.append(error)
        finally:
            if not client.is_over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=run_client)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has ended
    arm()
    thread.start()
    try:
        code = int(main([str(word) for word in words]))
    finally:
        disarm()
        client.is_over.set()
        thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return code or outcome[0]


def _write(folder: Path, stems: dict[str, bytes]) -> None:
    (folder / "out").mkdir(exist_ok=True)
    for name, data in stems.items():
        (folder / "out" / f"{name}.wav").write_bytes(data)


def _read_songs(folder: Path) -> list[bytes]:
    return [(folder / f"in/{n}.wav").read_bytes() for n in range(2)]


def _visit(
    client: ServerClient, folder: Path, songs: list[bytes], disarm: Arm, id: str | None = None
) -> int:
    """Send a song and a second one, cancel that, and fetch stems; then again, undisturbed."""
    code = 0
    try:
        client.wait_until_ready()
        id = id or client.send(songs[0])
        second = client.send(songs[1])
        client.json("DELETE", f"/v1/jobs/{second}")
        stems = client.fetch(id)
    except (Refusal, ConnectionError) as error:
        if client.is_over.is_set():  # it has told why it has not started
            return 1
        print(f"error: {error}", file=sys.stderr)
        code = 1
    disarm()
    if code:  # the process goes on: what it can do is not less than before
        client.json("GET", "/livez")
        stems = client.fetch(client.send(songs[0]))
    _write(folder, stems)
    return code


def run_server(folder: Path, arm: Arm, disarm: Arm) -> int:
    """Start a server; separate a song, cancel one, stop."""
    songs = _read_songs(folder)  # before calls fail
    return _serve(folder, lambda client: _visit(client, folder, songs, disarm), arm, disarm)


def run_restart(folder: Path, arm: Arm, disarm: Arm) -> int:
    """Start a server where another one was killed with a job, and fetch the stems of that."""
    crashed = folder.parent / "crashed"
    if not crashed.exists():
        _crash(folder, crashed)
    is_first = not (folder / "data").exists()
    if is_first:
        shutil.copytree(crashed, folder / "data")
    id, songs = (folder.parent / "job").read_text(), _read_songs(folder)

    def visit(client: ServerClient) -> int:
        job: str | None = id
        if not is_first:  # it may have failed, for a reason that was told: then it is sent again
            client.wait_until_ready()
            job = None if client.json("GET", f"/v1/jobs/{id}")["status"] == "failed" else id
        return _visit(client, folder, songs, disarm, job)

    return _serve(folder, visit, arm, disarm)


def _crash(folder: Path, crashed: Path) -> None:
    """Write the data folder of a server that was killed with a waiting job."""

    def nothing() -> None:
        pass

    def visit(client: ServerClient) -> int:
        client.wait_until_ready()
        song = (folder / "in/0.wav").read_bytes()
        (folder.parent / "job").write_text(client.send(song))
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    process = os.fork()
    if process == 0:
        try:
            _serve(folder, visit, nothing, nothing)
        finally:
            os._exit(1)
    os.waitpid(process, 0)
    shutil.move(folder / "data", crashed)
