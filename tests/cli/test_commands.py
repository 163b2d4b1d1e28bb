"""`demucs-infer models`, `doctor` and `eval`."""

import json
import re
from pathlib import Path

import pytest
import torch

from demucs_infer.cli.main import main
from demucs_infer.optimized import kernels, optimize
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import make_repo, save, write_song


def run_command(capsys: pytest.CaptureFixture[str], *words: str, expect: int = 0) -> str:
    assert main(list(words)) == expect
    return capsys.readouterr().out


def test_models_ls_and_info_describe_models(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(run_command(capsys, "models", "ls", "--json"))}
    assert rows["htdemucs"]["stems"] == ["drums", "bass", "other", "vocals"]
    assert "MIT" not in rows["htdemucs"]["license"].split("not covered")[0]
    table = run_command(capsys, "models", "ls")
    assert "guitar" in table
    lines = [line for line in table.splitlines() if not line.startswith(" ")]
    states = [re.search(r"to download|downloaded|bundled", line) for line in lines]
    assert len({state and state.start() for state in states}) == 1, "columns are aligned"
    result = json.loads(run_command(capsys, "models", "info", "htdemucs_ft", "--json"))
    assert len(result["files"]) == 4 and all(len(file["sha256"]) == 64 for file in result["files"])
    assert "sha256" in run_command(capsys, "models", "info", "htdemucs")
    run_command(capsys, "models", "info", "htdemuc", expect=4)


def test_models_ls_lists_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "repo")
    rows = json.loads(run_command(capsys, "models", "ls", "--json", "--repo", str(repo)))
    assert [(row["name"], row["kind"]) for row in rows][0] == ("bag", "bag")
    assert len(rows) == 4


def test_models_cache_actions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    paths = run_command(capsys, "models", "path", "mdx", "--cache-dir", cache).splitlines()
    assert len(paths) == 4 and all(path.startswith(cache) for path in paths)
    run_command(capsys, "models", "pull", "mdx", "--offline", "--cache-dir", cache, expect=4)
    # A file with the name of a checkpoint and another digest.
    fake = tmp_path / Path(paths[0]).name
    fake.write_bytes(b"not it")
    run_command(capsys, "models", "import", str(fake), "--cache-dir", cache, expect=4)
    Path(paths[0]).parent.mkdir(parents=True)
    Path(paths[0]).write_bytes(b"not it")
    assert (
        run_command(capsys, "models", "rm", "mdx", "--cache-dir", cache).splitlines() == paths[:1]
    )
    assert not Path(paths[0]).exists()
    assert main(["models", "rm", "mdx", "--cache-dir", cache]) == 0
    result = capsys.readouterr()
    assert result.out == "" and "nothing was deleted" in result.err


def test_doctor_reports_versions_and_codecs(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(run_command(capsys, "doctor", "--json"))
    assert {"python", "torch", "cuda", "ffmpeg", "cache_dir"} <= set(result)
    assert result["missing_encoders"] == []
    assert result["torch"] in run_command(capsys, "doctor")


@pytest.mark.parametrize("is_faster", [True, False], ids=["bf16", "no bf16"])
def test_doctor_reports_how_this_processor_computes(
    is_faster: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "is_bf16_faster", lambda: is_faster)
    monkeypatch.setattr(kernels, "has_packed_kernels", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(kernels, "uses_half_width_vectors", lambda: is_faster)
    result = json.loads(run_command(capsys, "doctor", "--json"))
    assert result["packed_kernels"] == ["fp32"]
    assert result["attention_fp32"] == ("in rows" if is_faster else "by PyTorch")
    reason = "has instructions for bf16" if is_faster else "would be slower in bf16"
    expected = f"{'bf16' if is_faster else 'fp32'} (this processor {reason})"
    assert result["precision_auto"] == expected


def test_eval_scores_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
    result = json.loads(run_command(capsys, *words, "--json", "--stems", "drums"))
    assert result["summary"]["drums"]["sdr"]["median"] == pytest.approx(20, abs=0.5)
    assert "bass" in run_command(capsys, *words)


def test_eval_scores_model(capsys: pytest.CaptureFixture[str]) -> None:
    songs = str(Path(__file__).parents[1] / "data/studio")
    result = json.loads(run_command(capsys, "eval", songs, "-n", "tiny", "-d", "cpu", "--json"))
    # The small model gains about ten decibels on drums outside its training set; silence has 0.
    assert result["summary"]["drums"]["sdr"]["mean"] > 3
    assert "drums" in run_command(capsys, "eval", songs, "-n", "tiny", "-d", "cpu", "--csv")


def test_track_with_name_of_a_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_song(tmp_path / "song.wav").rename(tmp_path / "doctor")
    repo = make_repo(tmp_path / "repo")
    assert main(["./doctor", "--repo", str(repo), "-n", "9d0a6f1c"]) == 0
    assert (tmp_path / "separated/9d0a6f1c/doctor/drums.wav").exists()
