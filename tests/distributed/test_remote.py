"""Tracks are downloaded from URIs and stems uploaded to URIs, the same bytes as local ones."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from demucs_infer.distributed.manifest import TrackRow
from tests.helpers.batch_runs import MODEL, STEMS, make_worker, row_of, sha256_of
from tests.helpers.cli_process import write_song


@pytest.fixture
def rows(memory_store: Any, tmp_path: Path) -> list[TrackRow]:
    """Two songs, at URIs and as local files."""
    paths = [write_song(tmp_path / f"in/{n}.wav", 1 + n, seed=n) for n in range(2)]
    for path in paths:
        memory_store.pipe_file(f"/in/{path.name}", path.read_bytes())
    return [TrackRow(path=f"in/{path.name}", source=f"memory://in/{path.name}") for path in paths]


def test_remote_stems_are_the_same_bytes_as_local_ones(
    repo: Path, tmp_path: Path, memory_store: Any, rows: list[TrackRow]
) -> None:
    results = list(make_worker(repo, "memory://out")(rows))
    assert [result["status"] for result in results] == ["done", "done"]
    assert results[0]["stems"]["drums"] == f"memory://out/{MODEL}/in/0/drums.wav"

    list(make_worker(repo, tmp_path / "out")([row_of(tmp_path / row.path) for row in rows]))
    for n in range(2):
        for stem in STEMS:
            written = memory_store.cat_file(f"/out/{MODEL}/in/{n}/{stem}.wav")
            assert written == (tmp_path / f"out/{MODEL}/{n}/{stem}.wav").read_bytes()
    assert len(memory_store.find("/out")) == 2 * 5, "only stems and manifests are left"


def test_finished_remote_tracks_are_skipped(
    repo: Path, memory_store: Any, rows: list[TrackRow]
) -> None:
    first = list(make_worker(repo, "memory://out")(rows))
    runs: list[int] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: runs.append(1)):
        again = list(make_worker(repo, "memory://out")(rows))
    assert [result["status"] for result in again] == ["skipped", "skipped"] and not runs
    assert again[0]["stems"] == first[0]["stems"]


def test_malformed_remote_manifest_is_replaced(
    repo: Path, memory_store: Any, rows: list[TrackRow]
) -> None:
    worker = make_worker(repo, "memory://out")
    next(worker(rows[:1]))
    manifest = f"/out/{MODEL}/in/0/stems.json"
    half = memory_store.cat_file(manifest)[:99]
    for content in (half, b"[]", b'{"schema": 1, "key": 0}', b"\xff"):
        memory_store.pipe_file(manifest, content)
        assert next(worker(rows[:1]))["status"] == "done"


def test_finished_remote_track_with_digest_is_skipped_without_download(
    repo: Path, tmp_path: Path, memory_store: Any, rows: list[TrackRow]
) -> None:
    digest = sha256_of(tmp_path / "in/0.wav")
    row = TrackRow(path="0.wav", source=rows[0].source, sha256=digest)
    worker = make_worker(repo, "memory://out")
    assert next(worker([row]))["status"] == "done"
    memory_store.rm_file("/in/0.wav")
    assert next(worker([row]))["status"] == "skipped"


@pytest.mark.parametrize(
    ("source", "fault", "message"),
    [
        ("memory://in/absent.wav", "input", "cannot be downloaded"),
        ("nowhere://in/x.wav", "other", "cannot be reached"),
    ],
    ids=["absent", "no driver"],
)
def test_failed_download_is_a_result(
    repo: Path, memory_store: Any, source: str, fault: str, message: str
) -> None:
    result = next(make_worker(repo, "memory://out")([TrackRow(path="x", source=source)]))
    assert (result["status"], result["fault"]) == ("failed", fault)
    assert message in result["error"]


class CrashError(BaseException):
    """As near to a crash as a test can come: all that is not an `Exception` ends the worker."""


def test_remote_journal_counts_crashes_of_the_guilty_track_only(
    repo: Path, tmp_path: Path, memory_store: Any, one_thread: None
) -> None:
    rows = [row_of(write_song(tmp_path / f"{n}.wav", 1, seed=n)) for n in range(3)]
    journals: list[dict[str, bytes]] = []

    def crash(module: nn.Module, inputs: object) -> None:
        deadline = time.monotonic() + 10
        while not journals and len(memory_store.find("/out")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # until an attempt of the next track is registered too
        journals.append({name: memory_store.cat_file(name) for name in memory_store.find("/out")})
        raise CrashError

    for _ in range(2):
        hook = nn.modules.module.register_module_forward_pre_hook(crash)
        with hook, pytest.raises(CrashError):
            list(make_worker(repo, "memory://out")(rows))
    counts = [[json.loads(text)["kills"] for text in journal.values()] for journal in journals]
    assert [max(kills) for kills in counts] == [0, 1], "of the attempts before"
    results = list(make_worker(repo, "memory://out")(rows))
    assert {result["track"]: result["status"] for result in results} == {
        "0.wav": "quarantined", "1.wav": "done", "2.wav": "done",
    }  # fmt: skip
