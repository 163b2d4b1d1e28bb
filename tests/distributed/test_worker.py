"""A worker returns one result for every row, and never raises for one."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from demucs_infer.cli.main import main
from demucs_infer.distributed.manifest import TrackRow
from tests.helpers.batch_runs import (
    batch_words,
    make_worker,
    read_table,
    row_of,
    sha256_of,
    write_manifest,
)
from tests.helpers.cli_process import tree, write_song
from tests.helpers.oracles import require_module


def test_every_row_has_a_result(repo: Path, tmp_path: Path) -> None:
    good = [row_of(write_song(tmp_path / f"{n}.wav", 1, seed=n)) for n in range(3)]
    (tmp_path / "bad.wav").write_bytes(b"RIFF0000WAVE")
    rows = [*good, row_of(tmp_path / "bad.wav"), row_of(tmp_path / "absent.wav")]
    worker = make_worker(repo, tmp_path / "out")
    results = {result["track"]: result for result in worker(rows)}
    assert Counter(result["status"] for result in results.values()) == {"done": 3, "failed": 2}
    assert results["bad.wav"]["fault"] == results["absent.wav"]["fault"] == "input"
    assert {result["status"] for result in worker(good)} == {"skipped"}


def test_invalid_file_names_fail_in_either_kind_of_table(repo: Path, tmp_path: Path) -> None:
    parquet = require_module("pyarrow.parquet")
    write_song(tmp_path / "good.wav", 1)
    not_utf8 = os.fsdecode(b"\xff.wav")  # valid, but not UTF-8
    (tmp_path / not_utf8).write_bytes((tmp_path / "good.wav").read_bytes())
    paths = ["\ud800.wav", "a\0.wav", "good.wav", not_utf8]
    manifest = write_manifest(tmp_path / "list.jsonl", [{"path": path} for path in paths])
    words = [*batch_words(manifest, repo, tmp_path / "out"), "--force", "--results"]
    for table in ("t.jsonl", "t.parquet"):
        assert main([*words, str(tmp_path / table)]) == 1
    rows = {row["track"]: (row["status"], row["fault"]) for row in read_table(tmp_path / "t.jsonl")}
    assert rows == {
        "\ud800.wav": ("failed", "input"), "a\0.wav": ("failed", "input"),
        "good.wav": ("done", ""), not_utf8: ("done", ""),
    }  # fmt: skip
    escaped = {path.encode(errors="backslashreplace").decode() for path in paths}
    table_rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert {row["track"] for row in table_rows} == escaped


def test_results_do_not_wait_for_later_rows(repo: Path, tmp_path: Path) -> None:
    path = write_song(tmp_path / "song.wav", 1)
    digest = sha256_of(path)
    worker = make_worker(repo, tmp_path / "out")
    assert next(worker([row_of(path)]))["status"] == "done"
    taken = 0

    def rows() -> Iterator[TrackRow]:
        nonlocal taken
        for taken in range(1, 201):
            yield row_of(path, sha256=digest) if taken % 2 else row_of(tmp_path / "absent.wav")

    for count, result in enumerate(worker(rows()), 1):
        assert result["status"] in ("skipped", "failed")
        assert taken - count < 10  # as many as are downloaded, read and uploaded at a time
    assert count == 200


def test_file_with_another_digest_is_not_separated(repo: Path, tmp_path: Path) -> None:
    path = write_song(tmp_path / "song.wav", 1)
    result = next(make_worker(repo, tmp_path / "out")([row_of(path, sha256="5" * 64)]))
    assert (result["status"], result["fault"]) == ("failed", "input")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in result["error"]
    assert tree(tmp_path) == ["song.wav"]


def test_unknown_model_fails_every_row(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    worker = make_worker(tmp_path / "repo", tmp_path / "out")
    results = list(worker([row_of(tmp_path / "a.wav"), row_of(tmp_path / "b.wav")]))
    assert [(row["status"], row["fault"]) for row in results] == [("failed", "model")] * 2


@pytest.mark.parametrize("out", ["memory://out", "local"])
def test_finished_track_with_digest_is_skipped_without_reading(
    repo: Path, tmp_path: Path, memory_store: object, out: str
) -> None:
    path = write_song(tmp_path / "song.wav", 1)
    row = row_of(path, sha256=sha256_of(path))
    worker = make_worker(repo, out if "://" in out else tmp_path / out)
    assert next(worker([row]))["status"] == "done"
    path.unlink()
    assert next(worker([row]))["status"] == "skipped"
