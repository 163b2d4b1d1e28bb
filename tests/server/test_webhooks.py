"""Announcements of finished jobs: signed, repeated, and kept over a restart."""

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.errors import ConfigError
from demucs_infer.server import ServerSettings
from demucs_infer.server.webhooks import sign
from tests.helpers.server_process import client, song, wait_until
from tests.helpers.web_server import WebRequest, WebServer, run_web_server

SECRET = b"0123456789abcdef"
SONG = song(0.3)
PAGE = Path(__file__).parents[2] / "docs" / "remote.md"


@pytest.fixture
def receiver() -> Iterator[WebServer]:
    with run_web_server() as web:
        yield web


@pytest.fixture
def settings(receiver: WebServer, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    prefixes = (f"{receiver.url}/hooks",)
    return {"allowed_webhooks": prefixes, "webhook_secret_file": tmp_path / "secret"}


def respond_with(receiver: WebServer, *statuses: int) -> None:
    """Respond with these statuses in turn, the last one for ever."""
    rest = list(statuses)

    def handle(connection: socket.socket, _: WebRequest) -> None:
        status = rest.pop(0) if len(rest) > 1 else rest[0]
        connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)

    receiver.handlers["/hooks/1"] = handle


def create_job(web: Any, receiver: WebServer, **parameters: Any) -> Any:
    parameters = {"shifts": 0, "webhook": f"{receiver.url}/hooks/1"} | parameters
    response = web.post("/v1/jobs", params=parameters, content=SONG)
    assert response.status_code == 202, response.text
    return response.json()


def read_counts(web: Any) -> tuple[float, float, float]:
    """Return how many messages were delivered, have failed, and were sent again."""
    values = dict(
        line.rsplit(" ", 1) for line in web.get("/metrics").text.splitlines() if line[0] != "#"
    )
    names = ('s_total{status="delivered"}', 's_total{status="failed"}', "_retries_total")
    delivered, failed, retries = (float(values[f"demucs_webhook{name}"]) for name in names)
    return delivered, failed, retries


def read_verification() -> Any:
    """Return the function `verify` of the documentation."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    names: dict[str, Any] = {}
    exec(code, names)
    return names["verify"]


def test_finished_job_is_announced_with_a_signature(
    repo: Path, receiver: WebServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    respond_with(receiver, 204)
    verify = read_verification()
    with client(repo, tmp_path / "data", **settings) as web:
        for _ in range(2):  # also from the cache
            receiver.requests.clear()
            job = create_job(web, receiver)
            wait_until(lambda: receiver.requests)
            (message,) = receiver.requests
            assert (message.method, message.path) == ("POST", "/hooks/1")
            assert message.headers["content-type"] == "application/json"
            view = web.get(f"/v1/jobs/{job['id']}").json()
            assert json.loads(message.body) == view and view["status"] == "done"
            signature = message.headers["x-demucs-signature"]
            assert verify(SECRET, message.body, signature)
            assert not verify(SECRET, message.body + b" ", signature)
            assert not verify(b"another secret here", message.body, signature)
            old = sign(SECRET, message.body, int(time.time()) - 3600)
            assert not verify(SECRET, message.body, old)
        wait_until(lambda: not list((tmp_path / "data" / "webhooks").iterdir()))


def test_failed_and_cancelled_jobs_are_announced(
    repo: Path, receiver: WebServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    respond_with(receiver, 200)
    with client(repo, tmp_path / "data", **settings) as web:
        create_job(web, receiver, start=100)
        wait_until(lambda: receiver.requests)
        body = json.loads(receiver.requests[0].body)
        assert body["status"] == "failed" and body["error"]["code"]
        receiver.requests.clear()
        job = create_job(web, receiver, model="bag", shifts=15, no_cache=True)
        web.delete(f"/v1/jobs/{job['id']}")
        wait_until(lambda: receiver.requests)
        assert json.loads(receiver.requests[0].body)["status"] in ("cancelled", "done")


def test_delivery_is_repeated_and_does_not_hold_up_jobs(
    repo: Path, receiver: WebServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    respond_with(receiver, 500, 302, 200)
    with client(repo, tmp_path / "data", **settings) as web:
        jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        jobs.webhooks.delays = (0.01, 0.01, 0.01)
        create_job(web, receiver)
        wait_until(lambda: len(receiver.requests) == 3)
        wait_until(lambda: not list((tmp_path / "data" / "webhooks").iterdir()))
        ids = {message.headers["x-demucs-delivery"] for message in receiver.requests}
        assert len(ids) == 1 and len({message.body for message in receiver.requests}) == 1
        assert read_counts(web) == (1, 0, 2)
        jobs.webhooks.delays = (1000.0,)
        respond_with(receiver, 503)
        create_job(web, receiver)
        wait_until(lambda: len(receiver.requests) == 4)
        response = web.post("/v1/separate", params={"shifts": 0}, content=song(0.2, 5))
        assert response.status_code == 200  # while a message waits for its next attempt


def test_delivery_ends_after_the_last_attempt(
    repo: Path, receiver: WebServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    respond_with(receiver, 500)
    with client(repo, tmp_path / "data", **settings) as web:
        web.app.state.jobs.webhooks.delays = (0.01, 0.01)  # type: ignore[attr-defined]  # our app
        assert read_counts(web) == (0, 0, 0)
        create_job(web, receiver)
        wait_until(lambda: len(receiver.requests) == 3)
        wait_until(lambda: not list((tmp_path / "data" / "webhooks").iterdir()))
        assert read_counts(web) == (0, 1, 2)


def test_message_survives_a_restart(
    repo: Path, receiver: WebServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    respond_with(receiver, 503)
    with client(repo, tmp_path / "data", **settings) as web:
        job = create_job(web, receiver)
        wait_until(lambda: receiver.requests)
    (file,) = (tmp_path / "data" / "webhooks").glob("*.json")
    file.with_name("damaged.json").write_text("{")
    respond_with(receiver, 200)
    receiver.requests.clear()
    with client(repo, tmp_path / "data", **settings):
        wait_until(lambda: receiver.requests)
        assert json.loads(receiver.requests[0].body)["id"] == job["id"]
        wait_until(lambda: not list((tmp_path / "data" / "webhooks").iterdir()))


def test_message_is_not_sent_to_an_address_that_is_no_longer_allowed(
    repo: Path, receiver: WebServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    respond_with(receiver, 503)
    with client(repo, tmp_path / "data", **settings) as web:
        create_job(web, receiver)
        wait_until(lambda: receiver.requests)
    receiver.requests.clear()
    settings["allowed_webhooks"] = (f"{receiver.url}/elsewhere",)
    with client(repo, tmp_path / "data", **settings) as web:
        web.post("/v1/separate", params={"shifts": 0}, content=SONG)
        assert not receiver.requests


def test_job_with_a_webhook_elsewhere_is_refused(
    repo: Path, receiver: WebServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    with client(repo, tmp_path / "data", **settings) as web:
        for url, status in {
            f"{receiver.url}/other": 403,
            f"{receiver.url}/hooks/../other": 422,
            f"http://localhost:{receiver.port}/hooks/1": 403,
            f"http://a@127.0.0.1:{receiver.port}/hooks/1": 422,
            "http://169.254.169.254/": 403,
            "s3://hooks/1": 422,
        }.items():
            response = web.post("/v1/jobs", params={"webhook": url}, content=SONG)
            assert response.status_code == status, url
    assert not receiver.requests


@pytest.mark.parametrize("secret", [b"short", b""])
def test_short_secret_is_refused(tmp_path: Path, secret: bytes) -> None:
    file = tmp_path / "secret"
    file.write_bytes(secret)
    settings = ServerSettings(data_dir=tmp_path, webhook_secret_file=file)
    with pytest.raises(ConfigError, match="16 characters"):
        settings.read_webhook_secret()
