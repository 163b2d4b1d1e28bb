"""Check a program of a user with the types that the package ships."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli_process import ROOT

CLIENT = Path(__file__).with_name("typed_client.py")


@pytest.mark.slow
def test_typed_program_has_the_marked_errors_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    program = tmp_path / "client.py"
    program.write_text(CLIENT.read_text("utf-8"))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", str(program)]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]  # torch is parsed once
    done = subprocess.run([*command, *cache], cwd=tmp_path, capture_output=True, text=True)
    reported = {int(line) for line in re.findall(r"client\.py:(\d+): error", done.stdout)}
    lines = program.read_text("utf-8").splitlines()
    expected = {at for at, line in enumerate(lines, 1) if line.endswith("# expected error")}
    assert reported == expected and len(expected) == 2, done.stdout + done.stderr
