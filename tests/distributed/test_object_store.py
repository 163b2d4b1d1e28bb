"""Tracks are read from, and stems written to, an S3 server over HTTP, through s3fs."""

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
from tests.helpers.batch_runs import MODEL, STEMS, batch_words, model_flags, write_list
from tests.helpers.cli_process import environment, write_song
from tests.helpers.oracles import require_module

CRASHES_DURING_UPLOAD = """
import os, signal, sys
from demucs_infer.system import storage
from demucs_infer.cli.main import main

upload = storage.upload

def crash_during_upload(source, location):
    if not location.endswith("vocals.wav"):
        return upload(source, location)
    filesystem, path = storage._resolve(location)
    with filesystem.open(path, "wb") as file:
        file.write(source.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

storage.upload = crash_during_upload
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    require_module("moto.server")
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
    """Create the buckets `songs` and `stems`, both empty."""
    s3fs = require_module("s3fs")
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    for bucket in ("songs", "stems"):
        if filesystem.exists(bucket):
            filesystem.rm(bucket, recursive=True)
        filesystem.mkdir(bucket)
    yield filesystem
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def words(store: Any, repo: Path, tmp_path: Path) -> list[str]:
    """Return the command line for three songs and an absent one."""
    for n in range(3):
        path = write_song(tmp_path / f"{n}.wav", 1 + n, seed=n)
        store.pipe_file(f"songs/album/{n}.wav", path.read_bytes())
    names = [*(f"album/{n}.wav" for n in range(3)), "album/absent.wav"]
    lines = [json.dumps({"path": name}) for name in names]
    store.pipe_file("songs/list.jsonl", "\n".join(lines).encode())
    return ["batch", "s3://songs/list.jsonl", *model_flags(repo), "-q", "-o", "s3://stems/out"]


def objects(store: Any) -> dict[str, Any]:
    """Return the modification time of each output object, from the server and not from a cache."""
    store.invalidate_cache()
    entries = store.find("stems/out", detail=True)
    return {name: entry["LastModified"] for name, entry in entries.items()}


def statuses(store: Any) -> dict[str, str]:
    lines = store.cat_file("stems/out/results.jsonl").decode().splitlines()
    return {row["track"]: row["status"] for row in map(json.loads, lines)}


GOOD = [f"album/{n}.wav" for n in range(3)]
FOLDERS = [f"stems/out/{MODEL}/album/{n}-wav" for n in range(3)]
ABSENT = {"album/absent.wav": "failed"}


def test_objects_are_the_same_bytes_as_local_stems(
    store: Any, words: list[str], repo: Path, tmp_path: Path
) -> None:
    assert main(words) == 1
    assert statuses(store) == dict.fromkeys(GOOD, "done") | ABSENT
    names = [f"{folder}/{stem}.wav" for folder in FOLDERS for stem in STEMS]
    names += [f"{folder}/stems.json" for folder in FOLDERS]
    assert sorted(objects(store)) == sorted([*names, "stems/out/results.jsonl"])

    manifest = write_list(tmp_path, *(f"{n}.wav" for n in range(3)))
    assert main(batch_words(manifest, repo, tmp_path / "out")) == 0
    for n, folder in enumerate(FOLDERS):
        for stem in STEMS:
            local = (tmp_path / f"out/{MODEL}/{n}-wav/{stem}.wav").read_bytes()
            assert store.cat_file(f"{folder}/{stem}.wav") == local


def test_second_run_changes_no_object(store: Any, words: list[str]) -> None:
    assert main(words) == 1
    before = objects(store)
    runs: list[int] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: runs.append(1)):
        assert main(words) == 1
    assert statuses(store) == dict.fromkeys(GOOD, "skipped") | ABSENT
    after = objects(store)
    before.pop("stems/out/results.jsonl"), after.pop("stems/out/results.jsonl")
    assert not runs and after == before


def test_crash_during_an_upload_leaves_no_finished_track(store: Any, words: list[str]) -> None:
    """Without its manifest, the stems of a track do not count; the next run repeats it."""
    command = [sys.executable, "-c", CRASHES_DURING_UPLOAD, *words]
    assert subprocess.run(command, env=environment() | dict(os.environ)).returncode < 0
    left = [name for name in objects(store) if "/0-wav/" in name]
    assert left and not any(name.endswith(("stems.json", "vocals.wav")) for name in left)
    assert main(words) == 1
    results = statuses(store)
    assert [results[name] for name in GOOD] == ["done"] * 3
    assert not any("/.partial/" in name for name in objects(store))
