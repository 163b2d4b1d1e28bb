"""Downloads of stems: whole, in parts, not again, and never damaged."""

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from demucs_infer.server import responses
from demucs_infer.server.cache import CachedStem, CachedStems
from demucs_infer.server.responses import iter_zip, zip_size
from tests.helpers.server_process import client, song, wait_until

PLAIN = {"shifts": "0"}


@pytest.fixture(scope="module")
def web(repo: Path, data: Path) -> Iterator[TestClient]:
    with client(repo, data) as opened:
        yield opened


def make_job(web: TestClient, seed: int) -> str:
    job = web.post("/v1/jobs", params=PLAIN, content=song(0.3, seed)).json()
    path = f"/v1/jobs/{job['id']}"
    wait_until(lambda: web.get(path).json()["status"] == "done")
    return path


def make_entry(folder: Path, sizes: list[int]) -> CachedStems:
    stems = []
    for number, size in enumerate(sizes):
        path = folder / f"stem {number}é.wav"
        path.write_bytes(bytes(size))
        stems.append(CachedStem(f"stem {number}", path, size, str(size)))
    return CachedStems(folder, tuple(stems), {"a": 1})


@pytest.mark.parametrize("sizes", [[], [0], [1, 400, 2000], [2000] * 5, [700, 990, 5]])
@pytest.mark.parametrize("limit", [1000, 3000, 1 << 31], ids=["all zip64", "some zip64", "plain"])
def test_size_of_zip_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], limit: int
) -> None:
    """The limits are lowered, as files of gigabytes would take long."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(responses, "_ZIP64_BYTES", limit // 2)
    entry = make_entry(tmp_path, sizes)
    archive = b"".join(iter_zip(entry))
    assert zip_size(entry) == len(archive)
    assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None


def test_zip_has_length_and_ranges(web: TestClient) -> None:
    path = f"{make_job(web, 1)}/stems.zip"
    whole = web.get(path)
    size = len(whole.content)
    assert int(whole.headers["content-length"]) == size
    assert whole.headers["accept-ranges"] == "bytes"
    for wanted, expected in {
        "bytes=0-99": whole.content[:100],
        "bytes=1000-": whole.content[1000:],
        "bytes=-7": whole.content[-7:],
        f"bytes=5-{size + 9}": whole.content[5:],
    }.items():
        part = web.get(path, headers={"Range": wanted})
        assert part.status_code == 206 and part.content == expected
        assert part.headers["content-range"].endswith(f"/{size}")
    changed = web.get(path, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert changed.status_code == 200 and changed.content == whole.content
    for beyond in (f"bytes={size}-", "bytes=9-3"):
        response = web.get(path, headers={"Range": beyond})
        assert response.json()["error"]["code"] == "bad_range" and response.status_code == 416


@pytest.mark.parametrize("name", ["stems/bass", "stems.zip"])
def test_content_that_client_has_is_not_sent_again(web: TestClient, name: str) -> None:
    path = f"{make_job(web, 2)}/{name}"
    first = web.get(path)
    again = web.get(path, headers={"If-None-Match": f'"x", {first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert web.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    assert first.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize("path", ["/", "/docs", "/static/app.js"])
def test_page_that_browser_has_is_not_sent_again(web: TestClient, path: str) -> None:
    first = web.get(path)
    again = web.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")


def damage(data: Path) -> None:
    """Change a byte of the newest bass, and neither its size nor its time."""
    path = max(data.glob("results/*/bass.wav"), key=lambda one: one.stat().st_mtime_ns)
    content, status = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["stems/bass", "stems/vocals", "stems.zip"])
def test_damaged_stems_are_not_served(web: TestClient, data: Path, name: str) -> None:
    path = make_job(web, 3 + len(name))
    damage(data)
    response = web.get(f"{path}/{name}")
    assert (response.status_code, response.json()["error"]["code"]) == (410, "expired")


def test_damaged_stems_are_made_again(web: TestClient, data: Path) -> None:
    first = web.post("/v1/separate", params=PLAIN, content=song(0.3, 90))
    web.app.state.jobs.results._verified.clear()  # type: ignore[attr-defined]  # our app
    damage(data)
    again = web.post("/v1/separate", params=PLAIN, content=song(0.3, 90))
    assert again.headers["x-demucs-cached"] == "no"

    def stems_of(response: Any) -> list[bytes]:
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            return [archive.read(name) for name in archive.namelist() if name != "stems.json"]

    assert stems_of(again) == stems_of(first)


def test_files_are_for_the_user_of_the_server_alone(web: TestClient, data: Path) -> None:
    for path in (data / "uploads", data / "results", data / "jobs.sqlite"):
        assert path.stat().st_mode & 0o077 == 0


def test_stems_damaged_just_after_they_were_read_are_not_served(
    web: TestClient, data: Path
) -> None:
    address = f"{make_job(web, 91)}/stems/bass"
    assert [web.get(address).status_code for _ in range(2)] == [200, 200]
    damage(data)
    assert web.get(address).status_code == 410
