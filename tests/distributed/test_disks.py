"""A full disk is reported as one, and counts against no track."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.cli.main import main
from demucs_infer.distributed import results_table
from demucs_infer.distributed.manifest import ResultRow, TrackRow
from tests.helpers.batch_runs import batch_words, make_worker, write_list
from tests.helpers.cli_process import write_song


@pytest.mark.parametrize(
    ("step", "message"),
    [("download", "cannot be downloaded"), ("upload", "cannot be uploaded")],
)
def test_full_disk_during_transfer_is_a_fault_of_the_disk(
    memory_store: Any,
    repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    message: str,
) -> None:
    def raise_disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    memory_store.pipe_file("/in/song.wav", write_song(tmp_path / "song.wav", 1).read_bytes())
    monkeypatch.setattr(f"demucs_infer.system.storage.{step}", raise_disk_full)
    row = TrackRow(path="song.wav", source="memory://in/song.wav")
    result = next(make_worker(repo, "memory://out")([row]))
    assert (result["status"], result["fault"]) == ("failed", "disk")
    assert message in result["error"]


def test_full_disk_under_the_results_table_ends_the_run(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracks in progress are not counted as crashed."""

    def raise_disk_full(table: Any, row: ResultRow) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.jsonl")

    monkeypatch.setattr(results_table._JsonLinesTable, "add", raise_disk_full)
    for n in range(4):
        write_song(tmp_path / f"{n}.wav", 3, seed=n)
    manifest = write_list(tmp_path, *(f"{n}.wav" for n in range(4)))
    assert main(batch_words(manifest, repo, tmp_path / "out")) == 1
    assert capsys.readouterr().err == "error: results.jsonl: No space left on device\n"
    assert not list(tmp_path.rglob("attempts"))
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("demucs-")]
