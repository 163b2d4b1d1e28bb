"""Run the commands and snippets of the README, and compare its tables with the code."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.main import main
from demucs_infer.pretrained import model_info
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import ROOT, environment, make_repo, save, write_song
from tests.snapshot.helps import COMMANDS, ask_for_help

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
LINES = [
    line.split("  #")[0].strip()
    for kind, text in BLOCKS
    for line in text.splitlines()
    if kind == "sh" and line.strip()
]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with all files that the README names, and small models of these names."""
    folder = tmp_path_factory.mktemp("readme")
    repo = make_repo(folder / "models")
    (repo / "bag.yaml").rename(repo / "htdemucs_ft.yaml")
    (repo / "htdemucs.yaml").write_text("models: ['4f2b8e3d']\n")
    for name in ("song.wav", "music/deep/x.flac", "music/y.wav", "a/song.wav", "b/song.wav"):
        write_song(folder / name, 32 if name == "song.wav" else 1)
    for name in ("song", "a/song", "b/song"):
        (folder / f"{name}.wav").rename(folder / f"{name}.mp3")  # told by what is inside
    for stem in ("drums", "bass", "other", "vocals"):
        (folder / "truth/song").mkdir(parents=True, exist_ok=True)
        save(folder / f"truth/song/{stem}.wav", make_noise(2, 32 * 8000))
    words = [str(folder / "song.mp3"), "--repo", str(repo), "-o", str(folder / "separated"), "-q"]
    assert main(words) == 0  # for those commands that begin where another ended
    shim = folder / "bin/demucs-infer"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m demucs_infer --repo models "$@"\n')
    shim.chmod(0o755)
    return folder


def find_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser that reads what follows these words."""
    return ask_for_help([*words])[0]


def test_set_up_and_test_commands_come_first() -> None:
    assert LINES[0].endswith("demucs-infer --demo --page") and "pytest" in LINES[1]
    assert LINES[1].split("&&")[0] in LINES[0] and "pip install -c constraints.txt" in LINES[1]
    assert len(README.splitlines()) <= 150
    assert "pip install" in (ROOT / ".ci/run").read_text()  # where they are run


@pytest.mark.parametrize("line", LINES[2:])
def test_command_succeeds(line: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    words = shlex.split(line)
    if "|" in words or ">" in words:
        path = f"{workspace / 'bin'}:{environment()['PATH']}"
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=workspace,
            env={**environment(), "PATH": path},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return
    assert words[0] == "demucs-infer"
    if words[1:3] == ["models", "pull"]:  # there is no network here: its words are right
        assert find_parser(words[1:3]).parse_args(words[3:]).to == Path("models")
        return
    if words[1] == "--help":
        with pytest.raises(SystemExit) as left:
            main(words[1:])
        assert left.value.code == 0
        return
    own = ["--repo", "models"] if words[1] not in ("doctor", "eval") else []
    assert main([*words[1:], *own]) == 0


def test_first_command_writes_stems_and_manifest(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    assert main(["song.mp3", "--repo", "models"]) == 0
    found = {path.name for path in Path("separated/htdemucs/song").iterdir()}
    assert {"drums.wav", "bass.wav", "other.wav", "vocals.wav", "stems.json"} <= found


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(
    snippet: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workspace)
    small = snippet.replace('Separator("htdemucs"', 'Separator("htdemucs", "models"')
    assert small != snippet
    names: dict[str, object] = {}
    exec(compile(small, "README.md", "exec"), names)
    assert "InferenceOutput" in capsys.readouterr().out
    assert Path("stems/vocals.flac").is_file() and Path("out/vocals.mp3").is_file()


def rows(head: str, page: str = "README.md") -> list[list[str]]:
    """Return the rows of the table of a page that begins with that head."""
    text = (ROOT / page).read_text("utf-8")
    table = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_table_of_models_equals_the_catalog(tmp_path: Path) -> None:
    table = rows("model")
    assert len(table) > 8
    for name, purpose, count, stems, size, _score, _time, license in table:
        info = model_info(name, cache_dir=tmp_path)
        assert size == ("not known" if info.size is None else f"{info.size / 1e6:.0f} MB")
        assert int(count) == len(info.files)
        assert purpose
        assert stems == ", ".join(info.stems or ())
        assert info.license.startswith(license)


def test_table_of_packages_equals_the_dependencies() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    needed = project[project.index("\ndependencies = [") :].split("]\n")[0]
    table = rows("package", "docs/explanation/dependencies.md")
    used = {name for name, answer, _ in table if answer == "yes"}
    unused = {name for name, answer, _ in table if answer == "no"}
    assert all(f'"{name}>=' in needed for name in used)
    assert not any(f'"{name}' in needed.replace('"torch>=', "") for name in unused)
    assert {"torchaudio", "julius", "einops", "openunmix", "diffq"} <= unused


def test_exit_codes_and_flags_exist() -> None:
    table = rows("exit code", "docs/reference/files.md")
    codes = {int(code) for cell, _ in table for code in cell.split(",")}
    assert codes == set(ExitCode)
    parsers = [find_parser(words) for words in COMMANDS.values()]
    flags = {flag for top in parsers for action in top._actions for flag in action.option_strings}
    flags.add("--fail-with-body")  # of curl
    outside = README.replace(LINES[0], "").replace(LINES[1], "")
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", outside)) <= flags
