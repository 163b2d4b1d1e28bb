"""Several servers with one Redis and one folder: they share jobs, limits and results."""

import io
import json
import signal
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from demucs_infer.errors import ConfigError
from demucs_infer.server.errors import ApiError
from demucs_infer.server.shared_store import SharedStore
from demucs_infer.server.store import JobRecord
from tests.helpers.oracles import require_module, require_tool
from tests.helpers.server_process import FAST, Server, client, run_server, song, wait_until
from tests.helpers.web_server import SlowFile, run_web_server

RECORD = JobRecord(
    id="1" * 32, status="queued", created=1.0, name="a.wav", sha256="", size=1, upload="x",
    request={"model": "bag"}, owner="me", entry="e", slot="s",
)  # fmt: skip
SLOW = {"model": "bag", "shifts": "9"}


class Redis:
    """A Redis of its own, on a socket in a folder, so that no port is needed."""

    def __init__(self, folder: Path) -> None:
        self._program = require_tool("redis-server")
        require_module("redis")
        self._folder = folder
        self.url = f"unix://{folder / 'socket'}"
        self.start()

    def start(self) -> None:
        words = ["--port", "0", "--unixsocket", self._folder / "socket", "--dir", self._folder]
        words += ["--appendonly", "yes", "--save", ""]
        self.process = subprocess.Popen(
            [self._program, *map(str, words)], stdout=subprocess.DEVNULL
        )
        wait_until(self._is_up)

    def _is_up(self) -> bool:
        try:
            SharedStore(self.url, 1).close()
        except ConfigError:
            return False
        return True

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def pair(repo: Path, tmp_path: Path, redis: Redis) -> Iterator[tuple[TestClient, TestClient]]:
    shared = {"redis_url": redis.url, "max_queue": 3, "max_per_client": 2, "share_links": True}
    keys = ("the first key", "the second key")
    with (
        client(repo, tmp_path, api_keys=keys, **shared) as first,
        client(repo, tmp_path, api_keys=keys, **shared) as second,
    ):
        for web in (first, second):
            web.headers["X-API-Key"] = keys[0]
        yield first, second


def get_job(web: TestClient, id: str) -> dict[str, Any]:
    view: dict[str, Any] = web.get(f"/v1/jobs/{id}").json()
    return view


def wait_for(web: TestClient | Server, id: str, status: str) -> None:
    """Wait until a server says that a job has this status."""
    get = web.get if isinstance(web, TestClient) else partial(web.call, "GET")

    def has_status() -> bool:
        response: Any = get(f"/v1/jobs/{id}")
        text = response.text if isinstance(web, TestClient) else response[1]
        return bool(json.loads(text).get("status") == status)

    wait_until(has_status)


def wait_for_progress(servers: Sequence[TestClient], id: str) -> None:
    wait_until(lambda: all(get_job(web, id)["progress"] > 0 for web in servers))


def wait_for_download(web: TestClient, id: str) -> None:
    """Wait until a part of a track was downloaded."""
    wait_until(lambda: (get_job(web, id)["download"] or {}).get("received_bytes"))


def read_stems(server: Server, id: str) -> dict[str, bytes]:
    """Return the bytes of each stem; the manifest states how long it took."""
    with zipfile.ZipFile(io.BytesIO(server.call("GET", f"/v1/jobs/{id}/stems.zip")[1])) as archive:
        stems = {name: archive.read(name) for name in archive.namelist() if name != "stems.json"}
    assert len(stems) == 4
    return stems


def test_every_server_answers_for_every_job(pair: tuple[TestClient, TestClient]) -> None:
    first, second = pair
    id = first.post("/v1/jobs", content=song(2.0)).json()["id"]
    events = second.get(f"/v1/jobs/{id}/events").text
    assert events.startswith("id: 1\n") and "event: end\n" in events
    assert first.get(f"/v1/jobs/{id}/events").text == events
    for web in (first, second):
        view = get_job(web, id)
        assert view["status"] == "done" and view["progress"] == 1.0
        assert [job["id"] for job in web.get("/v1/jobs").json()["jobs"]] == [id]
        assert web.get(f"/v1/jobs/{id}", headers={"X-API-Key": "the second key"}).status_code == 404
    stems = [web.get(f"/v1/jobs/{id}/stems/vocals").content for web in (first, second)]
    assert stems[0] == stems[1] and len(stems[0]) > 10_000
    (shared_id,) = {get_job(web, id)["shared_id"] for web in (first, second)}
    for web in (first, second):
        shared = web.get(f"/v1/jobs/{shared_id}/stems/vocals", headers={"X-API-Key": ""})
        assert shared.status_code == 200 and shared.content == stems[0]
    assert second.delete(f"/v1/jobs/{id}").status_code == 204
    for web in (first, second):
        assert web.get(f"/v1/jobs/{id}").status_code == 404
        assert web.get("/v1/jobs").json() == {"jobs": []}


def test_running_job_is_seen_and_cancelled_from_another_server(
    pair: tuple[TestClient, TestClient], tmp_path: Path
) -> None:
    first, second = pair
    ids = [
        first.post("/v1/jobs", params=SLOW, content=song(20.0, seed)).json()["id"]
        for seed in (1, 2)
    ]
    for id in ids:
        wait_for_progress(pair, id)
        views = [get_job(web, id) for web in pair]
        assert {view["status"] for view in views} == {"running"}
        assert all(view["preview"]["duration_seconds"] == 20 for view in views)
        for web in pair:
            part = web.get(f"/v1/jobs/{id}/stems/bass/part?duration=0.1")
            assert part.status_code == 200 and part.content[:4] == b"RIFF"  # empty at first
    for id in ids:
        assert second.delete(f"/v1/jobs/{id}").status_code == 202
    for web in pair:
        for id in ids:
            wait_for(web, id, "cancelled")
    assert list((tmp_path / "uploads").iterdir()) == []


def test_download_is_seen_and_cancelled_from_another_server_and_taken_over(
    repo: Path, tmp_path: Path, redis: Redis
) -> None:
    with run_web_server() as site:
        file = SlowFile(site, "/slow.wav", song(0.5))
        settings = {"redis_url": redis.url, "allowed_inputs": (site.url,), "lease_seconds": 5.0}
        with client(repo, tmp_path, **settings) as first:
            with client(repo, tmp_path, **settings) as second:
                ids = [second.post("/v1/jobs", json={"url": file.url}).json()["id"] for _ in "ab"]
                for id in ids:
                    wait_for_download(first, id)
                    assert get_job(first, id)["status"] == "downloading"
                assert first.delete(f"/v1/jobs/{ids[0]}").status_code == 202
                wait_for(first, ids[0], "cancelled")
                wait_for(second, ids[0], "cancelled")
            assert get_job(first, ids[1])["status"] == "downloading"
            file.gate.set()  # `second` has ended: `first` begins again
            wait_for(first, ids[1], "done")
            events = first.get(f"/v1/jobs/{ids[1]}/events").text
            assert events.count("event: Stage.Completed\ndata: ") >= 2
            queue = first.app.state.jobs  # type: ignore[attr-defined]  # our app
            assert queue._shared.list_leased_entries() == set() == set(queue._downloads)
        assert list((tmp_path / "uploads").iterdir()) == []
        assert site.paths == ["/slow.wav"] * 3


def test_download_of_lost_lease_is_left_to_the_other_server(
    repo: Path, tmp_path: Path, redis: Redis
) -> None:
    with run_web_server() as site:
        file = SlowFile(site, "/slow.wav", song(0.5))
        settings = {"redis_url": redis.url, "allowed_inputs": (site.url,)}
        with client(repo, tmp_path, **settings) as web:
            id = web.post("/v1/jobs", json={"url": file.url}).json()["id"]
            wait_for_download(web, id)
            queue = web.app.state.jobs  # type: ignore[attr-defined]  # our app
            other = SharedStore(redis.url, 600)
            other.held[f"download-{id}"] = id  # as if ours had expired
            other._redis.set(f"{{demucs}}:lease:download-{id}", other._token(id), px=600_000)
            wait_until(lambda: not queue._downloads)
            assert file.is_cut_off.wait(30)
            assert get_job(web, id)["status"] == "downloading"
            file.gate.set()
            other.release(f"download-{id}", id)  # as if it had ended
            wait_for(web, id, "done")
            other.close()


def test_expired_lease_that_nobody_took_is_renewed(redis: Redis) -> None:
    store = SharedStore(redis.url, 600)
    store.put(RECORD)
    assert store.claim()
    expire_lease(store)
    wait_until(lambda: not store.list_leased_entries())
    assert store.renew(()) == (set(), set())
    assert store.list_leased_entries() == {"e"} and store.holds(RECORD)
    store.close()


def test_limits_count_the_jobs_of_all_servers(pair: tuple[TestClient, TestClient]) -> None:
    first, second = pair
    jobs = [web.post("/v1/jobs", params=SLOW, content=song(20.0, 3)).json() for web in pair]
    refused = second.post("/v1/jobs", content=song())
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many")
    other = {"X-API-Key": "the second key"}
    jobs.append(second.post("/v1/jobs", params=SLOW, content=song(20.0, 4), headers=other).json())
    for web in pair:
        refused = web.post("/v1/separate", content=song(), headers=other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
    # Two jobs for one result never run at the same time.
    statuses = [get_job(first, job["id"])["status"] for job in jobs[:2]]
    assert sorted(statuses) == ["queued", "running"]
    assert "demucs_jobs_waiting 1.0" in first.get("/metrics").text
    for job, key in zip(jobs, ["the first key", "the first key", "the second key"]):
        first.delete(f"/v1/jobs/{job['id']}", headers={"X-API-Key": key})
    for job in jobs[:2]:
        wait_for(first, job["id"], "cancelled")
    assert first.post("/v1/separate", content=song()).status_code == 200


@pytest.mark.slow
def test_server_survives_a_restart_of_redis(repo: Path, tmp_path: Path, redis: Redis) -> None:
    with client(repo, tmp_path, redis_url=redis.url) as web:
        id = web.post("/v1/jobs", params=SLOW, content=song(10.0)).json()["id"]
        wait_for_progress([web], id)
        redis.stop()
        assert web.get("/livez").status_code == 200
        refused = web.post("/v1/separate", content=song())
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        wait_until(lambda: jobs._unsaved)
        redis.start()
        wait_until(lambda: web.get(f"/v1/jobs/{id}").status_code == 200)
        wait_for(web, id, "done")
        wait_until(lambda: list((tmp_path / "uploads").iterdir()) == [])
        assert web.app.state.jobs._unsaved == {}  # type: ignore[attr-defined]


def expire_lease(store: SharedStore) -> None:
    """Let Redis end the lease of `RECORD` now, as if it had not been renewed."""
    store._redis.pexpire("{demucs}:lease:e", 1)


def test_unreachable_redis_is_config_error(tmp_path: Path) -> None:
    require_module("redis")
    with pytest.raises(ConfigError, match="no Redis at") as caught:
        SharedStore("redis://:secret@127.0.0.1:1/0", 1)
    assert "secret" not in str(caught.value)


def test_lease_of_dead_server_is_taken_and_its_writes_are_refused(redis: Redis) -> None:
    dead, other = (SharedStore(redis.url, 600, name) for name in ("dead", "other"))
    assert dead.put(RECORD)
    claim = dead.claim()
    assert claim and claim.record == RECORD and other.claim() is None
    assert not other.lease("e", "another job for the same result")
    dead.publish(RECORD, {"fraction": 0.5}, [{"event": "a"}])
    expire_lease(dead)
    wait_until(lambda: other.holds(RECORD) or other.claim())
    dead.publish(RECORD, {"fraction": 0.9}, [{"event": "b"}])
    assert not dead.put(RECORD.replace(status="failed", finished=2.0))
    (snapshot,) = other.read([RECORD.id], [0])
    assert snapshot and (snapshot.record, snapshot.state) == (RECORD, {"fraction": 0.5})
    assert snapshot.events == [{"event": "a"}]
    assert dead.renew(()) == (set(), set()) and other.renew(()) == (set(), set())
    other.request_cancel(RECORD.id)
    assert other.renew(()) == (set(), {RECORD.id})
    assert other.put(RECORD.replace(status="done", finished=2.0))
    other.release("e", RECORD.id)
    assert other.list_unfinished() == [] and other.list_leased_entries() == set()
    assert len(other.list_finished()) == len(other.list_by_owner("me", 9)) == 1
    for store in (dead, other):
        store.close()


def test_lost_lease_is_noticed(redis: Redis) -> None:
    first, second = (SharedStore(redis.url, 600) for _ in range(2))
    first.put(RECORD)
    assert first.claim()
    expire_lease(first)
    wait_until(second.claim)
    assert first.renew(()) == ({RECORD.id}, set()) and not first.holds(RECORD)
    first.close()
    second.close()


def test_places_of_dead_server_are_free_again(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = "demucs_infer.server.shared_store._SLOT_SECONDS"
    monkeypatch.setattr(seconds, 600)
    store = SharedStore(redis.url, 600)
    slot, other = store.add("a", 2, 0), store.add("b", 2, 0)
    assert slot and other and store.add("c", 2, 0) is None and store.count("a") == (2, 1)
    store.put(RECORD.replace(slot=slot))  # the place of a job lasts as long as the job
    monkeypatch.setattr(seconds, 0)
    store.renew([slot, other])  # for no time
    assert store.count("b") == (1, 0) and store.count("a") == (1, 1)
    store.renew([slot])
    assert store.count("a") == (1, 1)
    store.put(RECORD.replace(slot=slot, status="done", finished=2.0))
    assert store.count("a") == (0, 0)
    store.close()


def test_damaged_record_is_skipped(redis: Redis) -> None:
    store = SharedStore(redis.url, 600)
    for id, text in (("a", "{"), ("b", "{}")):
        store._redis.hset(f"{{demucs}}:job:{id}", "record", text)
        store._redis.zadd("{demucs}:unfinished", {id: 0})
    store.put(RECORD)
    claims = [store.claim() for _ in range(3)]
    assert [claim.record for claim in claims if claim] == [RECORD]
    assert store.list_unfinished() == [RECORD] and store.get("a") is None
    store.close()


@pytest.mark.slow
def test_call_after_failure_does_not_ask_redis(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demucs_infer.server.shared_store._PAUSE_SECONDS", 600)
    store = SharedStore(redis.url, 1)
    redis.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ApiError, match="shared job store"):
            store.get("a")
    finally:
        redis.process.send_signal(signal.SIGCONT)
    with pytest.raises(ApiError, match="shared job store"):
        store.get("a")
    store._paused_until = 0
    assert store.get("a") is None
    store.close()


@pytest.mark.slow
def test_jobs_of_killed_server_are_finished_by_another(
    repo: Path, tmp_path: Path, redis: Redis
) -> None:
    """Six jobs through a round-robin to two servers, one of which is killed in the middle."""
    songs = [song(15.0, seed) for seed in range(6)]
    query = "/v1/jobs?model=bag&shifts=3"
    words = ["--repo", repo, "--models", f"{FAST},bag", "--lease-seconds", "2"]
    words += ["--redis-url", redis.url, "--data-dir", tmp_path / "shared"]
    servers = [Server(*words), Server(*words)]
    try:
        for server in servers:
            wait_until(server.is_ready)
        ids = [servers[n % 2].json("POST", query, data)["id"] for n, data in enumerate(songs)]
        dead, alive = servers

        store = SharedStore(redis.url, 1)

        def count_working() -> int:
            """Return how many servers are in the middle of a job."""
            running = [job for job in store.list_unfinished() if job.status == "running"]
            progress = [dead.json("GET", f"/v1/jobs/{job.id}")["progress"] for job in running]
            entries = [job.entry for job, n in zip(running, progress) if 0.1 < n < 0.8]
            tokens = [store._redis.get(f"{{demucs}}:lease:{entry}") for entry in entries]
            return len({token.split("/")[0] for token in tokens if token})

        wait_until(lambda: count_working() == 2)
        dead.kill()
        for id in ids:
            wait_for(alive, id, "done")
        records = [store.get(id) for id in ids]
        assert sum(record.attempts for record in records if record) > len(ids)
        assert store.list_unfinished() == [] and store.count("") == (0, 0)
        store.close()
        stems = [read_stems(alive, id) for id in ids]
        manifests = sorted((tmp_path / "shared" / "results").rglob("stems.json"))
        assert len(manifests) == 6
        assert not list((tmp_path / "shared" / "results").rglob(".partial"))
        assert not list((tmp_path / "shared" / "uploads").iterdir())
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.kill()
    single = ["--repo", repo, "--models", f"{FAST},bag", "--data-dir", tmp_path / "single"]
    with run_server(*single) as server:
        for data, expected in zip(songs, stems):
            id = server.json("POST", query, data)["id"]
            wait_for(server, id, "done")
            assert read_stems(server, id) == expected
