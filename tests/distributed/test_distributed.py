"""A catalogue in one process, in shards, on Ray and at URIs: the same stems, whoever dies."""

import csv
import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from demucs_infer.api import Separator
from demucs_infer.audio.writer import save_audio
from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.cli.main import main
from demucs_infer.distributed import results_table as table_room
from demucs_infer.distributed.benchmark import measure
from demucs_infer.distributed.manifest import ResultRow, TrackManifest, TrackRow
from demucs_infer.distributed.planner import Benchmark, plan
from demucs_infer.distributed.results_table import open_table
from demucs_infer.distributed.worker import TrackWorker, WorkerConfig
from tests.helpers.cli_process import RATE, environment, load, make_repo, save, tree, write_song
from tests.helpers.networks import RecordingModel, need_module, noise
from tools import simulate_cluster

MODEL = "9d0a6f1c"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("distributed") / "repo")


# ── manifests ──

TRACKS: list[dict[str, Any]] = [
    {"path": "a/one.wav", "duration": 3.5, "references": "true/one", "sha256": None},
    {"path": "/b/two, too.flac", "duration": None, "references": None, "sha256": "5" * 64},
    {"path": "s3://bucket/ü.mp3", "duration": 0.0, "references": None, "sha256": None},
]


def write_manifest(path: Path, tracks: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*tracks[0], "ignored"])
            writer.writeheader()
            writer.writerows({**track, "ignored": "x"} for track in tracks)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(track | {"ignored": [1]}) for track in tracks))
    elif path.suffix == ".parquet":
        pyarrow, parquet = need_module("pyarrow"), need_module("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(tracks), path)
    else:
        path.write_text("".join(f"{track['path']}\n\n" for track in tracks))
    return path


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet", "list.txt"])
def test_a_manifest_means_the_same_however_it_is_written(tmp_path: Path, name: str) -> None:
    rows = list(TrackManifest(manifest=str(write_manifest(tmp_path / name, TRACKS))))
    sources = [str(tmp_path / "a/one.wav"), "/b/two, too.flac", "s3://bucket/ü.mp3"]
    assert [row.source for row in rows] == sources
    assert [row.path for row in rows] == [track["path"] for track in TRACKS]
    assert [(row.folder, row.name) for row in rows] == [
        ("a", "one.wav"), ("b", "two, too.flac"), ("bucket", "ü.mp3"),
    ]  # fmt: skip
    if name != "list.txt":
        assert [row.duration for row in rows] == [3.5, None, 0.0]
        assert rows[0].references == str(tmp_path / "true/one")
        assert rows[1].sha256 == "5" * 64


@given(st.integers(0, 40), st.integers(1, 9))
def test_shards_are_a_partition(tracks: int, count: int) -> None:
    places_of = pytest.importorskip("fsspec").filesystem("memory")
    places_of.pipe_file("/list.txt", "".join(f"{n}.wav\n" for n in range(tracks)).encode())
    shards = [
        list(TrackManifest(manifest="memory://list.txt", shard=(i, count))) for i in range(count)
    ]
    found = sorted(int(row.name.removesuffix(".wav")) for shard in shards for row in shard)
    assert found == list(range(tracks))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.text(min_size=1))
@example("../../a.wav")
@example("s3://../a/../../a.wav")
@example("C:\\..\\a.wav")
def test_no_path_leads_out_of_the_output_folder(path: str) -> None:
    row = TrackRow(path=path, source=path)
    assert not Path(row.folder).is_absolute() and ".." not in Path(row.folder).parts
    assert "/" not in row.name


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("list.jsonl", '{"path": "a.wav"}\nnothing', "line 2"),
        ("list.jsonl", "[1]", "must be a JSON object"),
        ("list.csv", "file\na.wav\n", "expected a `path`, found file"),
        ("list.csv", "path,duration\na.wav,long\n", "'long' is no number of seconds"),
        ("list.csv", "path,duration\na.wav,nan\n", "no number of seconds"),
        ("list.csv", "file,more\na.wav,b,c,d\n", "expected a `path`, found file, more"),
        ("list.csv", 'path,text\na.wav,x\nb.wav,"' + "y" * 200_000, "after row 1: field larger"),
        ("list.jsonl", '{"path": NaN}', "path nan must be text"),
        ("list.jsonl", '{"path":' + "[" * 100_000, "list.jsonl"),
        ("list.csv", 'path\na.wav\n"b.wav\nc.wav\n', "after row 1: unexpected end"),
        ("list.csv", "path,path\na.wav,b.wav\n", "several columns 'path'"),
        ("list.txt", "a\0b", "no list of paths"),
        ("list.json", '[{"path": "a.wav"}]', "no list of paths"),
        ("list.jsonl", '{"path": "a", "duration": Infinity}', "no number of seconds"),
        ("list.jsonl", '{"path": "a", "duration": 1e300}', "no number of seconds"),
        ("list.jsonl", '{"path": "a", "duration": true}', "no number of seconds"),
        ("list.jsonl", '{"path": "a", "sha256": 5}', "64 hexadecimal digits"),
        ("list.jsonl", '{"path": "a", "references": ["b"]}', "path of a folder"),
        ("list.parquet", "nothing of the kind", "list.parquet"),
    ],
)
def test_a_manifest_that_cannot_be_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main(["batch", str(path), "-o", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["absent", "a folder", "UTF-16"])
def test_a_manifest_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path = tmp_path / "list.csv"
    if how == "a folder":
        path.mkdir()
    elif how == "UTF-16":
        path.write_text("path\na.wav\n", "utf-16")
    for flags in ([], ["--plan"]):
        assert main(["batch", str(path), "-o", str(tmp_path / "out"), *flags]) == 2
        told = capsys.readouterr().err
        assert str(path) in told and len(told.splitlines()) == 1
        assert how != "UTF-16" or "save it as UTF-8" in told
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", str(tmp_path / "list.txt"), "--shard", "3/3"]) == 2
    assert "from 0/3 to 2/3" in capsys.readouterr().err
    assert main(["batch", str(tmp_path / "list.txt"), "--shard", "1/0"]) == 2
    assert "one shard at least" in capsys.readouterr().err


# ── one process ──


def worker_of(repo: Path, out: str, **more: Any) -> TrackWorker:
    return TrackWorker(
        WorkerConfig(
            model=ModelSpec(name=MODEL, repo=repo),
            order=SeparationRequest(),
            out=out,
            device="cpu",
            **more,
        )
    )


def row_of(path: Path, **more: Any) -> TrackRow:
    return TrackRow(path=path.name, source=str(path), **more)


def test_every_row_has_an_answer(repo: Path, tmp_path: Path) -> None:
    good = [row_of(write_song(tmp_path / f"{n}.wav", 1, seed=n)) for n in range(3)]
    (tmp_path / "bad.wav").write_bytes(b"RIFF0000WAVE")
    rows = [*good, row_of(tmp_path / "bad.wav"), row_of(tmp_path / "absent.wav")]
    worker = worker_of(repo, str(tmp_path / "out"))
    found = {answer["track"]: answer for answer in worker(rows)}
    assert Counter(answer["status"] for answer in found.values()) == {"done": 3, "failed": 2}
    assert found["bad.wav"]["fault"] == found["absent.wav"]["fault"] == "input"
    assert {answer["status"] for answer in worker(good)} == {"skipped"}


def test_names_that_no_file_can_have(repo: Path, tmp_path: Path) -> None:
    """A half of a letter, and a zero: each is a row that failed, in either kind of table."""
    parquet = need_module("pyarrow.parquet")
    write_song(tmp_path / "good.wav", 1)
    odd = os.fsdecode(b"\xff.wav")  # one that a file can have, but that is no UTF-8
    (tmp_path / odd).write_bytes((tmp_path / "good.wav").read_bytes())
    paths = ["\ud800.wav", "a\0.wav", "good.wav", odd]
    manifest = write_manifest(tmp_path / "list.jsonl", [{"path": path} for path in paths])
    words = ["batch", str(manifest), "--repo", str(repo), "-n", MODEL, "-d", "cpu", "-q"]
    words += ["-o", str(tmp_path / "out"), "--force", "--results"]
    for table in ("t.jsonl", "t.parquet"):
        assert main([*words, str(tmp_path / table)]) == 1
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text("utf-8").splitlines()]
    found = {one["track"]: (one["status"], one["fault"]) for one in rows}
    assert found == {
        "\ud800.wav": ("failed", "input"), "a\0.wav": ("failed", "input"),
        "good.wav": ("done", ""), odd: ("done", ""),
    }  # fmt: skip
    told = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    shown = {path.encode(errors="backslashreplace").decode() for path in paths}
    assert {one["track"] for one in told} == shown


def test_answers_come_as_soon_as_they_are_known(repo: Path, tmp_path: Path) -> None:
    """However many rows are done: none of them waits for those behind it."""
    path = write_song(tmp_path / "song.wav", 1)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    worker = worker_of(repo, str(tmp_path / "out"))
    assert next(worker([row_of(path)]))["status"] == "done"
    taken = 0

    def rows() -> Iterator[TrackRow]:
        nonlocal taken
        for taken in range(1, 201):
            yield row_of(path, sha256=digest) if taken % 2 else row_of(tmp_path / "absent.wav")

    for count, answer in enumerate(worker(rows()), 1):
        assert answer["status"] in ("skipped", "failed")
        assert taken - count < 10  # as many as are fetched, read and sent at a time
    assert count == 200


def test_another_file_than_was_listed_is_not_separated(repo: Path, tmp_path: Path) -> None:
    path = write_song(tmp_path / "song.wav", 1)
    worker = worker_of(repo, str(tmp_path / "out"))
    answer = next(worker([row_of(path, sha256="5" * 64)]))
    assert (answer["status"], answer["fault"]) == ("failed", "input")
    assert "another file than was listed" in answer["error"]
    assert tree(tmp_path) == ["song.wav"]


def test_a_model_that_cannot_be_had_is_an_answer(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    worker = worker_of(tmp_path / "repo", str(tmp_path / "out"))
    answers = list(worker([row_of(tmp_path / "a.wav")]))
    assert [(answer["status"], answer["fault"]) for answer in answers] == [("failed", "model")]


def test_scores_where_the_truth_is_known(repo: Path, tmp_path: Path) -> None:
    path = write_song(tmp_path / "song.wav", 1)
    worker = worker_of(repo, str(tmp_path / "out"))
    made = next(worker([row_of(path)]))["stems"]
    truth = tmp_path / "truth"
    truth.mkdir()
    for stem in ("drums", "vocals"):
        wav = torch.from_numpy(load(Path(made[stem]))).T
        # An error of a tenth: 20 dB below what is true.
        save(truth / f"{stem}.wav", 1.1 * wav if stem == "drums" else wav, subtype="FLOAT")
    again = next(worker([row_of(path, references=str(truth))]))
    assert again["status"] == "skipped", "scoring separates nothing"
    assert again["scores"]["drums"] == pytest.approx(20.83, abs=0.05)  # 20 log10(1.1 / 0.1)
    assert set(again["scores"]) == {"drums", "vocals"}

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    unread = next(worker([row_of(path, references=str(truth), sha256=digest)]))
    assert unread["scores"] == again["scores"]
    kept = json.loads((tmp_path / f"out/{MODEL}/song/scores.json").read_text())
    assert kept["scores"] == again["scores"]
    for odd in ("{", "[]", '{"of": 1}', json.dumps({"of": kept["of"]}), "null"):
        (tmp_path / f"out/{MODEL}/song/scores.json").write_text(odd)
        assert next(worker([row_of(path, references=str(truth))]))["scores"] == again["scores"]

    for file in truth.iterdir():
        save(file, noise(2, 77), subtype="FLOAT")
    other = next(worker([row_of(path, references=str(truth))]))
    assert other["status"] == "skipped" and "not scored" in other["warnings"][0]


# ── places that only fsspec reaches ──


@pytest.fixture
def far() -> Any:
    need_module("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return MemoryFileSystem()


@pytest.mark.parametrize(("step", "said"), [("download", "fetched"), ("upload", "delivered")])
def test_a_full_disk_on_the_way_is_no_fault_of_the_track(
    far: Any, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, said: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = write_song(tmp_path / "song.wav", 1)
    far.pipe_file("/full/song.wav", path.read_bytes())
    monkeypatch.setattr(f"demucs_infer.distributed.storage.{step}", full)
    row = TrackRow(path="song.wav", source="memory://full/song.wav")
    answer = next(worker_of(repo, "memory://out")([row]))
    assert (answer["status"], answer["fault"]) == ("failed", "disk")
    assert f"cannot be {said}" in answer["error"]


def test_from_uri_to_uri_the_same_bytes(repo: Path, tmp_path: Path, far: Any) -> None:
    paths = [write_song(tmp_path / f"in/{n}.wav", 1 + n, seed=n) for n in range(2)]
    for path in paths:
        far.pipe_file(f"/in/{path.name}", path.read_bytes())
    rows = [TrackRow(path=f"in/{path.name}", source=f"memory://in/{path.name}") for path in paths]
    answers = list(worker_of(repo, "memory://out")(rows))
    assert [answer["status"] for answer in answers] == ["done", "done"]
    assert answers[0]["stems"]["drums"] == f"memory://out/{MODEL}/in/0/drums.wav"

    near = worker_of(repo, str(tmp_path / "out"))
    list(near([row_of(path) for path in paths]))
    for path in paths:
        for stem in ("drums", "bass", "other", "vocals"):
            written = far.cat_file(f"/out/{MODEL}/in/{path.stem}/{stem}.wav")
            assert written == (tmp_path / f"out/{MODEL}/{path.stem}/{stem}.wav").read_bytes()
    names = far.find("/out")
    assert len(names) == 2 * 5, "stems, manifests and nothing else"

    runs: list[int] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: runs.append(1)):
        again = list(worker_of(repo, "memory://out")(rows))
    assert [answer["status"] for answer in again] == ["skipped", "skipped"] and not runs
    assert again[0]["stems"] == answers[0]["stems"]

    where = f"/out/{MODEL}/in/0/stems.json"  # half of it, or none of ours: made again
    for odd in (far.cat_file(where)[:99], b"[]", b'{"schema": 1, "key": 0}', b"\xff"):
        far.pipe_file(where, odd)
        assert next(worker_of(repo, "memory://out")(rows[:1]))["status"] == "done"


def test_a_known_digest_saves_the_reading(repo: Path, tmp_path: Path, far: Any) -> None:
    path = write_song(tmp_path / "song.wav", 1)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    far.pipe_file("/in/song.wav", path.read_bytes())
    row = TrackRow(path="song.wav", source="memory://in/song.wav", sha256=digest)
    near = TrackRow(path="song.wav", source=str(path), sha256=digest)
    outs = {"memory://out": row, str(tmp_path / "out"): near}
    assert [next(worker_of(repo, out)([r]))["status"] for out, r in outs.items()] == ["done"] * 2
    far.rm_file("/in/song.wav")
    path.unlink()
    assert [next(worker_of(repo, out)([r]))["status"] for out, r in outs.items()] == ["skipped"] * 2


def test_what_cannot_be_fetched_is_an_answer(repo: Path, far: Any) -> None:
    found = next(worker_of(repo, "memory://out")([TrackRow(path="x", source="memory://in/x.wav")]))
    assert (found["status"], found["fault"]) == ("failed", "input")
    strange = TrackRow(path="x", source="nowhere://in/x.wav")
    assert "cannot be reached" in next(worker_of(repo, "memory://out")([strange]))["error"]


class Died(BaseException):
    """As near to a death as one can come and live."""


def test_a_track_that_kills_workers_is_left_out_far_away_too(
    repo: Path, tmp_path: Path, far: Any
) -> None:
    """The journal lies beside the stems: another machine goes on counting, and blames no other."""
    paths = [write_song(tmp_path / f"{n}.wav", 1, seed=n) for n in range(3)]
    rows = [row_of(path) for path in paths]
    journals = []

    def die(module: nn.Module, given: object) -> None:
        deadline = time.monotonic() + 10
        while not journals and len(far.find("/out")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # until the next track is begun too
        journals.append({name: far.cat_file(name) for name in far.find("/out")})
        raise Died  # all that is not an `Exception` ends the worker

    for _ in range(2):
        hook = nn.modules.module.register_module_forward_pre_hook(die)
        with hook, pytest.raises(Died):
            list(worker_of(repo, "memory://out")(rows))
    assert [max(journal.values()) for journal in journals] == [b"1", b"2"]
    found = {answer["track"]: answer for answer in worker_of(repo, "memory://out")(rows)}
    assert {name: answer["status"] for name, answer in found.items()} == {
        "0.wav": "quarantined", "1.wav": "done", "2.wav": "done",
    }  # fmt: skip


# ── the table, and the command ──


def test_the_table_is_the_same_as_lines_and_as_parquet(tmp_path: Path) -> None:
    parquet = need_module("pyarrow.parquet")
    answers: list[ResultRow] = [
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
            for answer in answers:
                table.add(answer)
    assert [json.loads(x) for x in (tmp_path / "t.jsonl").read_text().splitlines()] == answers
    rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    for row in rows:
        row |= {name: dict(row[name]) for name in ("stems", "scores")}
    assert rows == answers


@pytest.mark.parametrize(
    ("name", "says"),
    [("t.csv", ".jsonl"), ("folder.jsonl", "is none"), ("nowhere://t.jsonl", "cannot be reached")],
)
def test_a_table_that_cannot_be_written_is_an_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "list.txt").write_text("a.wav\n")
    place = name if "://" in name else str(tmp_path / name)
    words = ["batch", str(tmp_path / "list.txt"), "-o", str(tmp_path / "out"), "--results", place]
    assert main(words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--page"], "--page"),
        (["--no-manifest"], "--no-manifest"),
        (["--list-models"], "--list-models"),
        (["--results", "list.jsonl"], "would replace the manifest"),
        (["-o", "list.jsonl/deeper"], "--out names a folder"),
        (["-o", "-"], "--out names a folder"),
        (["-o", "nowhere://out", "--results", "t.jsonl"], "nowhere://out"),
        (["--plan", "--bench", "absent.json"], "absent.json"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_an_error_before_any_work(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = '{"path": "a.wav", "duration": 1}\n'
    (tmp_path / "list.jsonl").write_text(text)
    assert main(["batch", "list.jsonl", "-n", "tiny", *flags]) == 2
    told = capsys.readouterr().err
    assert says in told and len(told.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["list.jsonl"]
    assert (tmp_path / "list.jsonl").read_text() == text


def test_a_full_disk_under_the_table_ends_the_run(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With threads in the middle of other tracks, none of which is blamed."""

    def full(table: Any, answer: ResultRow) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.jsonl")

    monkeypatch.setattr(table_room._Lines, "add", full)
    for n in range(4):
        write_song(tmp_path / f"{n}.wav", 3, seed=n)
    (tmp_path / "list.txt").write_text("".join(f"{n}.wav\n" for n in range(4)))
    words = ["batch", str(tmp_path / "list.txt"), "--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    assert main([*words, "-q", "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: results.jsonl: No space left on device\n"
    assert not list(tmp_path.rglob("attempts"))
    assert not [one for one in threading.enumerate() if one.name.startswith("demucs-")]


def test_references_that_are_nowhere_are_a_warning(repo: Path, tmp_path: Path) -> None:
    path = write_song(tmp_path / "song.wav", 1)
    worker = worker_of(repo, str(tmp_path / "out"))
    for odd in ("nowhere://x", "a\0b", "a\ud800b", str(tmp_path / "absent")):
        answer = next(worker([row_of(path, references=odd)]))
        assert answer["status"] in ("done", "skipped")
        assert "not scored" in answer["warnings"][0]


def test_scores_are_of_the_files_that_were_made(repo: Path, tmp_path: Path) -> None:
    """Not of others that lie beside them, of another song and another format."""
    path = write_song(tmp_path / "song.wav", 1)
    truth = tmp_path / "truth"
    for out in ("used", "fresh"):
        if out == "used":
            answer = next(worker_of(repo, str(tmp_path / out))([row_of(path)]))
            truth.mkdir()
            for stem, file in answer["stems"].items():
                (truth / f"{stem}.wav").write_bytes(Path(file).read_bytes())
            write_song(path, 1, seed=5)
        flac = WorkerConfig(
            model=ModelSpec(name=MODEL, repo=repo),
            order=SeparationRequest(format="flac"),
            out=str(tmp_path / out),
            device="cpu",
        )
        answer = next(TrackWorker(flac)([row_of(path, references=str(truth))]))
        assert answer["status"] == "done" and max(answer["scores"].values()) < 20, out


def test_a_table_is_complete_or_beside_its_place(tmp_path: Path) -> None:
    place = tmp_path / "t.jsonl"
    with open_table(str(place)) as table:
        table.add({"track": "first run"})
        assert not place.exists()
    with pytest.raises(KeyboardInterrupt), open_table(str(place)) as table:
        table.add({"track": "second run"})
        assert "second run" in place.with_name("t.jsonl.partial").read_text()  # at any moment
        with pytest.raises(ValueError, match="another run"), open_table(str(place)):
            pass
        raise KeyboardInterrupt
    assert "first run" in place.read_text()
    assert "second run" in place.with_name("t.jsonl.partial").read_text()
    with open_table(str(place)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"] and not place.read_text()


def test_a_second_run_tells_what_the_first_one_did(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "song.wav", 1)
    (tmp_path / "list.txt").write_text("song.wav\n")
    words = ["batch", str(tmp_path / "list.txt"), "--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    tables = []
    for _ in range(2):
        assert main([*words, "-q", "-o", str(tmp_path / "out")]) == 0
        tables.append(json.loads((tmp_path / "out/results.jsonl").read_text()))
    assert tables[0]["seconds"] > 0
    assert tables[1] == tables[0] | {"status": "skipped"}


# It sleeps in its first window, in a call that no signal cuts short.
SLEEPER = """
import ctypes, signal, sys
from torch import nn
from demucs_infer.cli.main import main

def sleep(module, given):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    print("asleep", flush=True)
    ctypes.CDLL(None).sleep(3600)

nn.modules.module.register_module_forward_pre_hook(sleep)
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX signals here")
@pytest.mark.parametrize("out", ["out", "local://{}/far"])
def test_an_eviction_is_no_death(repo: Path, tmp_path: Path, out: str) -> None:
    """Machines are taken away, again and again at the same track: that is not its fault."""
    write_song(tmp_path / "song.wav", 3)
    (tmp_path / "list.txt").write_text("song.wav\n")
    words = ["batch", str(tmp_path / "list.txt"), "--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    words += ["-q", "-o", out.format(tmp_path)]
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SLEEPER, *words], env=environment(), cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout and process.stdout.readline() == b"asleep\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)  # the second one is not waited for
        _, said = process.communicate(timeout=60)
        # Where the second one meets an interpreter that is ending already, the system's own way.
        assert process.returncode in (143, -signal.SIGTERM)
        assert b"the same command continues" in said and b"Traceback" not in said
    code = subprocess.run(
        [sys.executable, "-m", "demucs_infer", *words, "--json"], env=environment(), cwd=tmp_path,
        stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    assert json.loads(code)["done"] == 1


def catalogue(folder: Path, count: int) -> Path:
    """Songs of several lengths and formats, and one file that is none."""
    for n in range(count - 1):
        kind = ("wav", "flac", "mp3", "aiff")[n % 4]
        path = folder / f"in/{n % 3}/{n}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_audio(noise(2, round((0.4 + 0.02 * n) * 16000), n), path, 16000)
    (folder / "in/corrupt.wav").write_bytes(b"RIFF0000WAVE" + bytes(range(256)))
    paths = [str(path.relative_to(folder)) for path in sorted((folder / "in").rglob("*.*"))]
    return write_manifest(folder / "list.jsonl", [{"path": path} for path in paths])


def stems(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).digest()
        for path in out.rglob("*.wav")
        if path.is_file()
    }


def test_shards_make_the_same_stems(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = catalogue(tmp_path, 12)
    words = ["batch", str(manifest), "--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    assert main([*words, "-o", str(tmp_path / "whole"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["tracks"], told["done"], told["failed"]) == (12, 11, 1)
    codes = [main([*words, "-o", str(tmp_path / "parts"), "--shard", f"{i}/3"]) for i in range(3)]
    assert sorted(codes) == [0, 0, 1]
    assert len(stems(tmp_path / "whole")) == 11 * 4
    assert stems(tmp_path / "parts") == stems(tmp_path / "whole")
    tables = [(tmp_path / f"parts/results-{i}-of-3.jsonl").read_text() for i in range(3)]
    assert sum(len(table.splitlines()) for table in tables) == 12


def test_two_at_work_on_the_same_track(repo: Path, tmp_path: Path) -> None:
    """A shard that meets it in another's hands goes on, comes back to it, and finds it done."""
    write_song(tmp_path / "song.wav", 60)
    for seed, name in enumerate(("other", "third"), 1):
        write_song(tmp_path / f"{name}.wav", 1, seed=seed)
    (tmp_path / "list.txt").write_text("song.wav\nsong.wav\nthird.wav\nother.wav\n")
    words = ["batch", str(tmp_path / "list.txt"), "--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    words += ["-q", "-o", str(tmp_path / "out"), "--shard"]
    first = subprocess.Popen(
        [sys.executable, "-m", "demucs_infer", *words, "0/2"], env=environment()
    )
    with first:
        while not list(tmp_path.glob(f"out/{MODEL}/.partial/*/journal")):
            assert first.poll() is None
            time.sleep(0.01)
        assert main([*words, "1/2"]) == 0
        assert first.wait() == 0
    lines = [(tmp_path / f"out/results-{i}-of-2.jsonl").read_text().splitlines() for i in (0, 1)]
    rows = [[json.loads(line) for line in shard] for shard in lines]
    song = [one for shard in rows for one in shard if one["track"] == "song.wav"]
    assert [one["status"] for one in song] == ["done", "skipped"]
    assert song[0]["stems"] == song[1]["stems"]
    assert [one["track"] for one in rows[1]] == ["other.wav", "song.wav"]


def test_tracks_together_are_the_same_in_another_order_of_sums(repo: Path, tmp_path: Path) -> None:
    """Class B: a product of more rows may add them up in another order."""
    for n in range(5):
        write_song(tmp_path / f"{n}.wav", 0.5 + 0.7 * n, seed=n)
    (tmp_path / "list.txt").write_text("".join(f"{n}.wav\n" for n in range(5)))
    words = ["batch", str(tmp_path / "list.txt"), "--repo", str(repo), "-n", "4f2b8e3d", "-q"]
    words += ["-d", "cpu", "--shifts", "0", "--float32", "--batch-size", "4"]
    sizes: dict[str, list[int]] = {"1": [], "3": []}
    for together, seen in sizes.items():

        def see(module: nn.Module, given: tuple[Any, ...], seen: list[int] = seen) -> None:
            if given and isinstance(given[0], torch.Tensor) and given[0].shape[1:] == (2, RATE):
                seen.append(len(given[0]))

        with nn.modules.module.register_module_forward_pre_hook(see):
            assert main([*words, "-o", str(tmp_path / together), "--together", together]) == 0
    assert sum(sizes["1"]) == sum(sizes["3"]) and len(sizes["3"]) < len(sizes["1"])
    for path in (tmp_path / "1").rglob("*.wav"):
        alone = load(path)
        shared = load(tmp_path / "3" / path.relative_to(tmp_path / "1"))
        error = ((alone - shared) ** 2).sum() / (alone**2).sum()
        assert error <= 1e-10 and abs(alone - shared).max() <= 1e-5  # 100 dB


def test_more_workers_here_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("a.wav\n")
    words = ["batch", str(tmp_path / "list.txt"), "-o", str(tmp_path / "out"), "-n", "tiny"]
    assert main([*words, "--workers", "2"]) == 2
    assert "--shard 0/2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exit_codes(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text("bad.wav\n")
    words = ["batch", str(tmp_path / "list.txt"), "-o", str(tmp_path / "out"), "-d", "cpu"]
    assert main([*words, "--repo", str(repo), "-n", MODEL]) == 3
    assert main([*words, "--repo", str(repo), "-n", "ffffffff"]) == 4
    assert main([*words, "--repo", str(repo), "-n", MODEL, "--stems", "kazoo"]) == 2
    (tmp_path / "list.txt").write_text("")
    assert main([*words, "--repo", str(repo), "-n", MODEL]) == 0


def test_unknown_stems_leave_the_tables_of_earlier_runs_alone(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "song.wav", 1)
    (tmp_path / "list.txt").write_text("song.wav\n")
    words = ["batch", str(tmp_path / "list.txt"), "--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    words += ["-o", str(tmp_path / "out"), "--stems", "kazoo"]
    assert main(words) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.jsonl.partial").write_text("an interrupted run")
    assert main(words) == 2
    assert tree(tmp_path / "out") == ["results.jsonl.partial"]
    assert (tmp_path / "out/results.jsonl.partial").read_text() == "an interrupted run"


# ── planning ──


def rows_lasting(*durations: float | None) -> list[TrackRow]:
    return [TrackRow(path=str(n), source=str(n), duration=d) for n, d in enumerate(durations)]


@pytest.mark.parametrize(
    ("bench", "rows", "workers", "hours", "dominates"),
    [
        # Ten hours of sound, on two workers that are twice as fast as it.
        ({"separate": 0.5, "write": 0.1}, rows_lasting(*[3600] * 10), 2, 2.5, "the network"),
        ({"separate": 0.1, "read": 0.5}, rows_lasting(*[3600] * 10), 2, 2.5, "reading"),
        ({"separate": 0.5}, rows_lasting(36000, 36), 10, 5.0, "the longest track"),
        ({"separate": 0.1, "start_seconds": 7200}, rows_lasting(3600), 1, 2.1, "starting workers"),
        ({"separate": 1e-6, "track_seconds": 36.0}, rows_lasting(*[1] * 1000), 10, 1.0,
         "what every track takes besides"),
        ({"separate": 0.1, "bytes_in": 1e6, "storage_bytes_per_second": 1e6},
         rows_lasting(*[3600] * 10), 100, 10.0, "storage"),
        ({"separate": 0.5}, rows_lasting(3600, None), 1, 1.0, "the network"),
    ],
)  # fmt: skip
def test_a_plan(
    bench: dict[str, float], rows: list[TrackRow], workers: int, hours: float, dominates: str
) -> None:
    found = plan(rows, Benchmark(**bench), workers, price=2.0)  # type: ignore[arg-type]
    assert found.hours == pytest.approx(hours, rel=1e-3)
    assert found.dominates == dominates
    assert found.cost == pytest.approx(2 * workers * found.hours)
    assert found.hours_at_worst >= found.hours


def test_plan_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_manifest(tmp_path / "list.csv", [{"path": "a.wav", "duration": 3600}])
    words = ["batch", str(manifest), "--plan"]
    (tmp_path / "bench.json").write_text(json.dumps(asdict(Benchmark(separate=0.5))))
    words += ["--bench", str(tmp_path / "bench.json"), "--machines", "4", "--price", "1"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hours"] == 0.5
    assert main(words) == 0 and "what dominates: the longest track" in capsys.readouterr().out
    (tmp_path / "bench.json").write_text('{"speed": 1}')
    assert main(words) == 2 and "`separate`" in capsys.readouterr().err
    for odd in ("-1", "null", "true", '"fast"', "1e308", "NaN", "Infinity"):
        (tmp_path / "bench.json").write_text(f'{{"separate": {odd}}}')
        assert main(words) == 2 and "separate = " in capsys.readouterr().err
    (tmp_path / "bench.json").write_text('{"separate": 1}')
    assert main([*words, "--shard", "1/2"]) == 2 and "is empty" in capsys.readouterr().err


def test_a_plan_measures_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_manifest(tmp_path / "list.csv", [{"path": "a.wav", "duration": 36_000}])
    words = ["batch", str(manifest), "--plan", "-d", "cpu", "--json", "-n"]
    runs: list[int] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: runs.append(1)):
        assert main([*words, "tiny"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert runs and found["worker"].startswith("measured here: tiny on cpu")
    # Ten hours of sound on one worker, and its start.
    assert found["hours"] == pytest.approx(10 / found["times_real_time"], abs=0.1)
    assert not list(tmp_path.glob("separated*"))


def test_a_plan_fetches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def no_network(*where: Any, **more: Any) -> None:
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    manifest = write_manifest(tmp_path / "list.csv", [{"path": "a.wav", "duration": 36_000}])
    assert main(["batch", str(manifest), "--plan", "--json", "-n", "htdemucs"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["worker"].startswith("assumed, not measured: htdemucs")
    assert found["hours"] == pytest.approx(10 * 0.58, rel=0.01)
    assert not asked
    assert main(["batch", str(manifest), "--plan", "-n", "htdemoxs"]) == 4


def test_what_is_measured_is_the_network() -> None:
    """By a clock that ticks once a window: 0.75 s each, and a first one that is not counted."""
    network = RecordingModel(gains=[1.0, 0.5])
    separator = Separator.from_model(network, device="cpu", shifts=0)
    found = measure(
        separator,
        SeparationRequest(),
        name="x",
        seconds=7.5,
        clock=lambda: float(len(network.seen)),
    )
    assert found.separate == pytest.approx(10 / 7.5, abs=1e-5)
    assert found.read == found.write == 0
    assert len(network.seen) > 10
    # 16 bits of two channels of two stems, and the headers.
    assert found.bytes_out == pytest.approx(2 * 2 * 2 * 44_100, rel=0.01)


# ── the simulation ──


def test_the_simulation_keeps_the_laws_of_scheduling() -> None:
    lengths = simulate_cluster.catalogue(3000, seed=1)
    bench = Benchmark(separate=0.5, start_seconds=100)
    calm = simulate_cluster.World(workers=20, rows_per_task=1, slow_share=0, deaths_per_hour=0)
    for order in simulate_cluster.ORDERS.values():
        found = simulate_cluster.simulate(order(lengths), bench, calm)
        # Nobody idles before the last track has begun: Graham's bound.
        assert found.ideal <= found.makespan <= found.ideal + lengths.max() * 0.5 / 3600
        assert (found.crash_count, found.lost) == (0, 0)
    rows = rows_lasting(*lengths.tolist())
    assert plan(rows, bench, 20).hours == pytest.approx(found.ideal)

    alone = replace(calm, workers=1)
    found = simulate_cluster.simulate(lengths, bench, alone)
    assert found.makespan == pytest.approx(found.ideal) and found.idle == 0
    mortal = simulate_cluster.simulate(lengths, bench, replace(alone, deaths_per_hour=1.0))
    # One worker does all: what it lost, and a start after every death, are all that it adds.
    added = mortal.lost + mortal.crash_count * 100 / 3600
    assert mortal.crash_count > 10
    assert mortal.makespan == pytest.approx(found.makespan + added)


# ── Ray ──


def square_wave(path: Path) -> None:
    """What the workers of `tests.helpers.crashing_worker` die of."""
    wave = torch.ones(2, 2 * RATE)
    wave[:, torch.arange(2 * RATE) % 100 < 50] = -1
    save(path, 0.25 * wave)


def answers_while_killing(
    process: "subprocess.Popen[bytes]", ids: Path, after: int
) -> list[ResultRow]:
    """Every answer the process tells of; after some of them, one of its workers is killed."""
    answers: list[ResultRow] = []
    assert process.stderr
    for line in process.stderr:
        if not line.startswith(b"{"):
            continue
        answers.append(json.loads(line))
        if len(answers) == after:
            alive = [int(file.name) for file in ids.iterdir() if Path("/proc", file.name).exists()]
            os.kill(alive[0], signal.SIGKILL)
    return answers


RAY = [
    sys.executable,
    "-c",
    "import sys, tests.helpers.crashing_worker; sys.exit(tests.helpers.crashing_worker.main())",
    "batch",
]


def on_ray(manifest: Path, out: Path, ids: Path, flags: list[str]) -> tuple[int, list[ResultRow]]:
    """A run with two workers, a row at a time, that leave their marks in `ids`."""
    told = subprocess.run(
        [*RAY, str(manifest), *flags, "-o", str(out), "--engine", "ray", "--workers", "2",
         "--rows-per-task", "1", "--progress", "json"],
        env=environment() | {"DEADLY_IDS": str(ids)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines = [line for line in told.stderr.splitlines() if line.startswith(b"{")]
    return told.returncode, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_track_listed_again_is_done_once_on_ray(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers get it at the same moment: the one in the network waits until both have it."""
    need_module("ray.data")
    monkeypatch.setenv("DEADLY_MEET", "2")
    write_song(tmp_path / "song.wav", 3)
    (tmp_path / "list.txt").write_text("song.wav\n" * 4)
    ids = tmp_path / "ids"
    ids.mkdir()
    flags = ["--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    code, told = on_ray(tmp_path / "list.txt", tmp_path / "out", ids, flags)
    assert code == 0
    assert Counter(one["status"] for one in told) == {"done": 1, "skipped": 3}
    assert len(list(ids.glob("*.given"))) == 2
    assert len({json.dumps(one["stems"]) for one in told}) == 1


@pytest.mark.slow
def test_ray_hands_out_gpus() -> None:
    """To a worker that does not compute on it: one that Ray is only told of."""
    need_module("ray.data")
    code = "import tests.helpers.ray_memory_driver; tests.helpers.ray_memory_driver.on_a_gpu()"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, check=True
    ).stdout
    assert told.split() == [b"0", b"0"]


@pytest.mark.slow
def test_an_eviction_is_no_death_on_ray(repo: Path, tmp_path: Path) -> None:
    """The driver is told to end, twice, while both workers are in the same tracks."""
    need_module("ray.data")
    for n in range(8):  # so many that the second worker gets some of them
        write_song(tmp_path / f"{n}.wav", 1, seed=n)
    (tmp_path / "list.txt").write_text("".join(f"{n}.wav\n" for n in range(8)))
    flags = ["--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    for run in range(2):
        ids = tmp_path / f"ids{run}"
        ids.mkdir()
        env = {"DEADLY_IDS": str(ids), "DEADLY_MEET": "2", "DEADLY_SLEEP": "3600"}
        process = subprocess.Popen(
            [*RAY, str(tmp_path / "list.txt"), *flags, "-o", str(tmp_path / "out"), "--engine",
             "ray", "--workers", "2", "--rows-per-task", "1"],
            env=environment() | env, stderr=subprocess.PIPE,
        )  # fmt: skip
        with process:
            while sum(file.stat().st_size > 0 for file in ids.iterdir()) < 2:
                assert process.poll() is None
                time.sleep(0.05)
            assert len(list((tmp_path / "out").rglob("attempts"))) == 2
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 143 and b"the same command continues" in said
    code = main(["batch", str(tmp_path / "list.txt"), *flags, "-q", "-o", str(tmp_path / "out")])
    assert code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_catalogue_on_ray_survives_deaths(repo: Path, tmp_path: Path) -> None:
    """60 files: one is corrupt, one kills its worker, and one worker is killed from outside."""
    need_module("ray.data")
    (tmp_path / "in").mkdir()
    square_wave(tmp_path / "in/deadly.wav")
    manifest = catalogue(tmp_path, 59)
    ids = tmp_path / "ids"
    ids.mkdir()
    flags = ["--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    process = subprocess.Popen(
        [*RAY, str(manifest), *flags, "-o", str(tmp_path / "ray"), "--engine", "ray",
         "--workers", "2", "--rows-per-task", "6", "--progress", "json"],
        env=environment() | {"DEADLY_IDS": str(ids)}, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    with process:
        answers = answers_while_killing(process, ids, after=12)
        assert process.wait(timeout=60) == 1
    bad = {
        answer["track"]: answer for answer in answers if answer["status"] not in ("done", "skipped")
    }
    assert {track: (bad[track]["status"], bad[track]["fault"]) for track in bad} == {
        "in/corrupt.wav": ("failed", "input"),
        "in/deadly.wav": ("quarantined", "other"),
    }
    assert len({answer["track"] for answer in answers}) == len(answers) == 60
    table = (tmp_path / "ray/results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in table] == answers
    # Two deaths by the square wave and one by our hand, each followed by another worker.
    assert len(list(ids.iterdir())) >= 2 + 3

    made = stems(tmp_path / "ray")
    assert len(made) == 58 * 4
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("*.wav")}
    assert main(["batch", str(manifest), *flags, "-o", str(tmp_path / "ray"), "-q"]) == 1
    assert times == {path: path.stat().st_mtime_ns for path in times}, "done again"
    table = (tmp_path / "ray/results.jsonl").read_text().splitlines()
    statuses = Counter(json.loads(line)["status"] for line in table)
    assert statuses == {"skipped": 58, "failed": 1, "quarantined": 1}

    again = tmp_path / "again"
    again.mkdir()
    code, told = on_ray(manifest, tmp_path / "ray", again, flags)
    assert code == 1
    assert Counter(one["status"] for one in told) == statuses
    assert list(again.iterdir()) and not any(file.stat().st_size for file in again.iterdir())
    assert any(file.stat().st_size for file in ids.iterdir()), "forwards leave no mark"

    (tmp_path / "in/deadly.wav").unlink()
    assert main(["batch", str(manifest), *flags, "-o", str(tmp_path / "local"), "-q"]) == 1
    assert stems(tmp_path / "local") == made


@pytest.mark.slow
def test_memory_of_the_driver_does_not_grow_with_the_manifest() -> None:
    need_module("ray.data")
    code = "import tests.helpers.ray_memory_driver; tests.helpers.ray_memory_driver.main()"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, check=True
    ).stdout
    count, grown = map(int, told.split())
    assert count == 100_000
    # The 90 000 answers that came meanwhile are more than 90 MB as values of Python.
    assert grown < 25e6
