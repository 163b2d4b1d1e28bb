"""Jobs whose tracks are downloaded in the background: progress, errors, limits, restarts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from demucs_infer.server.errors import STATUS
from tests.helpers.server_process import client, song, wait_until
from tests.helpers.web_server import SlowFile, WebServer

SONG = song(0.5)
HALF = len(SONG) // 2
KEYS = {name: {"X-API-Key": f"the key of {name}"} for name in "abc"}


@pytest.fixture
def slow_file(site: WebServer) -> SlowFile:
    return SlowFile(site, "/music/slow.wav", SONG)


@pytest.fixture
def settings(site: WebServer, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "secret").write_bytes(b"0123456789abcdef")
    return {
        "allowed_inputs": (f"{site.url}/music", f"http://inner.example:{site.port}/"),
        "allowed_webhooks": (f"{site.url}/hooks",),
        "webhook_secret_file": tmp_path / "secret",
        "max_bytes": len(SONG),
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def create_job(web: TestClient, url: str, key: str = "a", **fields: Any) -> Any:
    return web.post("/v1/jobs", json={"url": url, "shifts": 0, **fields}, headers=KEYS[key])


def view(web: TestClient, id: str, key: str = "a") -> Any:
    return web.get(f"/v1/jobs/{id}", headers=KEYS[key]).json()


def wait_for_job(web: TestClient, id: str) -> Any:
    unfinished = ("downloading", "queued", "running")
    wait_until(lambda: view(web, id)["status"] not in unfinished)
    return view(web, id)


def wait_for_half(web: TestClient, id: str, key: str = "a") -> None:
    progress = {"received_bytes": HALF, "total_bytes": len(SONG)}
    wait_until(lambda: view(web, id, key)["download"] == progress)


def begin_download(web: TestClient, file: SlowFile, **fields: Any) -> str:
    """Create a job, wait until half of its track is there, and return its id."""
    id: str = create_job(web, file.url, **fields).json()["id"]
    wait_for_half(web, id)
    return id


def list_uploads(data: Path) -> list[Path]:
    return list((data / "uploads").iterdir())


def test_job_is_created_before_its_track_is_downloaded(
    repo: Path, data: Path, slow_file: SlowFile, site: WebServer, settings: dict[str, Any]
) -> None:
    with client(repo, data, **settings) as web:
        created = create_job(web, slow_file.url)
        assert created.status_code == 202
        job = created.json()
        assert (job["status"], job["name"], job["progress"]) == ("downloading", "slow.wav", 0)
        wait_for_half(web, job["id"])
        assert view(web, job["id"])["stage"] == "download"
        metrics = web.get("/metrics").text
        assert "demucs_jobs_downloading 1.0" in metrics and "demucs_jobs_waiting 0.0" in metrics
        assert web.get(f"/v1/jobs/{job['id']}/stems/bass").status_code == 409
        slow_file.gate.set()
        done = wait_for_job(web, job["id"])
        assert (done["status"], done["download"], len(done["stems"])) == ("done", None, 4)
        events = web.get(f"/v1/jobs/{job['id']}/events").text
        assert events.index('"download"') < events.index('"normalize"')
        queue = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        record = queue.get_record(job["id"])
        assert record.created < record.queued < record.finished
        again = wait_for_job(web, create_job(web, f"{site.url}/music/song.wav").json()["id"])
        assert again["is_cached"] and again["input_sha256"] == done["input_sha256"]
        assert list_uploads(data) == []


def test_failed_download_fails_the_job_and_is_announced(
    repo: Path,
    data: Path,
    site: WebServer,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("demucs_infer.server.admission._GRACE_SECONDS", 0.2)
    site.redirect("/music/away", "http://169.254.169.254/latest/meta-data/")
    site.respond("/music/large", f"HTTP/1.1 200 OK\nContent-Length: {len(SONG) + 1}")
    site.repeat("/music/endless", "HTTP/1.1 200 OK\n\n", bytes(1 << 14))
    site.repeat("/music/drip", "HTTP/1.1 200 OK\n\n", b"x", pause=0.02)
    site.respond("/music/cut", "HTTP/1.1 200 OK\nContent-Length: 100", b"x")
    site.send_file("/music/empty", b"")
    site.send_file("/music/text", b"no audio")
    codes = {
        "none": "remote_failed",
        "away": "url_not_allowed",
        "large": "too_large",
        "endless": "too_large",
        "drip": "too_slow",
        "cut": "remote_failed",
        "empty": "empty_audio",
        "text": "unreadable_audio",
    }
    with client(repo, data, **settings) as web:
        hook = f"{site.url}/hooks/1"
        created = {
            name: create_job(web, f"{site.url}/music/{name}", webhook=hook) for name in codes
        }
        assert {response.status_code for response in created.values()} == {202}
        jobs = {name: wait_for_job(web, created[name].json()["id"]) for name in codes}
        assert {name: job["error"]["code"] for name, job in jobs.items()} == codes
        assert {job["status"] for job in jobs.values()} == {"failed"}
        assert jobs["none"]["error"]["message"] == "url: its server responded with 404"
        assert "the download was slower than" in jobs["drip"]["error"]["message"]
        queue = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        assert queue.admission.slots.count("testclient") == (0, 0)
        wait_until(lambda: site.paths.count("/hooks/1") == len(codes))
        hooks = [json.loads(request.body) for request in site.requests if "hooks" in request.path]
        announced = {job["id"]: job for job in hooks}
        assert announced == {job["id"]: job for job in jobs.values()}
        assert list_uploads(data) == []
        # The route that waits has the status of the code.
        for name in ("none", "large", "text"):
            refused = web.post("/v1/separate", json={"url": f"{site.url}/music/{name}"})
            assert refused.status_code == STATUS[codes[name]]
            assert refused.json()["error"]["code"] == codes[name]


def test_cancelled_download_ends_at_once(
    repo: Path, data: Path, slow_file: SlowFile, settings: dict[str, Any]
) -> None:
    with client(repo, data, **settings) as web:
        id = begin_download(web, slow_file)
        assert len(list_uploads(data)) == 1
        cancelled = web.delete(f"/v1/jobs/{id}", headers=KEYS["a"])
        assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
        assert slow_file.is_cut_off.wait(30)
        wait_until(lambda: list_uploads(data) == [])
        assert web.delete(f"/v1/jobs/{id}", headers=KEYS["a"]).status_code == 204


def test_downloads_have_places_in_the_queue(
    repo: Path, data: Path, slow_file: SlowFile, site: WebServer, settings: dict[str, Any]
) -> None:
    limits = {"max_queue": 2, "max_per_client": 1}
    limits |= {"api_keys": tuple(key["X-API-Key"] for key in KEYS.values())}
    with client(repo, data, **settings, **limits) as web:
        first = create_job(web, slow_file.url).json()["id"]
        assert create_job(web, slow_file.url).status_code == 429
        second = create_job(web, slow_file.url, "b").json()["id"]
        assert create_job(web, slow_file.url, "c").status_code == 503
        wait_for_half(web, first)
        wait_for_half(web, second, "b")
        sent = web.post("/v1/separate", content=SONG, headers=KEYS["c"])
        assert sent.json()["error"]["code"] == "busy"
        assert view(web, first, "b") == {"error": view(web, "0", "b")["error"]}  # no such job
        web.delete(f"/v1/jobs/{first}", headers=KEYS["a"])
        assert create_job(web, f"{site.url}/music/song.wav", "c").status_code == 202


def test_interrupted_download_begins_again_after_a_restart(
    repo: Path,
    data: Path,
    slow_file: SlowFile,
    site: WebServer,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    hook = f"{site.url}/hooks/2"
    with client(repo, data, **settings) as web:
        id = begin_download(web, slow_file, webhook=hook)
        shutil.copytree(data, tmp_path / "killed")  # as a process that was killed leaves it
        assert len(list_uploads(tmp_path / "killed")) == 1
    assert list_uploads(data) == []
    slow_file.gate.set()
    site.requests.clear()
    for folder in (data, tmp_path / "killed"):
        with client(repo, folder, **settings) as web:
            assert wait_for_job(web, id)["status"] == "done"
            assert list_uploads(folder) == []
        with client(repo, folder, **settings) as web:  # nothing is left to do
            assert view(web, id)["status"] == "done"
    assert [path for path in site.paths if path == "/music/slow.wav"] == ["/music/slow.wav"] * 2


def test_interrupted_download_fails_if_its_url_is_no_longer_allowed(
    repo: Path, data: Path, slow_file: SlowFile, settings: dict[str, Any]
) -> None:
    with client(repo, data, **settings) as web:
        id = begin_download(web, slow_file)
    with client(repo, data, **{**settings, "allowed_inputs": ("https://a.example",)}) as web:
        job = wait_for_job(web, id)
        assert (job["status"], job["error"]["code"]) == ("failed", "url_not_allowed")
        assert "the operator allows" in job["error"]["message"]


def test_address_that_is_not_public_is_refused_at_once_and_before_connecting(
    repo: Path, data: Path, site: WebServer, settings: dict[str, Any]
) -> None:
    url = f"http://inner.example:{site.port}/song.wav"
    answers = [["127.0.0.1"], ["93.184.216.34", "::1"], [], ["93.184.216.34"], ["127.0.0.1"]]

    async def resolve(host: str, port: int) -> list[str]:
        return answers.pop(0)

    with client(repo, data, **settings) as web:
        queue = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        queue.remote.clients["url"].resolve = resolve
        site.requests.clear()
        refused = [create_job(web, url) for _ in range(3)]
        assert [response.status_code for response in refused] == [403, 403, 422]
        assert queue.num_downloads == 0
        job = wait_for_job(web, create_job(web, url).json()["id"])  # another address the next time
        assert job["error"]["code"] == "url_not_allowed"
        assert site.requests == [] == answers
