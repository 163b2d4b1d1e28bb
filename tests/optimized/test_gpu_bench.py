"""The bench for a GPU runs to its end, whatever one of its steps does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench.gpu.checks import check_products, check_spectra
from tests.bench.gpu.measures import measure_short_tracks, measure_tracks, measure_variants
from tests.bench.gpu.profiles import kind_of
from tests.bench.gpu.report import Part, Report
from tests.bench.gpu.shapes import RELEASED, SMALL, make_network


def run_bench(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench.gpu", "--out", str(out), "--device", "cpu"]
    return subprocess.run(
        [*command, *flags], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )


def read_results(out: Path) -> list[dict[str, object]]:
    results: list[dict[str, object]] = json.loads((out / "gpu.json").read_text())["results"]
    return results


def test_steps_run_on_a_cpu(tmp_path: Path) -> None:
    part = Part(Report(tmp_path, {"device": "cpu"}), "check", 60)
    cpu = torch.device("cpu")
    part.run("products", lambda: check_products(part, cpu))
    part.run("spectra", lambda: check_spectra(part, SMALL, cpu))
    part.run(
        "variants", lambda: measure_variants(part, make_network(SMALL, "htdemucs"), cpu, SMALL)
    )
    part.run("short tracks", lambda: measure_short_tracks(part, SMALL, cpu))
    part.run("tracks", lambda: measure_tracks(part, SMALL, cpu, tmp_path))
    results = read_results(tmp_path)
    assert len(results) > 23 and all(result["passed"] is not False for result in results)


@pytest.mark.slow
def test_every_part_runs_on_tiny_networks(tmp_path: Path) -> None:
    done = run_bench(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_results(tmp_path)
    assert {result["part"] for result in results} == {"check", "measure", "profile"}
    assert not (tmp_path / "errors.txt").exists()
    assert sum(result["passed"] is True for result in results) > 50
    assert not [result for result in results if "skipped" in str(result["note"])]
    assert "ms a window" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "profile.txt").stat().st_size > 1000


def test_failing_step_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    report = Report(tmp_path, {"device": "none"})
    part = Part(report, "check", 60)

    def fail() -> None:
        raise RuntimeError("no kernel image")

    part.run("first", fail)
    part.run("second", lambda: part.add("speed", 3.0, "x", least=2.0))
    assert [result["passed"] for result in read_results(tmp_path)] == [False, True]
    assert "no kernel image" in (tmp_path / "errors.txt").read_text()
    assert [failure.name for failure in report.failures] == ["first"]


def test_part_begins_nothing_after_its_time(tmp_path: Path) -> None:
    part = Part(Report(tmp_path, {}), "measure", -1)
    part.run("late", lambda: pytest.fail("it was run"))
    assert "skipped" in str(read_results(tmp_path)[0]["note"])


def test_goal_that_is_missed_fails(tmp_path: Path) -> None:
    report = Report(tmp_path, {})
    Part(report, "measure", 60).add("3 min", 699.0, "x real time", least=700.0)
    assert report.failures[0].note.startswith("must be >= 700")
    assert "**FAILED**" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_norm_gate_kernel", "ours"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16", "convolutions"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void vectorized_elementwise_kernel<4, at::native::GeluCUDAKernel>", "elementwise"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void regular_fft<4096u>", "transforms"),
    ],
)
def test_kernels_are_sorted_by_kind(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


@pytest.mark.parametrize("name", RELEASED.networks)
def test_released_networks_can_be_built(name: str) -> None:
    with torch.device("meta"):
        network = RELEASED.networks[name]()
    assert sum(parameter.numel() for parameter in network.parameters()) > 10**7
