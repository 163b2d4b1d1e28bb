"""The quota of cgroups is read from their files, in a made-up root."""

import sys
from pathlib import Path

import pytest

from demucs_infer.system.cores import read_cpu_quota

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux has cgroups")


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        ({"app": "max 100000"}, None),
        ({"app": "150000 100000"}, 1.5),
        ({"app": "max 100000", ".": "50000 100000"}, 0.5),
        ({"app": "400000 100000", ".": "300000 100000"}, 3.0),
        ({"app": "nonsense", ".": "200000 100000"}, 2.0),
        ({"app": "100000 0"}, None),
    ],
)
def test_smallest_quota_of_the_own_cgroup_and_those_around_it(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    make_root(
        tmp_path, "0::/app", "sys/fs/cgroup", {f"{at}/cpu.max": text for at, text in files.items()}
    )
    assert read_cpu_quota(tmp_path) == quota


@pytest.mark.parametrize("microseconds, quota", [("-1", None), ("250000", 2.5)])
def test_quota_of_the_first_version(microseconds: str, quota: float | None, tmp_path: Path) -> None:
    files = {"app/cpu.cfs_quota_us": microseconds, "app/cpu.cfs_period_us": "100000"}
    make_root(tmp_path, "4:cpu,cpuacct:/app", "sys/fs/cgroup/cpu", files)
    assert read_cpu_quota(tmp_path) == quota


def make_root(root: Path, own: str, mounted: str, files: dict[str, str]) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own + "\n")
    (root / mounted / "app").mkdir(parents=True)
    for name, text in files.items():
        (root / mounted / name).write_text(text + "\n")
