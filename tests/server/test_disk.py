"""The space on disk: what is promised to inputs and jobs, and what is refused before it arrives."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.errors import ConfigError
from demucs_infer.options import OutputOptions
from demucs_infer.server import ServerSettings, disk
from demucs_infer.server.disk import DiskBudget, JobSpace, estimate_space
from demucs_infer.server.errors import ApiError
from demucs_infer.server.uploads import UploadWriter
from tests.helpers.cli_process import make_repo
from tests.helpers.server_process import FAST, Server, client, run_server, song, wait_until
from tests.helpers.web_server import SlowFile, run_web_server

SONG = song(0.5)
LIMIT = 3_000_000
PLAIN = {"shifts": "0"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def make_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DiskBudget]:
    """Return a function that makes a budget of 1000 bytes, which scans whenever it is asked."""
    monkeypatch.setattr(disk, "_MIN_SCAN_SECONDS", 0.0)
    monkeypatch.setattr(disk, "_SCANS_PER_TIME", 1e9)
    for name in ("uploads", "results"):
        (tmp_path / name).mkdir()

    def make(jobs: dict[str, JobSpace] | None = None, **changes: int) -> DiskBudget:
        values = {"max_bytes": 1000, "min_free_bytes": 0, "max_running": 2} | changes
        return DiskBudget(
            tmp_path / "uploads",
            tmp_path / "results",
            list_jobs=lambda: (jobs or {}).items(),
            **values,
        )

    return make


def write_result(folder: Path, name: str, size: int) -> None:
    (folder / "results" / name).mkdir(exist_ok=True)
    (folder / "results" / name / "bass.wav").write_bytes(bytes(size))


# ── the budget ──


@pytest.mark.anyio
async def test_promises_files_and_results_count_together(
    make_budget: Callable[..., DiskBudget], tmp_path: Path
) -> None:
    budget = make_budget()
    write_result(tmp_path, "a", 300)
    (tmp_path / "uploads/a").write_bytes(bytes(200))
    promise = await budget.reserve(400)
    with pytest.raises(ApiError, match="no room for 101 bytes") as refused:
        await budget.reserve(101)
    assert (refused.value.status, refused.value.retry_after) == (507, 60)
    await budget.refresh()
    assert (budget.used_bytes, budget.promised_bytes) == (500, 400)
    assert (await budget.reserve(100)).left == 100  # and ends at once
    del promise
    assert (await budget.reserve(500)).left == 500


@pytest.mark.anyio
async def test_bytes_of_an_upload_count_once(
    make_budget: Callable[..., DiskBudget], tmp_path: Path
) -> None:
    budget = make_budget()
    writer = UploadWriter(tmp_path / "uploads", 1000, await budget.reserve(600))
    writer.write(bytes(250))
    writer._file.flush()
    await budget.refresh()
    assert (budget.used_bytes, budget.promised_bytes) == (250, 350)
    writer.expect(400)
    writer.write(bytes(100))
    upload = writer.finish("a.wav")
    await budget.refresh()
    assert (budget.used_bytes, budget.promised_bytes) == (350, 0)
    upload.path.unlink()
    writer = UploadWriter(tmp_path / "uploads", 1000, await budget.reserve(1000))
    writer.write(bytes(900))
    writer.discard()
    assert (await budget.reserve(1000)).left == 1000


@pytest.mark.anyio
async def test_jobs_need_space_for_stems_and_running_ones_for_samples(
    make_budget: Callable[..., DiskBudget], tmp_path: Path
) -> None:
    jobs = {name: JobSpace(files=10, samples=size) for name, size in zip("abcd", (40, 20, 30, 9))}
    budget = make_budget(jobs)
    await budget.refresh()
    assert budget.promised_bytes == 4 * 10 + 40 + 30
    write_result(tmp_path, "b", 25)  # it runs, and has written as much
    await budget.refresh()
    assert (budget.used_bytes, budget.promised_bytes) == (25, 5 + 3 * 10 + 40)
    write_result(tmp_path, "b", 99)  # more than expected
    await budget.refresh()
    assert budget.promised_bytes == 3 * 10 + 40
    with pytest.raises(ApiError, match="no room"):
        await budget.reserve_for_job(JobSpace(files=800, samples=32))
    await budget.reserve_for_job(JobSpace(files=800, samples=31))


@pytest.mark.anyio
async def test_what_is_promised_between_scans_counts(
    make_budget: Callable[..., DiskBudget], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = make_budget()
    await budget.refresh()
    monkeypatch.setattr(disk, "_MIN_SCAN_SECONDS", 1000.0)
    promises = [await budget.reserve(450) for _ in range(2)]
    with pytest.raises(ApiError, match="no room"):
        await budget.reserve(200)
    assert len(promises) == 2


@pytest.mark.anyio
async def test_free_space_is_left(make_budget: Callable[..., DiskBudget], tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    with pytest.raises(ApiError, match="no room for 1 bytes"):
        await make_budget(max_bytes=0, min_free_bytes=total).reserve(1)
    budget = make_budget(max_bytes=0)
    with pytest.raises(ApiError, match="no room"):
        await budget.reserve(total)
    promise = await budget.reserve(budget.free_bytes // 2)
    with pytest.raises(ApiError, match="no room"):  # the free space is there, and promised
        await budget.reserve(int(0.6 * budget.free_bytes))
    assert promise.left


def test_space_of_a_job_covers_its_files() -> None:
    stems = ("bass", "drums", "other", "vocals")
    wav = estimate_space(OutputOptions(format="wav", bits=24), stems, 10.0)
    assert wav == JobSpace(files=10 * 4 * 48_000 * 2 * 3, samples=10 * 5 * 48_000 * 2 * 4)
    assert estimate_space(OutputOptions(format="mp3"), stems, 10.0).files == 10 * 4 * 320_000 // 8
    assert estimate_space(OutputOptions(format="wav"), None, 1.0).total > wav.total / 10


@pytest.mark.parametrize("limit", [1, 2 * LIMIT - 1])
def test_limit_that_fits_no_upload_is_refused(tmp_path: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match="max_disk_bytes = .* twice max_bytes or more"):
        ServerSettings(data_dir=tmp_path, max_bytes=LIMIT, max_disk_bytes=limit)


# ── the server ──


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("models") / "repo")


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = ["--repo", repo, "--models", FAST, "--data-dir", tmp_path_factory.mktemp("data")]
    limits = ["--max-bytes", str(LIMIT), "--max-disk-bytes", str(2 * LIMIT)]
    with run_server(*words, *limits) as running:
        yield running


def begin_upload(server: Server, headers: str, body: bytes = b"") -> socket.socket:
    """Send the head of an upload and some bytes, and return the connection."""
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    head = f"POST /v1/jobs?shifts=0 HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def read_metrics(server: Server) -> dict[str, float]:
    lines = server.call("GET", "/metrics")[1].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("demucs_disk_"))
    return {name: float(value) for name, value in values.items()}


def wait_for_promise(server: Server, size: int) -> None:
    wait_until(lambda: read_metrics(server)["demucs_disk_promised_bytes"] == size)


@pytest.mark.parametrize(
    "headers",
    [f"Content-Length: {LIMIT}", "Transfer-Encoding: chunked"],
    ids=["length", "unknown_length"],
)
def test_upload_without_room_is_refused_before_its_bytes(server: Server, headers: str) -> None:
    wait_for_promise(server, 0)
    first = begin_upload(server, f"Content-Length: {LIMIT}", bytes(100_000))
    second = begin_upload(server, f"Content-Length: {LIMIT - 200_000}", b"x")
    with closing(first), closing(second):
        wait_until(lambda: read_metrics(server)["demucs_disk_promised_bytes"] > 5_000_000)
        with closing(begin_upload(server, headers)) as third:
            response = HTTPResponse(third)
            response.begin()  # none of its bytes were sent
            assert (response.status, response.headers["Retry-After"]) == (507, "60")
            assert json.load(response)["error"]["code"] == "no_room"
        url = b'{"url": "https://a.example/x.wav"}'
        kind = {"Content-Type": "application/json"}
        assert server.call("POST", "/v1/jobs", url, **kind)[0] == 403  # of little size itself
    wait_for_promise(server, 0)
    status, body = server.call("POST", "/v1/separate?shifts=0", SONG)
    assert status == 200 and body[:2] == b"PK"
    metrics = read_metrics(server)
    assert metrics["demucs_disk_limit_bytes"] == 2 * LIMIT
    assert metrics["demucs_disk_free_bytes"] > 0


def test_track_whose_stems_do_not_fit_is_refused(server: Server) -> None:
    wait_for_promise(server, 0)
    long = song(6.0, rate=4000, channels=1)  # small, but not its stems
    for path in ("/v1/jobs", "/v1/separate"):
        status, body = server.call("POST", f"{path}?shifts=0", long)
        assert (status, json.loads(body)["error"]["code"]) == (507, "no_room")
    assert server.call("POST", "/v1/separate?shifts=0&stems=bass&duration=1", long)[0] == 200


def test_track_at_a_url_is_refused_with_the_request(repo: Path, tmp_path: Path) -> None:
    with run_web_server() as site:
        file = SlowFile(site, "/slow.wav", SONG)
        site.send_file("/song.wav", SONG)
        limits = {"max_bytes": LIMIT, "max_disk_bytes": 2 * LIMIT, "allowed_inputs": (site.url,)}
        with client(repo, tmp_path, **limits) as web:
            budget = web.app.state.jobs.disk  # type: ignore[attr-defined]  # our app

            def count_promises() -> int:
                assert web.portal is not None
                web.portal.call(budget.refresh)
                return int(budget.promised_bytes)

            def create_job() -> Any:
                return web.post("/v1/jobs", json={"url": file.url, "shifts": 0})

            job = create_job()
            assert job.status_code == 202
            wait_until(lambda: count_promises() < len(SONG))  # its size is known
            assert web.portal is not None
            held = web.portal.call(budget.promise, 2 * LIMIT - len(SONG))
            wait_until(lambda: count_promises() > LIMIT)
            for response in (
                create_job(),
                web.post("/v1/separate", json={"url": f"{site.url}/song.wav", "shifts": 0}),
            ):
                assert (response.status_code, response.json()["error"]["code"]) == (507, "no_room")
            held.size = 0
            wait_until(lambda: count_promises() < LIMIT)
            file.gate.set()
            address = job.headers["location"]
            wait_until(lambda: web.get(address).json()["status"] == "done")
            wait_until(lambda: count_promises() == 0)
            assert web.get(address).json()["stems"]


def test_running_job_fails_before_the_disk_is_full(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client(repo, tmp_path) as web:
        jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        create_job = jobs._create_job

        def create_job_without_space(*arguments: Any, **options: Any) -> Any:
            job = create_job(*arguments, **options)
            job.item.min_free_bytes = shutil.disk_usage(tmp_path).total  # as others fill the disk
            return job

        monkeypatch.setattr(jobs, "_create_job", create_job_without_space)
        response = web.post("/v1/separate", params=PLAIN, content=SONG)
        assert (response.status_code, response.json()["error"]["code"]) == (507, "no_room")
        wait_until(lambda: not [*(tmp_path / "results").iterdir()])
        assert list((tmp_path / "uploads").iterdir()) == []


def test_promises_are_kept_after_a_restart(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, max_tracks=1) as web:
        queue = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        queue._idle.clear()  # so that nothing begins
        job = web.post("/v1/jobs", params=PLAIN, content=SONG).json()
        space = queue.get_job(job["id"]).space
    with client(repo, tmp_path, warmup=False, max_tracks=1) as web:
        queue = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        restored = queue.get_job(job["id"])
        assert restored.item.duration == 0.5  # the number of stems may be unknown until it runs
        assert restored.space.files >= space.files > 0
        wait_until(lambda: web.get(f"/v1/jobs/{job['id']}").json()["status"] == "done")
