"""Measure what the chart of README shows, and write it to `results.json` and `README.md` here.

    python -m tests.bench.chart                                # half an hour on two cores
    python -m tests.bench.chart --pairs 3 --seconds 30         # ten minutes, on shorter tracks
    python -m tests.bench.chart --also 'NAME=COMMAND'          # one more peer; repeatable

COMMAND separates `{song}` (mp3) into mp3 files in the folder `{out}` with the network htdemucs in
the folder `{repo}`, without shifts. Nothing else should run on the machine. Afterwards,
`python -m tools.docs_assets chart` draws the chart.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.__main__ import compare_all, describe_machine, write_mp3
from tests.bench.pairs import Row, rows_of, time_sides
from tests.bench.shapes import write_repo

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).with_name("README.md")
TRACK_SECONDS = {"engine": 30.0, "command": 240.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A group of bars in the chart, one for each program."""

    name: str
    level: str
    model: str = "htdemucs"
    precision: str = "fp32"


CASES = (
    Case(name="htdemucs, a window", level="network"),
    Case(name="htdemucs, a window, bf16", level="network", precision="bf16"),
    Case(name="hdemucs_mmi, a window", level="network", model="hdemucs_mmi"),
    Case(name="htdemucs_ft, one stem", level="engine", model="htdemucs_ft"),
    Case(name="4 minutes, mp3 to mp3", level="command"),
)


def parse_arguments() -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m tests.bench.chart", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="length of the tracks (30 s and 240 s)")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=COMMAND")
    return parser.parse_args()


def measure(case: Case, args: Namespace, work: Path) -> dict[str, Row]:
    """Return the comparison with upstream, and that with each other program, by their names."""
    seconds = args.seconds or TRACK_SECONDS.get(case.level)
    if case.level == "command":
        return measure_commands(args, float(seconds), work)
    settings: dict[str, Any] = {
        "level": [case.level],
        "model": [case.model],
        "precision": [case.precision],
        "full": False,
        "peer": None,
        "device": "cpu",
        "threads": os.cpu_count() or 1,
        "pairs": args.pairs,
        "seconds": seconds,
    }
    (row,) = compare_all(Namespace(**settings), work)
    return {upstream(): row}


def measure_commands(args: Namespace, seconds: float, work: Path) -> dict[str, Row]:
    """Run the commands of all programs in turn, on one song."""
    song, repo = work / "song.mp3", work / "repo"
    write_mp3(song, seconds)
    repo.mkdir()
    write_repo(repo, "htdemucs")
    ours = f"{sys.executable} -m demucs_infer --force"
    theirs = f"{sys.executable} -W ignore -m demucs"
    flags = "--mp3 -n htdemucs --repo {repo} -d cpu --shifts 0 -o {out} {song}"
    programs = {"ours": f"{ours} {flags}", upstream(): f"{theirs} {flags}"}
    programs |= dict(also.split("=", 1) for also in args.also)
    commands = {
        name: [
            [
                word.format(repo=repo, song=song, out=work / str(number))
                for word in shlex.split(text)
            ]
        ]
        for number, (name, text) in enumerate(programs.items())
    }
    runs = time_sides(commands, pairs=args.pairs, work=work)
    return rows_of(f"command, {seconds:g} s mp3 to mp3", seconds, runs)


def upstream() -> str:
    """Return the name of the peer that every case has."""
    return f"demucs {version('demucs')}"


def describe(name: str, rows: dict[str, Row]) -> dict[str, Any]:
    """Return the entry of a case in `results.json`."""
    (first, *others) = rows.items()
    row = first[1]

    def figures(side: str, row: Row) -> tuple[float, int]:
        speed = row.audio_seconds / row.median(side, "seconds")
        return round(speed, 2), round(row.median(side, "peak"))

    pair = [figures("ours", row), figures("theirs", row)]
    entry: dict[str, Any] = {
        "case": row.case,
        "name": name,
        "speed": [speed for speed, _ in pair],
        "peak_mib": [peak for _, peak in pair],
    }
    if others:
        entry["others"] = {
            name: dict(zip(("speed", "peak_mib"), figures("theirs", other), strict=True))
            for name, other in others
        }
    return entry


def replace_row(text: str, row: Row, peer: str) -> str:
    """Return the page with a new row of the first table; that of another peer is put below."""
    lines = text.splitlines()
    case = row.case if peer == upstream() else f"{row.case}, {peer}"
    new = row.markdown().replace(f"| {row.case} |", f"| {case} |", 1)
    places = [at for at, line in enumerate(lines) if line.startswith(f"| {case} |")]
    if places:
        lines[places[0]] = new
    else:
        after = [at for at, line in enumerate(lines) if line.startswith(f"| {row.case} |")]
        end = next(at for at, line in enumerate(lines) if line.startswith("| `--help`"))
        lines.insert(after[0] + 1 if after else end, new)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases, print their rows, and write both files."""
    args = parse_arguments()
    machine = describe_machine(
        Namespace(device="cpu", threads=os.cpu_count() or 1, peer=None, pairs=args.pairs)
    )
    print(machine, flush=True)
    cases, page = [], README.read_text("utf-8")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(case, args, Path(folder))
        row = next(iter(rows.values()))
        cases.append(describe(row.case if args.seconds else case.name, rows))
        for peer, row in rows.items():
            print(row.markdown(), flush=True)
            page = replace_row(page, row, peer)
    results = {"machine": machine, "peer": upstream(), "cases": cases}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    README.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
