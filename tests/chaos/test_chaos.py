"""Run each subject of `tests.chaos` for a moment; docs/reliability.md has the long runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_process import ROOT, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, /proc and limits")


def run_subject(name: str, folder: Path, *words: str) -> dict[str, Any]:
    """Run a subject in a process of its own, and return its report."""
    path = folder / "report.json"
    command = [sys.executable, "-m", "tests.chaos", name, "--json", str(path), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert path.exists(), done.stderr
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert report["findings"] == {}
    return report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints", "audio"])
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    report = run_subject(name, tmp_path, "--count", "2000", "--seconds", "120")
    assert report["figures"]["cases"] == 2000
    assert report["figures"]["peak_megabytes"] < 2048


@pytest.mark.parametrize("name", ["checkpoints", "audio"])
def test_a_few_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    report = run_subject(name, tmp_path, "--count", "150", "--seconds", "60", "--seed", "7")
    assert report["figures"]["cases"] == 150
