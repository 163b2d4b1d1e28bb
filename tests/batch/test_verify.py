"""Test that stems are checked by their digests when asked to, and after a power loss."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from demucs_infer.batch.manifest import read_manifest
from demucs_infer.batch.workdir import PARTIAL
from demucs_infer.cli.main import main
from demucs_infer.system import boot
from tests.helpers.batch_runs import batch_words, model_flags, read_table, write_list
from tests.helpers.cli_process import make_repo, tree, write_song


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("verify") / "repo")


@pytest.fixture(scope="module")
def finished(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a song and its stems by `batch`."""
    folder = tmp_path_factory.mktemp("finished")
    write_song(folder / "song.wav", 1)
    assert main(batch_words(write_list(folder, "song.wav"), repo, folder / "out")) == 0
    return folder


@pytest.fixture
def song(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "work"))


def damage(folder: Path) -> tuple[Path, bytes]:
    """Zero the end of a stem at its size, as a power loss does; return what it was."""
    [stem] = folder.rglob("vocals.wav")
    content = stem.read_bytes()
    stem.write_bytes(content[:-1000] + bytes(1000))
    return stem, content


@pytest.mark.parametrize("is_remote", [False, True], ids=["folder", "store"])
def test_batch_redoes_damaged_stems_with_verify(repo: Path, song: Path, is_remote: bool) -> None:
    out = f"local://{song}/out" if is_remote else song / "out"
    words = [*batch_words(song / "list.txt", repo, out), "--results", str(song / "table.jsonl")]
    stem, content = damage(song)
    for flags, status in (([], "skipped"), (["--verify"], "done"), (["--verify"], "skipped")):
        assert main([*words, *flags]) == 0
        [row] = read_table(song / "table.jsonl")
        assert row["status"] == status, flags
    assert stem.read_bytes() == content


def test_stems_written_before_the_machine_started_are_verified(repo: Path, song: Path) -> None:
    stem, content = damage(song)
    os.utime(stem, (boot.started_at() - 20,) * 2)
    assert main(batch_words(song / "list.txt", repo, song / "out")) == 0
    assert stem.read_bytes() == content


def test_start_of_the_machine_is_that_of_its_clock() -> None:
    if not Path("/proc/uptime").exists():
        pytest.skip("needs /proc/uptime")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert boot.started_at() == pytest.approx(time.time() - uptime, abs=5)
    assert boot.is_from_before_start(boot.started_at() - 30)
    assert not boot.is_from_before_start(boot.started_at() - 10_000)
    assert not boot.is_from_before_start(boot.started_at() + 10_000)


def test_verify_lists_damaged_and_missing_stems(
    song: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(song / "out")]) == 0
    assert capsys.readouterr().out == "1 of 1 tracks intact\n"
    stem, content = damage(song)
    stem.with_name("bass.wav").unlink()
    stem.with_name("drums.wav").write_bytes(content[:-2])
    before = tree(song)
    assert main(["verify", str(song / "out")]) == 1
    output = capsys.readouterr()
    assert "0 of 1 tracks intact" in output.out
    assert [line.rpartition("stems.json: ")[2] for line in output.err.splitlines()] == [
        f"drums.wav has {len(content) - 2} bytes, expected {len(content)}",
        "bass.wav is missing",
        "vocals.wav is damaged: its sha256 differs",
    ]
    assert tree(song) == before
    assert main(["verify", str(song / "out"), "--json"]) == 1
    [problems] = json.loads(capsys.readouterr().out)["problems"].values()
    assert len(problems) == 3


def test_verify_needs_a_folder_with_manifests(
    song: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (song / "empty").mkdir()
    assert main(["verify", str(song / "empty")]) == 3
    assert main(["verify", str(song / "song.wav")]) == 2
    [manifest] = song.rglob("stems.json")
    manifest.write_text('{"schema": 1, "stems": 5}')
    assert main(["verify", str(song / "out")]) == 1
    assert "is not a valid manifest" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["key", "lock", "attempts", "samples.f32", "journal"])
@pytest.mark.parametrize("is_folder", [False, True], ids=["bytes", "folder"])
def test_garbage_in_the_hidden_folder_of_a_track_is_removed(
    repo: Path, tmp_path: Path, name: str, is_folder: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_song(tmp_path / "song.wav", 1)
    words = [str(source), "-o", str(tmp_path / "out"), *model_flags(repo), "-q"]
    assert main([*words, "--stems", "vocals"]) == 0
    [manifest] = (tmp_path / "out").rglob("stems.json")
    key = (read_manifest(manifest) or {})["key"]
    folder = make_hidden_folder(manifest)
    (folder / "key").write_text(key)
    (folder / name).unlink(missing_ok=True)
    if is_folder:
        (folder / name / "deeper").mkdir(parents=True)
    else:
        (folder / name).write_bytes(b"\xff\xfe garbage")
    assert main([*words, "--stems", "vocals", "--force"]) == 0, capsys.readouterr().err
    assert not list((tmp_path / "out").rglob(PARTIAL))


def make_hidden_folder(manifest: Path) -> Path:
    from demucs_infer.batch.workdir import WorkDir

    folder = WorkDir(manifest.parents[1], manifest).folder
    folder.mkdir(parents=True)
    return folder
