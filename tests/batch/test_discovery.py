"""Test the discovery of tracks from command-line arguments."""

import os
from pathlib import Path

import pytest

from demucs_infer.batch.discovery import DiscoveredTrack, find_tracks


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


def test_folder_yields_its_audio_files_and_their_subfolders(music: Path) -> None:
    tracks = find_tracks(["music"], skip=[music / "separated"])
    assert [(Path(track.source).name, track.folder.as_posix()) for track in tracks] == [
        ("a.mp3", "."),
        ("b.WAV", "."),
        ("odd[1].wav", "."),
        ("c.flac", "sub/deep"),
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_pipe_is_a_track_only_as_an_argument(music: Path) -> None:
    os.mkfifo(music / "pipe.wav")
    assert "pipe.wav" not in {track.name for track in find_tracks(["music", "music/*.wav"])}
    assert find_tracks(["music/pipe.wav"]) == [DiscoveredTrack("music/pipe.wav")]


def test_file_argument_needs_no_audio_suffix(music: Path) -> None:
    assert find_tracks(["music/song", "music/notes.txt", "music/odd[1].wav"]) == [
        DiscoveredTrack("music/song"),
        DiscoveredTrack("music/notes.txt"),
        DiscoveredTrack("music/odd[1].wav"),
    ]


def test_patterns_are_expanded(music: Path) -> None:
    assert [track.source for track in find_tracks(["music/*.mp3"])] == ["music/a.mp3"]
    names = {Path(track.source).name for track in find_tracks(["music/**/*"])}
    assert names == {"a.mp3", "b.WAV", "c.flac", "drums.wav", "odd[1].wav"}


def test_argument_without_a_match_is_returned_as_a_track(music: Path) -> None:
    arguments = ["music/none.wav", "music/*.xyz", "x" * 300, "-"]
    assert [track.source for track in find_tracks(arguments)] == arguments
    assert find_tracks(["-"])[0].name == "stdin"


def test_duplicates_are_removed(music: Path) -> None:
    tracks = find_tracks(["music/a.mp3", "./music/a.mp3", "music"], skip=[music / "separated"])
    assert sum(track.source.endswith("a.mp3") for track in tracks) == 1
