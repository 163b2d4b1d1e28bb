"""Results are right at every level of instructions that this processor has.

Each level is a process of its own, because what may be used is decided when a library is loaded.
"""

import platform
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.optimized.instruction_levels import LEVELS, Level, run_level

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists(),
    reason="levels of x86, read from /proc/cpuinfo",
)

MIN_DECIBELS = {"fp32": 100, "bf16": 40}
"""Signal above the error, per precision: exactness classes B and C."""


Reports = dict[str, Future[dict[str, Any]]]


def find_missing(level: Level) -> list[str]:
    """Return the instructions of a level that this processor does not have."""
    facts = Path("/proc/cpuinfo").read_text()
    flags = next(line for line in facts.splitlines() if line.startswith("flags")).split()
    return [flag for flag in level.needs if flag not in flags]


@pytest.fixture(scope="module")
def reports() -> Iterator[Reports]:
    """Run every level that the processor has, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        names = [name for name, level in LEVELS.items() if not find_missing(level)]
        yield {name: pool.submit(run_level, name) for name in names}


@pytest.mark.parametrize("name", LEVELS)
def test_results_are_right_at_instruction_level(name: str, reports: Reports) -> None:
    level = LEVELS[name]
    if missing := find_missing(level):
        pytest.skip(f"this processor has no {', '.join(missing)}")
    report = reports[name].result()
    print(f"{name}: {report}")
    # Were the level not in force, or the kernels not there, the rest would show nothing.
    # PyTorch before 2.6 has another name for the lowest level.
    names = {level.pytorch.upper()} | ({"NO AVX"} if level.pytorch == "default" else set())
    assert report["pytorch"] in names
    assert report["kernels"] == {"fp32": True, "bf16": level.has_bf16_kernels}
    assert report["auto"] == ("bf16" if level.multiplies_bf16 else "fp32")
    text = "precision='bf16' is slower than 'fp32' on this processor"
    assert [text in warning for warning in report["warnings"]] == [True] * (
        report["auto"] == "fp32"
    )
    # Packing these weights takes longer than multiplying by them.
    assert report["packed anew"] == []
    for precision, minimum in MIN_DECIBELS.items():
        answers = report["decibels"][precision]
        assert len(answers) == 10
        assert {what: got for what, got in answers.items() if not got >= minimum} == {}
