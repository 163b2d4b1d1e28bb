"""From and to an object store as it is spoken over HTTP: an S3 server of our own, and s3fs."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from demucs_infer.cli.main import main
from tests.helpers.cli_process import environment, make_repo, write_song
from tests.helpers.networks import need_module

MODEL = "9d0a6f1c"
STEMS = ("drums", "bass", "other", "vocals")

DIES_WHILE_SENDING = """
import os, signal, sys
from demucs_infer.distributed import storage
from demucs_infer.cli.main import main

whole = storage.upload

def put(source, place):
    if not place.endswith("vocals.wav"):
        return whole(source, place)
    system, path = storage._resolve(place)
    with system.open(path, "wb") as file:
        file.write(source.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

storage.upload = put
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    need_module("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The buckets `songs` and `stems`, both empty."""
    s3fs = need_module("s3fs")
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    found = s3fs.S3FileSystem()
    for bucket in ("songs", "stems"):
        if found.exists(bucket):
            found.rm(bucket, recursive=True)
        found.mkdir(bucket)
    yield found
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def words(store: Any, tmp_path: Path) -> list[str]:
    """The command for three songs and one that is not there."""
    for n in range(3):
        path = write_song(tmp_path / f"{n}.wav", 1 + n, seed=n)
        store.pipe_file(f"songs/album/{n}.wav", path.read_bytes())
    names = [*(f"album/{n}.wav" for n in range(3)), "album/absent.wav"]
    lines = [json.dumps({"path": name}) for name in names]
    store.pipe_file("songs/list.jsonl", "\n".join(lines).encode())
    repo = make_repo(tmp_path / "repo")
    flags = ["--repo", str(repo), "-n", MODEL, "-d", "cpu", "-q"]
    return ["batch", "s3://songs/list.jsonl", "-o", "s3://stems/out", *flags]


def objects(store: Any) -> dict[str, Any]:
    """When each object of the output came to be; asked of the server, not of a cache."""
    store.invalidate_cache()
    found = store.find("stems/out", detail=True)
    return {name: one["LastModified"] for name, one in found.items()}


def statuses(store: Any) -> dict[str, str]:
    lines = store.cat_file("stems/out/results.jsonl").decode().splitlines()
    return {row["track"]: row["status"] for row in map(json.loads, lines)}


def test_a_catalogue_in_a_bucket(store: Any, words: list[str], tmp_path: Path) -> None:
    assert main(words) == 1
    good = [f"album/{n}.wav" for n in range(3)]
    assert statuses(store) == dict.fromkeys(good, "done") | {"album/absent.wav": "failed"}
    made = objects(store)
    folders = [f"stems/out/{MODEL}/album/{n}-wav" for n in range(3)]
    names = [f"{folder}/{stem}.wav" for folder in folders for stem in STEMS]
    names += [f"{folder}/stems.json" for folder in folders]
    assert sorted(made) == sorted([*names, "stems/out/results.jsonl"])

    (tmp_path / "list.txt").write_text("".join(f"{n}.wav\n" for n in range(3)))
    here = [*words[:1], str(tmp_path / "list.txt"), "-o", str(tmp_path / "out"), *words[4:]]
    assert main(here) == 0
    for n, folder in enumerate(folders):
        for stem in STEMS:
            near = (tmp_path / f"out/{MODEL}/{n}-wav/{stem}.wav").read_bytes()
            assert store.cat_file(f"{folder}/{stem}.wav") == near

    runs: list[int] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: runs.append(1)):
        assert main(words) == 1
    assert statuses(store) == dict.fromkeys(good, "skipped") | {"album/absent.wav": "failed"}
    again = objects(store)
    assert not runs and all(again[name] == made[name] for name in names)


def test_a_process_killed_while_it_sends(store: Any, words: list[str]) -> None:
    """Half an object is none, and without a manifest the stems that are there do not count."""
    command = [sys.executable, "-c", DIES_WHILE_SENDING, *words]
    assert subprocess.run(command, env=environment() | dict(os.environ)).returncode < 0
    left = [name for name in objects(store) if "/0-wav/" in name]
    assert left and not any(name.endswith(("stems.json", "vocals.wav")) for name in left)
    assert main(words) == 1
    found = statuses(store)
    assert [found[f"album/{n}.wav"] for n in range(3)] == ["done"] * 3
    assert not any("/.partial/" in name for name in objects(store))
