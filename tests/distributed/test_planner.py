"""Estimates of a run: what limits it, what is measured, and a simulation that agrees."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from demucs_infer.api import Separator
from demucs_infer.cli.main import main
from demucs_infer.distributed.benchmark import measure
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.distributed.planner import Benchmark, plan
from tests.helpers.batch_runs import write_manifest
from tests.helpers.networks import RecordingModel
from tests.helpers.requests import make_request
from tools import simulate_cluster
from tools.simulate_cluster import ClusterModel, simulate


def rows_of(*durations: float | None) -> list[TrackRow]:
    return [TrackRow(path=str(n), source=str(n), duration=d) for n, d in enumerate(durations)]


@pytest.mark.parametrize(
    ("benchmark", "rows", "workers", "hours", "bottleneck"),
    [
        # Ten hours of audio on two workers that are twice as fast as real time.
        ({"separate": 0.5, "write": 0.1}, rows_of(*[3600] * 10), 2, 2.5, "the network"),
        ({"separate": 0.1, "read": 0.5}, rows_of(*[3600] * 10), 2, 2.5, "reading"),
        ({"separate": 0.5}, rows_of(36000, 36), 10, 5.0, "the longest track"),
        ({"separate": 0.1, "start_seconds": 7200}, rows_of(3600), 1, 2.1, "starting workers"),
        ({"separate": 1e-6, "track_seconds": 36.0}, rows_of(*[1] * 1000), 10, 1.0,
         "the fixed time per track"),
        ({"separate": 0.1, "bytes_in": 1e6, "storage_bytes_per_second": 1e6},
         rows_of(*[3600] * 10), 100, 10.0, "storage"),
        ({"separate": 0.5}, rows_of(3600, None), 1, 1.0, "the network"),
    ],
    ids=["network", "reading", "longest", "start", "fixed", "storage", "unknown length"],
)  # fmt: skip
def test_plan_finds_the_bottleneck(
    benchmark: dict[str, float], rows: list[TrackRow], workers: int, hours: float, bottleneck: str
) -> None:
    estimate = plan(rows, Benchmark(**benchmark), workers, price=2.0)  # type: ignore[arg-type]
    assert estimate.hours == pytest.approx(hours, rel=1e-3)
    assert estimate.bottleneck == bottleneck
    assert estimate.cost == pytest.approx(2 * workers * estimate.hours)
    assert estimate.hours_at_worst >= estimate.hours


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Ten hours of audio in one track."""
    return write_manifest(tmp_path / "list.csv", [{"path": "a.wav", "duration": 36_000}])


def plan_words(manifest: Path, benchmark: str, *flags: str) -> list[str]:
    path = manifest.with_name("bench.json")
    path.write_text(benchmark)
    return ["batch", str(manifest), "--plan", "--bench", str(path), *flags]


@pytest.mark.parametrize("is_json", [True, False], ids=["JSON", "text"])
def test_plan_is_printed(manifest: Path, capsys: pytest.CaptureFixture[str], is_json: bool) -> None:
    benchmark = json.dumps(asdict(Benchmark(separate=0.5)))
    words = plan_words(manifest, benchmark, "--machines", "4", "--price", "1")
    assert main([*words, "--json"] if is_json else words) == 0
    output = capsys.readouterr().out
    if is_json:
        assert json.loads(output)["hours"] == 5
    else:
        assert "bottleneck: the longest track" in output and "cost: 20.00" in output


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        ('{"speed": 1}', "`separate`"),
        *[(f'{{"separate": {value}}}', "separate = ")
          for value in ("-1", "null", "true", '"fast"', "1e308", "NaN", "Infinity")],
        ('{"separate": 0}', "must be finite and non-zero"),
        ("[]", "`separate`"),
        ("{", "bench.json: "),
        ('{"separate": 1, "name": 2}', "must be text"),
    ],
)  # fmt: skip
def test_malformed_benchmarks_are_usage_errors(
    manifest: Path, capsys: pytest.CaptureFixture[str], benchmark: str, message: str
) -> None:
    assert main(plan_words(manifest, benchmark)) == 2
    assert message in capsys.readouterr().err


def test_empty_shard_cannot_be_planned(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan_words(manifest, '{"separate": 1}', "--shard", "1/2")) == 2
    assert "is empty" in capsys.readouterr().err


def test_plan_measures_this_machine(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[int] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: runs.append(1)):
        words = ["batch", str(manifest), "--plan", "-d", "cpu", "--json", "-n", "tiny"]
        assert main(words) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert runs and estimate["worker"].startswith("measured here: tiny on cpu")
    # One worker, and its start.
    assert estimate["hours"] == pytest.approx(10 / estimate["times_real_time"], abs=0.1)
    assert not list(tmp_path.glob("separated*"))


def test_plan_downloads_nothing(
    manifest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[Any] = []

    def refuse(*host: Any, **more: Any) -> None:
        lookups.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["batch", str(manifest), "--plan", "--json", "-n", "htdemucs"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["worker"].startswith("assumed, not measured: htdemucs")
    assert estimate["hours"] == pytest.approx(10 * 0.58, rel=0.01)
    assert main(["batch", str(manifest), "--plan", "-n", "htdemoxs"]) == 4
    assert not lookups


def test_benchmark_measures_the_warm_network() -> None:
    """By a clock that ticks once a window of 0.75 s; the first one is not counted."""
    network = RecordingModel(gains=[1.0, 0.5])
    separator = Separator.from_model(network, device="cpu", shifts=0)
    benchmark = measure(
        separator,
        make_request(),
        name="x",
        seconds=7.5,
        clock=lambda: float(len(network.seen)),
    )
    assert benchmark.separate == pytest.approx(10 / 7.5, abs=1e-5)
    assert benchmark.read == benchmark.write == 0
    assert len(network.seen) > 10
    # 16 bits of two channels of two stems, and the headers.
    assert benchmark.bytes_out == pytest.approx(2 * 2 * 2 * 44_100, rel=0.01)


# ── the simulation ──

LENGTHS = simulate_cluster.draw_lengths(3000, seed=1)
BENCHMARK = Benchmark(separate=0.5, start_seconds=100)
CALM = ClusterModel(workers=20, rows_per_task=1, slow_share=0, crashes_per_hour=0)


@pytest.mark.parametrize("order", simulate_cluster.ORDERS)
def test_simulation_keeps_grahams_bound(order: str) -> None:
    """No worker is idle before the last track has started."""
    lengths = simulate_cluster.ORDERS[order](LENGTHS)
    outcome = simulate(lengths, BENCHMARK, CALM)
    assert outcome.ideal <= outcome.makespan <= outcome.ideal + lengths.max() * 0.5 / 3600
    assert (outcome.crash_count, outcome.lost) == (0, 0)


def test_plan_is_the_ideal_of_the_simulation() -> None:
    rows = rows_of(*LENGTHS.tolist())
    ideal = simulate(LENGTHS, BENCHMARK, CALM).ideal
    assert plan(rows, BENCHMARK, CALM.workers).hours == pytest.approx(ideal)


def test_crashes_add_lost_work_and_restarts() -> None:
    alone = replace(CALM, workers=1)
    calm = simulate(LENGTHS, BENCHMARK, alone)
    assert calm.makespan == pytest.approx(calm.ideal) and calm.idle == 0
    crashing = simulate(LENGTHS, BENCHMARK, replace(alone, crashes_per_hour=1.0))
    added = crashing.lost + crashing.crash_count * BENCHMARK.start_seconds / 3600
    assert crashing.crash_count > 10
    assert crashing.makespan == pytest.approx(calm.makespan + added)
