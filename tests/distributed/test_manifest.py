"""Manifests of all formats give the same rows, and bad ones one clear error."""

from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given
from hypothesis import strategies as st

from demucs_infer.cli.main import main
from demucs_infer.distributed.manifest import TrackManifest, TrackRow
from tests.helpers.batch_runs import write_manifest

ROWS: list[dict[str, Any]] = [
    {"path": "a/one.wav", "duration": 3.5, "references": "true/one", "sha256": None},
    {"path": "/b/two, too.flac", "duration": None, "references": None, "sha256": "5" * 64},
    {"path": "s3://bucket/ü.mp3", "duration": 0.0, "references": None, "sha256": None},
]


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet", "list.txt"])
def test_paths_are_the_same_in_all_formats(tmp_path: Path, name: str) -> None:
    rows = list(TrackManifest(location=str(write_manifest(tmp_path / name, ROWS))))
    sources = [str(tmp_path / "a/one.wav"), "/b/two, too.flac", "s3://bucket/ü.mp3"]
    assert [row.source for row in rows] == sources
    assert [row.path for row in rows] == [row["path"] for row in ROWS]
    assert [(row.folder, row.name) for row in rows] == [
        ("a", "one.wav"), ("b", "two, too.flac"), ("bucket", "ü.mp3"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet"])
def test_other_columns_are_the_same_in_all_formats(tmp_path: Path, name: str) -> None:
    rows = list(TrackManifest(location=str(write_manifest(tmp_path / name, ROWS))))
    assert [row.duration for row in rows] == [3.5, None, 0.0]
    assert rows[0].references == str(tmp_path / "true/one")
    assert rows[1].sha256 == "5" * 64


@given(st.integers(0, 40), st.integers(1, 9))
def test_shards_are_a_partition(tracks: int, count: int) -> None:
    MemoryFileSystem().pipe_file("/list.txt", "".join(f"{n}.wav\n" for n in range(tracks)).encode())
    shards = [
        list(TrackManifest(location="memory://list.txt", shard=(i, count))) for i in range(count)
    ]
    numbers = sorted(int(row.name.removesuffix(".wav")) for shard in shards for row in shard)
    assert numbers == list(range(tracks))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.text(min_size=1))
@example("../../a.wav")
@example("s3://../a/../../a.wav")
@example("C:\\..\\a.wav")
def test_no_path_leaves_the_output_folder(path: str) -> None:
    row = TrackRow(path=path, source=path)
    assert not Path(row.folder).is_absolute() and ".." not in Path(row.folder).parts
    assert "/" not in row.name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.jsonl", '{"path": "a.wav"}\nnothing', "line 2"),
        ("list.jsonl", "[1]", "must be a JSON object"),
        ("list.csv", "file\na.wav\n", "expected a column `path`, found file"),
        ("list.csv", "path,duration\na.wav,long\n", "'long' must be a number of seconds"),
        ("list.csv", "path,duration\na.wav,nan\n", "must be a number of seconds"),
        ("list.csv", "file,more\na.wav,b,c,d\n", "expected a column `path`, found file, more"),
        ("list.csv", 'path,text\na.wav,x\nb.wav,"' + "y" * 200_000, "after row 1: field larger"),
        ("list.jsonl", '{"path": NaN}', "path nan must be text"),
        ("list.jsonl", '{"path":' + "[" * 100_000, "list.jsonl"),
        ("list.csv", 'path\na.wav\n"b.wav\nc.wav\n', "after row 1: unexpected end"),
        ("list.csv", "path,path\na.wav,b.wav\n", "several columns 'path'"),
        ("list.txt", "a\0b", "not a UTF-8 list of paths"),
        ("list.json", '[{"path": "a.wav"}]', "not a UTF-8 list of paths"),
        ("list.jsonl", '{"path": "a", "duration": Infinity}', "must be a number of seconds"),
        ("list.jsonl", '{"path": "a", "duration": 1e300}', "must be a number of seconds"),
        ("list.jsonl", '{"path": "a", "duration": true}', "must be a number of seconds"),
        ("list.jsonl", '{"path": "a", "sha256": 5}', "64 hexadecimal digits"),
        ("list.jsonl", '{"path": "a", "references": ["b"]}', "path of a folder"),
        ("list.parquet", "nothing of the kind", "list.parquet"),
    ],
    ids=[
        "JSON syntax", "JSON without object", "no path", "duration is text", "duration is NaN",
        "too many cells", "huge cell", "path is no text", "deep JSON", "open quotation mark",
        "two path columns", "zero byte", "JSON array", "infinite duration", "endless duration",
        "duration is a truth value", "sha256 is a number", "references are a list", "no Parquet",
    ],
)  # fmt: skip
def test_malformed_manifests_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main(["batch", str(path), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--plan"]], ids=["run", "plan"])
@pytest.mark.parametrize("kind", ["absent", "folder", "UTF-16"])
def test_unreadable_manifests_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, flags: list[str]
) -> None:
    path = tmp_path / "list.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "UTF-16":
        path.write_text("path\na.wav\n", "utf-16")
    assert main(["batch", str(path), "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and len(error.splitlines()) == 1
    assert kind != "UTF-16" or "save it as UTF-8" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shard", "message"), [("3/3", "from 0/3 to 2/3"), ("1/0", "must be at least 1")]
)
def test_impossible_shards_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shard: str, message: str
) -> None:
    assert main(["batch", str(tmp_path / "list.txt"), "--shard", shard]) == 2
    assert message in capsys.readouterr().err
