"""Tracks of several clients that are separated at the same time."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import soundfile
from fastapi.testclient import TestClient

from demucs_infer.server.schemas import MIME_TYPES
from tests.helpers.server_process import client, song, wait_until

KEYS = {"a": "the key of a", "b": "the key of b", "c": "the key of c"}


def decode(data: bytes) -> Any:
    return soundfile.read(io.BytesIO(data), always_2d=True)[0]


class Load:
    """Jobs that are sent while the networks stand still, until `run`."""

    def __init__(self, web: TestClient) -> None:
        self.web = web
        self.jobs: list[str] = []
        self.gate = threading.Event()
        self.queue: Any = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        self.observe = self.queue.on_batch
        self.queue.on_batch = self.wait_and_observe

    def wait_and_observe(self, size: int) -> None:
        assert self.gate.wait(60)
        self.observe(size)

    def send(self, key: str, seconds: float, seed: int, **parameters: str) -> str:
        sent = self.web.post(
            "/v1/jobs",
            params={"shifts": "0", "clip": "clamp"} | parameters,
            content=song(seconds, seed),
            headers={"X-API-Key": KEYS[key]},
        )
        self.jobs.append(sent.json()["id"])
        return self.jobs[-1]

    def status(self, id: str) -> str:
        return str(self.queue.get_record(id).status)

    def run(self) -> list[str]:
        """Let the networks run, and return the jobs in the order in which they ended."""
        self.gate.set()
        wait_until(lambda: all(self.queue.get_record(id).is_final for id in self.jobs))
        return sorted(self.jobs, key=lambda id: float(self.queue.get_record(id).finished))


def test_one_song_does_not_wait_for_ten_of_another_client(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, api_keys=tuple(KEYS.values())) as web:
        load = Load(web)
        many = [load.send("a", 6.0, seed) for seed in range(10)]
        assert [load.status(id) for id in many].count("running") == 3  # one place is kept
        single = load.send("b", 6.0, 99)
        assert load.status(single) == "running"
        order = load.run()
        assert {load.status(id) for id in load.jobs} == {"done"}
        assert order.index(single) < 5
        metrics = web.get("/metrics", headers={"X-API-Key": KEYS["a"]}).text
        assert 'demucs_batch_windows_bucket{le="1.0"}' in metrics  # on a CPU, one by one
        assert "demucs_batch_windows_count 0.0" not in metrics


def test_short_song_does_not_wait_for_long_ones_of_the_same_client(
    repo: Path, tmp_path: Path
) -> None:
    with client(repo, tmp_path, api_keys=tuple(KEYS.values())) as web:
        load = Load(web)
        long = [load.send("a", 20.0, seed) for seed in range(4)]
        assert [load.status(id) for id in long] == ["running"] * 3 + ["queued"]
        short = load.send("a", 2.0, 9)
        assert load.status(short) == "running"
        assert load.run()[0] == short


def test_places_go_to_clients_in_turn(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, api_keys=tuple(KEYS.values()), max_tracks=1) as web:
        load = Load(web)
        first = [load.send("a", 1.0, seed) for seed in range(3)]
        others = [load.send(key, 1.0, 10 + seed) for seed, key in enumerate("bc")]
        assert [load.status(id) for id in load.jobs].count("running") == 1
        assert load.run() == [first[0], *others, *first[1:]]


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
def test_stem_is_streamed_while_it_is_made(repo: Path, tmp_path: Path, format: str) -> None:
    with client(repo, tmp_path, api_keys=tuple(KEYS.values())) as web:
        load = Load(web)
        id = load.send("a", 6.0, 1, format=format)
        where, headers = f"/v1/jobs/{id}/stems/bass", {"X-API-Key": KEYS["a"]}
        wait_until(
            lambda: load.queue.get_job(id).live and load.queue.get_job(id).live.folder.exists()
        )
        assert web.get(where, headers=headers).status_code == 409
        assert web.get(f"/v1/jobs/{id}/stems/flute?live=1", headers=headers).status_code == 404
        refused = web.get(f"{where}?live=1&format=opus", headers=headers)
        assert refused.status_code == 422 and "'wav', 'flac' or 'mp3'" in refused.text
        wait_until(lambda: (load.queue.get_job(id).live.folder / "samples.f32").exists())
        assert len(web.get(f"{where}/part", headers=headers).content) == 44  # nothing there yet
        threading.Timer(0.2, load.gate.set).start()  # the response waits for the networks
        live = web.get(f"{where}?live=1&format={format}", headers=headers)
        assert live.status_code == 200
        assert live.headers["content-type"] == MIME_TYPES[format]
        size = live.headers.get("content-length")
        assert size == (str(len(live.content)) if format == "wav" else None)
        load.run()
        final = web.get(where, headers=headers)
        assert web.get(f"{where}?live=1", headers=headers).content == final.content
        assert (decode(live.content) == decode(final.content)).all()


def test_cancelled_track_does_not_disturb_others(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, api_keys=tuple(KEYS.values())) as web:
        load = Load(web)
        good = load.send("a", 3.0, 1)
        cancelled = load.send("c", 6.0, 3)
        web.delete(f"/v1/jobs/{cancelled}", headers={"X-API-Key": KEYS["c"]})
        load.run()
        assert [load.status(id) for id in (good, cancelled)] == ["done", "cancelled"]
