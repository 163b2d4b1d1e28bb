"""Check the order of system calls: what is told as done has been stored on the disk before.

The calls of a run are logged, and replayed on a model of a disk that keeps of a file what was
synchronized, and of a folder the names that were there when it was synchronized. At every moment
at which a final name appears, or a track or a download is told as done, the disk must have it.
"""

import os
import shutil
import tempfile
from pathlib import Path

from tests.chaos.report import Limits, Report
from tests.chaos.scenarios import CONTENT, SCENARIOS, clean, fork, prepare, results, wait
from tests.chaos.shim import Shim, restart_with_shim

HIDDEN = (".partial", ".part", ".lock", ".etag", ".stamp")


class Disk:
    """What would be left after a power loss."""

    def __init__(self) -> None:
        self.unsynced_files: set[str] = set()
        self.unsynced_names: dict[str, set[str]] = {}
        """Folders with names that appeared, changed or went since the last synchronization."""

    def apply(self, call: str, path: str, other: str) -> None:
        """Change it by one call."""
        match call:
            case "open" if other == "w":
                if path not in self.unsynced_files and not Path(path).is_dir():
                    self.unsynced_files.add(path)
                    self._touch(path)
            case "write" | "truncate":
                self.unsynced_files.add(path)
            case "fsync":
                self.unsynced_files.discard(path)
                self.unsynced_names.pop(path, None)
            case "rename":
                if path in self.unsynced_files:
                    self.unsynced_files.add(other)
                else:
                    self.unsynced_files.discard(other)
                self.unsynced_files.discard(path)
                self._touch(path)
                self._touch(other)
            case "mkdir":
                self._touch(path)
            case "unlink":
                self.unsynced_files.discard(path)
                self._touch(path)

    def _touch(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        self.unsynced_names.setdefault(folder, set()).add(name)

    def has(self, path: Path, top: Path) -> str:
        """Return why a file would be lost; nothing if it would not."""
        if str(path) in self.unsynced_files:
            return "its content is not synchronized"
        for part in (path, *path.parents):
            if part.name in self.unsynced_names.get(str(part.parent), ()):
                return f"the name {part.name} is not synchronized in its folder"
            if part.parent == top:
                break
        return ""


def _is_final(path: Path, out: Path) -> bool:
    if not path.is_relative_to(out):
        return False
    return not any(part.endswith(HIDDEN) or part.startswith(".") for part in path.parts)


def check(lines: list[str], folder: Path, files: list[Path]) -> tuple[list[str], int]:
    """Return what is wrong in a log of calls, and how many final names it has."""
    disk, problems, names = Disk(), [], 0
    out = folder / "out"
    for line in lines:
        call, path, other = line.split("\t")
        if call == "rename" and _is_final(Path(other), out) and Path(other).suffix != ".jsonl":
            names += 1
            if path in disk.unsynced_files:
                problems.append(f"{Path(other).name} appears before its content is synchronized")
            if other.endswith("stems.json"):
                stems = [file for file in files if file.parent == Path(other).parent]
                problems += [
                    f"stems.json appears before {file.name} is stored: {reason}"
                    for file in stems
                    if file.name != "stems.json" and (reason := disk.has(file, folder))
                ]
        disk.apply(call, path, other)
        if call == "write" and "results.jsonl" in path:  # a row tells that a track is done
            done = [file for file in files if str(file) in line_targets(lines, line)]
            problems += [f"told before {f.name} is stored" for f in done if disk.has(f, folder)]
    problems += [
        f"told before {file.name} is stored: {reason}"
        for file in files
        if (reason := disk.has(file, folder))
    ]
    return problems, names


def line_targets(lines: list[str], line: str) -> set[str]:
    """Return the final names that appeared before a line."""
    before = lines[: lines.index(line)]
    return {text.split("\t")[2] for text in before if text.startswith("rename")}


def run(limits: Limits) -> Report:
    """Log and check each scenario once."""
    restart_with_shim()
    shim = Shim()
    report = Report("power", limits.seed)
    for name in ("command", "command-flac", "separate_to", "batch", "download"):
        top = Path(tempfile.mkdtemp(prefix="chaos-power-")).resolve()
        folder = top / "work"
        folder.mkdir()
        try:
            prepare(folder)
            clean(folder)
            number = os.open(top / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

            def work(name: str = name, folder: Path = folder, number: int = number) -> int:
                scenario = SCENARIOS[name]
                return scenario.run(
                    folder, lambda: shim.arm(folder, log=number), lambda: shim.disarm() and None
                )

            if wait(fork(work, top / "log", folder / "tmp")) != 0:
                raise AssertionError((top / "log").read_text())
            os.close(number)
            files = [folder / "out" / file for file in results(folder) if "results" not in file]
            lines = (top / "calls").read_text().splitlines()
            problems, names = check(lines, folder, files)
            report.counts["calls"] += len(lines)
            report.counts["final names"] += names
            if names < len(files):
                report.find(name, f"{names} renames of {len(files)} files were seen")
            for problem in problems:
                report.find(name, problem)
        finally:
            shutil.rmtree(top, ignore_errors=True)
    report.figures["download bytes"] = len(CONTENT)
    shim.remove()
    return report
