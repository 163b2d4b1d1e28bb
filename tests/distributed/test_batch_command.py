"""`demucs-infer batch` refuses what it cannot do before any work, and has the usual exit codes."""

from pathlib import Path

import pytest

from demucs_infer.cli.main import main
from tests.helpers.batch_runs import MODEL, write_list
from tests.helpers.cli_process import write_song


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--page"], "does not support --page"),
        (["--no-manifest"], "does not support --no-manifest"),
        (["--list-models"], "does not support --list-models"),
        (["--results", "list.jsonl"], "would replace the manifest"),
        (["-o", "list.jsonl/deeper"], "must be a folder, but"),
        (["-o", "-"], "--out must be a folder"),
        (["-o", "nowhere://out", "--results", "t.jsonl"], "nowhere://out"),
        (["--plan", "--bench", "absent.json"], "absent.json"),
        (["--workers", "2"], "--shard 0/2"),
    ],
    ids=str,
)
def test_impossible_flags_are_errors_before_any_work(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = '{"path": "a.wav", "duration": 1}\n'
    (tmp_path / "list.jsonl").write_text(text)
    assert main(["batch", "list.jsonl", "-n", "tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["list.jsonl"]
    assert (tmp_path / "list.jsonl").read_text() == text


@pytest.mark.parametrize(
    ("names", "flags", "code"),
    [
        (["good.wav"], ["-n", MODEL], 0),
        ([], ["-n", MODEL], 0),
        (["good.wav", "bad.wav"], ["-n", MODEL], 1),
        (["good.wav"], ["-n", MODEL, "--stems", "kazoo"], 2),
        (["bad.wav"], ["-n", MODEL], 3),
        (["good.wav"], ["-n", "ffffffff"], 4),
    ],
    ids=["all done", "no tracks", "some failed", "unknown stem", "no input", "no model"],
)
def test_exit_codes(
    repo: Path, tmp_path: Path, names: list[str], flags: list[str], code: int
) -> None:
    write_song(tmp_path / "good.wav", 1)
    (tmp_path / "bad.wav").write_bytes(b"nothing")
    words = ["batch", str(write_list(tmp_path, *names)), "-o", str(tmp_path / "out"), "-d", "cpu"]
    assert main([*words, "--repo", str(repo), *flags]) == code


def test_stems_of_another_input_are_replaced_only_by_force(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-o", str(tmp_path / "out"), "-d", "cpu", "--repo", str(repo), "-n", MODEL]
    commands = []
    for seed, name in enumerate("xy"):
        write_song(tmp_path / name / "01.wav", 1, seed=seed)
        commands.append(["batch", str(write_list(tmp_path / name, "01.wav")), *flags])
    stem = tmp_path / f"out/{MODEL}/01-wav/drums.wav"
    assert main(commands[0]) == 0
    before = stem.read_bytes()
    capsys.readouterr()
    assert main(commands[1]) == 1
    assert f"01-wav has the stems of {tmp_path / 'x/01.wav'}: choose" in capsys.readouterr().err
    assert stem.read_bytes() == before
    assert main([*commands[1], "--force"]) == 0
    assert stem.read_bytes() != before
    write_song(tmp_path / "y/01.wav", 1, seed=3)  # the same file, edited
    assert main(commands[1]) == 0
