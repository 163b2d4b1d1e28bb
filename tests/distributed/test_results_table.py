"""The results table is complete, or beside its place as `.partial`."""

from pathlib import Path

import pytest

from demucs_infer.cli.main import main
from demucs_infer.distributed.manifest import ResultRow
from demucs_infer.distributed.results_table import open_table
from tests.helpers.batch_runs import batch_words, read_table, write_list
from tests.helpers.cli_process import tree, write_song
from tests.helpers.oracles import require_module


def test_json_lines_and_parquet_are_the_same_rows(tmp_path: Path) -> None:
    parquet = require_module("pyarrow.parquet")
    rows: list[ResultRow] = [
        {
            "track": f"{n}.wav", "model": "m", "status": "done", "manifest": None, "key": "k",
            "seconds": 1.0, "duration_seconds": 2.0, "resumed_seconds": 0.0, "gain": 1.0,
            "warnings": ["w"], "error": None, "fault": "", "stems": {"drums": "d.wav"},
            "scores": {"drums": 7.25},
        }
        for n in range(2500)
    ]  # fmt: skip
    for name in ("t.jsonl", "t.parquet"):
        with open_table(str(tmp_path / name)) as table:
            for row in rows:
                table.add(row)
    assert read_table(tmp_path / "t.jsonl") == rows
    parquet_rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    for row in parquet_rows:
        row |= {name: dict(row[name]) for name in ("stems", "scores")}
    assert parquet_rows == rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.csv", ".jsonl"),
        ("folder.jsonl", "must be a file"),
        ("nowhere://t.jsonl", "cannot be reached"),
    ],
    ids=["suffix", "folder", "no driver"],
)
def test_impossible_table_is_an_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    place = name if "://" in name else str(tmp_path / name)
    words = ["batch", str(write_list(tmp_path, "a.wav")), "-o", str(tmp_path / "out")]
    assert main([*words, "--results", place]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_table_appears_when_it_is_complete(tmp_path: Path) -> None:
    with open_table(str(tmp_path / "t.jsonl")) as table:
        table.add({"track": "a"})
        assert tree(tmp_path) == [".t.jsonl.partial.lock", "t.jsonl.partial"]
    assert tree(tmp_path) == ["t.jsonl"]


def test_interrupted_table_stays_beside_the_one_of_the_run_before(tmp_path: Path) -> None:
    path, partial = tmp_path / "t.jsonl", tmp_path / "t.jsonl.partial"
    with open_table(str(path)) as table:
        table.add({"track": "first run"})
    with pytest.raises(KeyboardInterrupt), open_table(str(path)) as table:
        table.add({"track": "second run"})
        assert "second run" in partial.read_text(), "written at once"
        raise KeyboardInterrupt
    assert "first run" in path.read_text() and "second run" in partial.read_text()
    with open_table(str(path)):
        pass
    assert tree(tmp_path) == ["t.jsonl"] and not path.read_text()


def test_two_runs_cannot_write_one_table(tmp_path: Path) -> None:
    place = str(tmp_path / "t.jsonl")
    with (
        open_table(place),
        pytest.raises(ValueError, match="another run is writing"),
        open_table(place),
    ):
        pass


def test_second_run_repeats_the_results_of_the_first(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "song.wav", 1)
    words = batch_words(write_list(tmp_path, "song.wav"), repo, tmp_path / "out")
    tables = []
    for _ in range(2):
        assert main(words) == 0
        tables += read_table(tmp_path / "out/results.jsonl")
    assert tables[0]["seconds"] > 0
    assert tables[1] == tables[0] | {"status": "skipped"}


def test_unknown_stems_leave_the_table_of_an_interrupted_run(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "song.wav", 1)
    partial = tmp_path / "out/results.jsonl.partial"
    words = batch_words(write_list(tmp_path, "song.wav"), repo, tmp_path / "out")
    words += ["--stems", "kazoo"]
    assert main(words) == 2
    assert not partial.parent.exists()
    partial.parent.mkdir()
    partial.write_text("an interrupted run")
    assert main(words) == 2
    assert tree(tmp_path / "out") == [partial.name]
    assert partial.read_text() == "an interrupted run"
