"""Words on a command line mean tracks: files, folders, patterns, a pipe."""

import os
from pathlib import Path

import pytest

from demucs_infer.batch.discovery import Found, find_tracks


@pytest.fixture
def music(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.WAV", "a.mp3", "notes.txt", "sub/deep/c.flac", "sub/.hidden.wav", ".git/d.wav",
        "separated/model/a/drums.wav", "odd[1].wav", "song",
    ):  # fmt: skip
        path = tmp_path / "music" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "music"


def test_a_folder_means_its_audio_files_and_mirrors_them(music: Path) -> None:
    found = find_tracks(["music"], skip=[music / "separated"])
    assert [(Path(one.source).name, one.folder.as_posix()) for one in found] == [
        ("a.mp3", "."),
        ("b.WAV", "."),
        ("odd[1].wav", "."),
        ("c.flac", "sub/deep"),
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_a_pipe_is_a_track_only_where_it_is_named(music: Path) -> None:
    os.mkfifo(music / "pipe.wav")
    assert "pipe.wav" not in {one.name for one in find_tracks(["music", "music/*.wav"])}
    assert find_tracks(["music/pipe.wav"]) == [Found("music/pipe.wav")]


def test_a_file_is_taken_at_its_word(music: Path) -> None:
    assert find_tracks(["music/song", "music/notes.txt", "music/odd[1].wav"]) == [
        Found("music/song"),
        Found("music/notes.txt"),
        Found("music/odd[1].wav"),
    ]


def test_patterns_are_for_shells_that_have_none(music: Path) -> None:
    assert [one.source for one in find_tracks(["music/*.mp3"])] == ["music/a.mp3"]
    deep = {Path(one.source).name for one in find_tracks(["music/**/*"])}
    assert deep == {"a.mp3", "b.WAV", "c.flac", "drums.wav", "odd[1].wav"}


def test_what_means_nothing_is_a_track_that_cannot_be_read(music: Path) -> None:
    words = ["music/none.wav", "music/*.xyz", "x" * 300, "-"]
    assert [one.source for one in find_tracks(words)] == words
    assert find_tracks(["-"])[0].name == "stdin"


def test_a_track_is_found_once(music: Path) -> None:
    found = find_tracks(["music/a.mp3", "./music/a.mp3", "music"], skip=[music / "separated"])
    assert sum(one.source.endswith("a.mp3") for one in found) == 1
