"""Local paths and URIs are read and written by the same functions."""

from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from demucs_infer.system import storage


@pytest.fixture(params=["path", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    MemoryFileSystem.store.clear()
    places = {"path": str(tmp_path), "file://": f"file://{tmp_path}", "memory://": "memory://top"}
    return places[request.param]


@pytest.mark.parametrize("name", ["plain.txt", "~", "a b?#.txt", "deep/er.txt"])
def test_text_round_trip(folder: str, name: str) -> None:
    location = storage.join(folder, name)
    assert storage.read_text(location) is None and storage.file_size(location) is None
    storage.write_text(location, "first")
    storage.write_text(location, "sécond")
    assert storage.read_text(location) == "sécond" and storage.file_size(location) == 7
    with storage.open_text(location) as lines:
        assert list(lines) == ["sécond"]
    storage.remove(location)
    storage.remove(location)
    assert storage.read_text(location) is None


def test_writing_text_leaves_no_temporary_file(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "a.txt"), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["~", "~user", "a::b"])
def test_local_names_mean_nothing_special(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_text(name, "text")
    assert (tmp_path / name).read_text() == storage.read_text(name) == "text"


def test_download_copies_a_file_or_the_files_of_a_folder(tmp_path: Path, folder: str) -> None:
    for name in ("in/a.wav", "in/b.wav", "in/deeper/c.wav"):
        storage.write_text(storage.join(folder, name), name)
    storage.download(storage.join(folder, "in/a.wav"), tmp_path / "copy.wav")
    assert (tmp_path / "copy.wav").read_text() == "in/a.wav"
    storage.download(storage.join(folder, "in"), tmp_path / "copies")
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == ["a.wav", "b.wav"]


def test_upload_makes_the_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / "source").write_text("text")
    storage.upload(tmp_path / "source", storage.join(folder, "new/target"))
    assert storage.read_text(storage.join(folder, "new/target")) == "text"


def test_fingerprint_changes_with_the_files(folder: str) -> None:
    absent = storage.fingerprint(storage.join(folder, "stems"))
    storage.write_text(storage.join(folder, "stems/a.wav"), "text")
    first = storage.fingerprint(storage.join(folder, "stems"))
    assert first == storage.fingerprint(storage.join(folder, "stems"))
    storage.write_text(storage.join(folder, "stems/a.wav"), "longer text")
    assert len({absent, first, storage.fingerprint(storage.join(folder, "stems"))}) == 3
