"""Links to finished jobs: they can be read with them, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from demucs_infer.server.sharing import SharedIds, read_key
from tests.helpers.server_process import client, song, wait_until

KEY = {"X-API-Key": "open sesame"}


def separate(web: TestClient) -> dict[str, Any]:
    job = web.post("/v1/jobs", content=song(0.5), headers=KEY).json()
    path = f"/v1/jobs/{job['id']}"
    assert job["shared_id"] is None, "it is not done"
    wait_until(lambda: web.get(path, headers=KEY).json()["status"] == "done")
    view: dict[str, Any] = web.get(path, headers=KEY).json()
    return view


def test_shared_id_gives_read_access_without_key(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path / "data", api_keys=("open sesame",), share_links=True) as web:
        job = separate(web)
        path = f"/v1/jobs/{job['shared_id']}"
        view = web.get(path).json()
        assert view["id"] == view["shared_id"] == job["shared_id"]
        assert job["id"] not in str(view), "the own id allows more"
        for end in ("/stems.zip", "/stems/bass", "/stems/bass/part", "/stems/bass/waveform"):
            assert web.get(path + end).status_code == 200, end
        events = web.get(f"{path}/events")
        assert events.status_code == 200 and job["id"] not in events.text
        for method, address in (("DELETE", path), ("GET", f"/v1/jobs/{job['id']}"),
                                ("GET", "/v1/jobs"), ("POST", "/v1/jobs"),
                                ("GET", "/v1/models")):  # fmt: skip
            assert web.request(method, address).status_code == 401, address
        assert web.delete(path, headers=KEY).status_code == 404
        assert web.get("/v1/jobs/shared-" + "0" * 32).status_code == 404
        assert web.delete(f"/v1/jobs/{job['id']}", headers=KEY).status_code == 204
        assert web.get(path).status_code == 404


def test_links_stay_valid_after_restart(tmp_path: Path) -> None:
    first = SharedIds(read_key(tmp_path / "links.key"), lambda: ["a", "b"])
    again = SharedIds(read_key(tmp_path / "links.key"), lambda: ["a", "b"])
    other = SharedIds(read_key(tmp_path / "other.key"), lambda: ["a", "b"])
    assert again.find(first.make("b")) == "b" and again.find(other.make("b")) is None
    assert (tmp_path / "links.key").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("keys", [(), ("open sesame",)], ids=["no keys", "keys"])
def test_no_links_without_the_setting(repo: Path, tmp_path: Path, keys: tuple[str, ...]) -> None:
    with client(repo, tmp_path / "data", api_keys=keys) as web:
        job = separate(web)
        assert job["shared_id"] is None
        shared = SharedIds(read_key(tmp_path / "links.key"), list).make(job["id"])
        assert web.get(f"/v1/jobs/{shared}").status_code == (401 if keys else 404)
