"""Find how many cores this process may use."""

import math
import os
from pathlib import Path

from demucs_infer.system.cgroups import cgroup_folders


def count_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by the quota of cgroups."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    count = getattr(os, "process_cpu_count", None)  # also knows PYTHON_CPU_COUNT
    cores = min(cores, (count() if count else None) or cores)
    quota = read_cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores the cgroups of this process may use on average; None: no limit."""
    quotas: list[float] = []
    for folder in cgroup_folders(root, "cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text()
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)
