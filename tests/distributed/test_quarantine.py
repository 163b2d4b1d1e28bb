"""Tracks whose worker crashes again and again are left out, until somebody forces them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.cli.main import main
from tests.helpers.cli_process import environment, make_repo, write_song
from tests.helpers.networks import need_module

MODEL = "9d0a6f1c"

# Kills itself in the first window, as the out-of-memory killer would.
KILLED = """
import os, signal, sys
from torch import nn
from demucs_infer.cli.main import main

def die(module, given):
    os.kill(os.getpid(), signal.SIGKILL)

nn.modules.module.register_module_forward_pre_hook(die)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("quarantine") / "repo")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX signals here")
@pytest.mark.parametrize("out", ["out", "local://{}/out"], ids=["local", "remote"])
def test_a_quarantined_track_can_be_released(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    need_module("fsspec")
    write_song(tmp_path / "song.wav", 1)
    (tmp_path / "list.txt").write_text("song.wav\n")
    table = tmp_path / "results.jsonl"
    words = ["batch", str(tmp_path / "list.txt"), "--repo", str(repo), "-n", MODEL, "-d", "cpu"]
    words += ["-q", "-o", str(tmp_path / out.format(tmp_path)) if "://" not in out else
              out.format(tmp_path), "--results", str(table)]  # fmt: skip

    def kill_twice() -> None:
        for _ in range(2):
            process = subprocess.run(
                [sys.executable, "-c", KILLED, *words], env=environment(), stderr=subprocess.PIPE
            )
            assert process.returncode == -9, process.stderr

    def run(*flags: str) -> dict[str, Any]:
        main([*words, *flags])
        row: dict[str, Any] = json.loads(table.read_text())
        return row

    kill_twice()
    row = run()
    assert row["status"] == "quarantined"
    assert "--force" in capsys.readouterr().err
    assert run("--force")["status"] == "done"

    for path in (tmp_path / "out").rglob("*.json"):
        path.unlink()
    kill_twice()
    row = run()
    assert row["status"] == "quarantined"
    place = Path(row["error"].partition("remove ")[2].removeprefix("local://"))
    assert place.is_relative_to(tmp_path / "out")
    for path in [place] if place.is_file() else place.iterdir():
        path.unlink()
    assert run()["status"] == "done"
