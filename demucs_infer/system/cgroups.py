"""Find the cgroups by which Linux limits the cores and the memory of this process."""

import sys
from pathlib import Path


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return the folders of the cgroups that limit this process, from its own to the outermost.

    In a container, the path of the own cgroup may not exist; then only the outermost is returned.
    """
    if not sys.platform.startswith("linux"):
        return []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mounted = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        own = top / path.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return [folder for folder in folders if folder.is_dir()]
