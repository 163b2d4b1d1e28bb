"""`demucs-infer models`, `doctor` and `eval`."""

import json
from pathlib import Path

import pytest

from demucs_infer.cli.main import main
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import make_repo, save, write_song


def say(capsys: pytest.CaptureFixture[str], *words: str, expect: int = 0) -> str:
    assert main(list(words)) == expect
    return capsys.readouterr().out


def test_models_ls_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(say(capsys, "models", "ls", "--json"))}
    assert rows["htdemucs"]["stems"] == ["drums", "bass", "other", "vocals"]
    assert "MIT" not in rows["htdemucs"]["license"].split("not covered")[0]
    assert "guitar" in say(capsys, "models", "ls")
    told = json.loads(say(capsys, "models", "info", "htdemucs_ft", "--json"))
    assert len(told["files"]) == 4 and all(len(file["sha256"]) == 64 for file in told["files"])
    assert "sha256" in say(capsys, "models", "info", "htdemucs")
    say(capsys, "models", "info", "htdemuc", expect=4)


def test_models_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "repo")
    rows = json.loads(say(capsys, "models", "ls", "--json", "--repo", str(repo)))
    assert [(row["name"], row["kind"]) for row in rows][0] == ("bag", "bag")
    assert len(rows) == 4


def test_models_in_the_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    paths = say(capsys, "models", "path", "mdx", "--cache-dir", cache).splitlines()
    assert len(paths) == 4 and all(path.startswith(cache) for path in paths)
    say(capsys, "models", "pull", "mdx", "--offline", "--cache-dir", cache, expect=4)
    # A file that claims to be one of them by its name, and is not by its digest.
    stranger = tmp_path / Path(paths[0]).name
    stranger.write_bytes(b"not it")
    say(capsys, "models", "import", str(stranger), "--cache-dir", cache, expect=4)
    Path(paths[0]).parent.mkdir(parents=True)
    Path(paths[0]).write_bytes(b"not it")
    assert say(capsys, "models", "rm", "mdx", "--cache-dir", cache).splitlines() == paths[:1]
    assert not Path(paths[0]).exists()
    assert main(["models", "rm", "mdx", "--cache-dir", cache]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "nothing was deleted" in told.err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(say(capsys, "doctor", "--json"))
    assert {"python", "torch", "cuda", "ffmpeg", "cache_dir"} <= set(told)
    assert told["missing_encoders"] == []
    assert told["torch"] in say(capsys, "doctor")


def test_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for stem in ("drums", "bass"):
        truth = make_noise(2, 8000, len(stem))
        (tmp_path / "true/song").mkdir(parents=True, exist_ok=True)
        (tmp_path / "made/song").mkdir(parents=True, exist_ok=True)
        save(tmp_path / f"true/song/{stem}.wav", truth, subtype="FLOAT")
        # A tenth of another noise: 20 dB below.
        save(
            tmp_path / f"made/song/{stem}.wav",
            truth + 0.1 * make_noise(2, 8000, 9),
            subtype="FLOAT",
        )
    words = ["eval", str(tmp_path / "true"), str(tmp_path / "made")]
    told = json.loads(say(capsys, *words, "--json", "--stems", "drums"))
    assert told["summary"]["drums"]["sdr"]["median"] == pytest.approx(20, abs=0.5)
    assert "bass" in say(capsys, *words)


def test_eval_separates_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    songs = str(Path(__file__).parents[1] / "data/studio")
    told = json.loads(say(capsys, "eval", songs, "-n", "tiny", "-d", "cpu", "--json"))
    # The small model gains about ten decibels on drums that it has not heard; silence has 0.
    assert told["summary"]["drums"]["sdr"]["mean"] > 3
    assert "drums" in say(capsys, "eval", songs, "-n", "tiny", "-d", "cpu", "--csv")


def test_a_track_called_like_a_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_song(tmp_path / "song.wav").rename(tmp_path / "doctor")
    repo = make_repo(tmp_path / "repo")
    assert main(["./doctor", "--repo", str(repo), "-n", "9d0a6f1c"]) == 0
    assert (tmp_path / "separated/9d0a6f1c/doctor/drums.wav").exists()
