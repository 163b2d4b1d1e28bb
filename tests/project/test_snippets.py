"""Run every command and Python snippet of the docs, with small models under the names there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.cli.main import main
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import ROOT, make_repo, save, write_song
from tests.helpers.server_process import Server, run_server

DOCS = ROOT / "docs"
BLOCKS = [
    (str(page.relative_to(DOCS)), kind, text)
    for page in sorted(DOCS.rglob("*.md"))
    if page.name != "community.md"  # `test_community_page.py` makes the networks for it
    for kind, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
]
COMMANDS = [
    pytest.param(line.split("  #")[0].strip(), id=f"{page}: {line.strip()[:60]}")
    for page, kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
    if line.startswith("demucs-infer")
]
PAGES = sorted({page for page, kind, _ in BLOCKS if kind == "python"})


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make small models that have the names and stems of the large ones."""
    repo = make_repo(tmp_path_factory.mktemp("snippets") / "models")
    for name in ("htdemucs", "htdemucs_ft", "htdemucs_6s"):
        (repo / f"{name}.yaml").write_text("models: ['4f2b8e3d']\n")
    return repo


@pytest.fixture(scope="module")
def workspace(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the files that the docs name."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "models").symlink_to(repo)
    for name in ("song", "episode", "music/deep/song"):
        write_song(folder / f"{name}.wav", 2).rename(folder / f"{name}.mp3")
    (folder / "songs.csv").write_text("path\nsong.mp3\n")
    for stem in ("drums", "bass", "other", "vocals"):
        (folder / "truth/song").mkdir(parents=True, exist_ok=True)
        save(folder / f"truth/song/{stem}.wav", make_noise(2, 2 * 8000))
    words = [str(folder / "song.mp3"), "--repo", str(repo), "-o", str(folder / "separated"), "-q"]
    assert main(words) == 0
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_docs_succeeds(
    line: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("demucs_infer.demo.song.__defaults__", (2.0, 0))
    program, *words = shlex.split(line)
    assert program == "demucs-infer"
    needs_repo = words[0] not in ("models", "doctor", "eval", "--demo") and "--repo" not in words
    # The song is short, and the machine may have no GPU.
    instead = {"1:30": "0:01", "1:02": "0:01", "0:30": "0:01", "15": "1", "cuda": "cpu"}
    words = [instead.get(word, word) for word in words]
    if "htdemucs_6s" in words:  # the small model has no guitar
        words = [word.replace("guitar", "bass") for word in words]
    assert main([*words, *(["--repo", "models"] if needs_repo else [])]) == 0


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("server")
    with run_server("--repo", repo, "--models", "htdemucs", "--data-dir", folder) as running:
        yield running


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(
    page: str,
    workspace: Path,
    repo: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Snippets of a page run one after the other, as a reader runs them."""
    monkeypatch.chdir(workspace)
    if page == "howto/service.md":
        server: Server = request.getfixturevalue("server")
        monkeypatch.setenv("DEMUCS_INFER_URL", server.url)
    names: dict[str, object] = {"__name__": "__main__"}
    for place, kind, text in BLOCKS:
        if place == page and kind == "python":
            local = re.sub(r'Separator\("htdemucs"', 'Separator("htdemucs", "models"', text)
            exec(compile(local, page, "exec"), names)


def test_commands_with_pipes_and_networks_have_flags_that_exist() -> None:
    """Blocks of `bash` are not run here: they need a server, a cluster or a network."""
    from tests.project.test_readme import find_parser
    from tests.snapshot.helps import COMMANDS as NAMES

    parsers = [find_parser(words) for words in NAMES.values()]
    flags = {flag for top in parsers for action in top._actions for flag in action.option_strings}
    flags |= {"--fail-with-body", "--index-url", "--array"}  # of curl, pip and sbatch
    for page, kind, text in BLOCKS:
        if kind in ("bash", "console"):
            lines = [line for line in text.splitlines() if "demucs-infer" in line]
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(lines)):
                assert flag in flags, f"{page}: {flag}"
