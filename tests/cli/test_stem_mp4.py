"""`--format stem.mp4` and `separate_to(format="stem.mp4")` write one file with all stems."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from demucs_infer.api import Separator
from demucs_infer.cli.main import main
from tests.helpers.cli_process import write_song

STREAMS = ["Master", "Drums", "Bass", "Other", "Vocals"]


def decode(path: Path) -> list[np.ndarray]:
    """Return the samples of every audio stream."""
    with av.open(str(path)) as container:
        assert [stream.metadata["handler_name"] for stream in container.streams.audio] == STREAMS
        count = len(container.streams.audio)
    tracks = []
    for index in range(count):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray() for frame in container.decode(audio=index)]
        tracks.append(np.concatenate(frames, axis=1))
    return tracks


def test_command_writes_one_file_with_all_stems(tmp_path: Path) -> None:
    song = write_song(tmp_path / "song.wav", 3)
    words = [str(song), "-n", "tiny", "--format", "stem.mp4", "-o", str(tmp_path / "out"), "-q"]
    assert main(words) == 0
    folder = tmp_path / "out/tiny/song"
    assert sorted(path.name for path in folder.iterdir()) == ["song.stem.mp4", "stems.json"]
    stems = json.loads((folder / "stems.json").read_text())["stems"]
    assert {stem["file"] for stem in stems.values()} == {"song.stem.mp4"}
    mix, *parts = decode(folder / "song.stem.mp4")
    # White noise is the worst there is for AAC: the mix is clearly the sum, not equal to it.
    error = mix - sum(parts)
    assert np.square(error).mean() < 0.1 * np.square(mix).mean()
    before = (folder / "song.stem.mp4").stat().st_mtime_ns
    assert main(words) == 0
    assert (folder / "song.stem.mp4").stat().st_mtime_ns == before, "skipped, as it is done"


def test_separate_to_writes_one_file_with_all_stems(tmp_path: Path) -> None:
    song = write_song(tmp_path / "song.wav", 2)
    files = Separator("tiny").separate_to(song, tmp_path / "out", "stem.mp4")
    assert set(files.paths.values()) == {tmp_path / "out/song.stem.mp4"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["song.stem.mp4"]


def test_other_than_four_stems_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song = write_song(tmp_path / "song.wav", 1)
    words = [str(song), "-n", "tiny", "--format", "stem.mp4", "-o", str(tmp_path / "out"), "-q"]
    assert main([*words, "--two-stems", "drums"]) == 2
    assert "a stem.mp4 file has 4 stems, and --two-stems drums gives two" in capsys.readouterr().err
    assert main([*words, "--derive", "rest=bass+other"]) == 2
    assert (
        "a stem file has 4 stems, not 5 (drums, bass, other, vocals, rest)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
