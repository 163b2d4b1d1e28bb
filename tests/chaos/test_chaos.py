"""Run each subject of `tests.chaos` for a moment; docs/reliability.md has the long runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_process import ROOT, environment
from tests.helpers.oracles import require_module

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


@pytest.fixture(params=["checkpoints", "audio"])
def name(request: pytest.FixtureRequest) -> str:
    """Return a subject; among the checkpoints are quantized ones."""
    if request.param == "checkpoints":
        require_module("diffq")
    return str(request.param)


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    report = run_subject(name, tmp_path, "--count", "2000", "--seconds", "120")
    assert report["figures"]["cases"] == 2000
    assert report["figures"]["peak_megabytes"] < 2048


def test_a_few_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    report = run_subject(name, tmp_path, "--count", "150", "--seconds", "60", "--seed", "7")
    assert report["figures"]["cases"] == 150


@pytest.mark.slow
def test_failing_calls_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the server take longer: they are failed by hand."""
    scenarios = "command,command-flac,separate_to,batch,download"
    monkeypatch.setenv("CHAOS_SCENARIOS", scenarios)
    report = run_subject("faults", tmp_path, "--count", "105", "--seconds", "200", "--first", "1")
    assert report["figures"]["cases"] >= 100


@pytest.mark.slow
def test_killed_work_is_finished(tmp_path: Path) -> None:
    assert run_subject("kills", tmp_path, "--count", "12", "--seconds", "60")["counts"]


def test_work_is_stored_before_it_is_told(tmp_path: Path) -> None:
    assert run_subject("power", tmp_path)["counts"]["final names"] == 25


def test_odd_signals_are_separated_as_upstream_does(tmp_path: Path) -> None:
    assert run_subject("numbers", tmp_path)["counts"]["separated"] == 32


@pytest.mark.slow
def test_threads_share_a_separator(tmp_path: Path) -> None:
    assert run_subject("threads", tmp_path, "--count", "1")["figures"]["cases"] == 1
