"""Run the commands of the page on networks of the community, and compare its table."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from demucs_infer.cli.main import main
from demucs_infer.custom.community import TYPES
from tests.helpers.cli_process import ROOT, environment, make_repo, write_song
from tests.helpers.community import CONFIGS, write_files
from tests.helpers.oracles import require_module

PAGE = (ROOT / "docs/community.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
LINES = [text.strip() for kind, text in BLOCKS if kind == "sh"]
EXAMPLES = {
    "bs_roformer": "bs_roformer, one target",
    "mel_band_roformer": "mel_band_roformer, two stems",
    "scnet": "scnet, two stems",
    "mdx23c": "mdx23c, two stems",
    "htdemucs": "htdemucs, four stems",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the files that the page names: small networks, and a second of noise."""
    require_module("pymss_core")
    folder = tmp_path_factory.mktemp("community")
    for name, kind in EXAMPLES.items():
        write_files(CONFIGS[kind], folder, f"model_{name}")
    repo = make_repo(folder / "models")
    audio = {**CONFIGS["bs_roformer, one target"]["audio"], "sample_rate": 8000}
    write_files({**CONFIGS["bs_roformer, one target"], "audio": audio}, repo, "singer")
    bag = next(text for kind, text in BLOCKS if kind == "yaml")
    (repo / "best.yaml").write_text(bag.replace("955717e8", "4f2b8e3d"))
    write_song(folder / "song.wav", 1)
    shim = folder / "bin/demucs-infer"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m demucs_infer "$@"\n')
    shim.chmod(0o755)
    return folder


@pytest.mark.parametrize("line", LINES)
@pytest.mark.filterwarnings("ignore:A window was not provided")
def test_command_succeeds(line: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    if "|" not in line:
        assert main([*shlex.split(line)[1:], "-q", "--force"]) == 0
        return
    path = f"{workspace / 'bin'}:{environment()['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-ec", line],
        cwd=workspace,
        env={**environment(), "PATH": path},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_snippet_runs(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    snippet = next(text for kind, text in BLOCKS if kind == "python")
    exec(compile(snippet, "community.md", "exec"), {})
    assert "torch.Size([2, 44100])" in capsys.readouterr().out


def test_table_has_every_supported_type() -> None:
    table = PAGE[PAGE.index("| `model_type`") :].split("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) == set(TYPES)
