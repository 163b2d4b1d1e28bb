"""Compare ours with upstream 4.1.0 (or another package of our name) on the same weights and audio.

    python -m tests.bench                     # a few minutes: networks and a short track
    python -m tests.bench --full              # everything, an hour or two
    python -m tests.bench --peer PYTHON       # against the demucs-infer that PYTHON has
    python -m tests.bench --level workers     # a batch: two workers against one
    python -m tests.bench --level process     # one process on two cores against two of a thread
    python -m tests.bench --level batch       # 20 short songs in one run
    python -m tests.bench --busy 0,1,2        # beside so many processes that compute all the time
    python -m tests.bench --cores 1,2,4       # with so many cores, and as many threads

Weights are random at the released shapes: speed and error need no training. Nothing else should run
on the machine.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.bench.music import RATE, song
from tests.bench.neighbors import busy_processes, limited_cores
from tests.bench.pairs import HEADER, Row, compare, compare_commands
from tests.bench.shapes import BAGS, write_repo

TRACKS = 8  # of the two workers
SHORT_SONGS = 20
WINDOW = {"htdemucs": 7.8, "htdemucs_ft": 7.8, "hdemucs_mmi": 10.0, "mdx": 10.0}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m tests.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", action="store_true", help="every model at every level")
    parser.add_argument(
        "--level",
        action="append",
        choices=["network", "engine", "command", "start", "workers", "process", "batch"],
    )
    parser.add_argument("--model", action="append", choices=list(BAGS))
    parser.add_argument("--precision", action="append", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="length of the engine's and command's track")
    parser.add_argument("--to", action="append", choices=["wav", "mp3"], help="of the command")
    parser.add_argument("--busy", type=_parse_counts, default=[0], help="busy processes: 0,1,2")
    parser.add_argument("--busy-memory", action="store_true", help="and one that moves memory")
    parser.add_argument("--cores", type=_parse_counts, default=[None], help="cores to use: 1,2,4")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with demucs-infer 4.4.0")
    return parser.parse_args()


def _parse_counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def describe_machine(args: argparse.Namespace) -> str:
    """Describe the machine and the versions in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0].partition(":")[2].strip() if lines else name
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name(args.device)
    against = "demucs-infer of --peer" if args.peer else f"demucs {version('demucs')}"
    return (
        f"{name}, {args.threads} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}, against {against}, {args.pairs} interleaved pairs"
    )


def compare_all(args: argparse.Namespace, work: Path) -> Iterator[Row]:
    """Yield the comparisons that were asked for."""
    levels = args.level or (["network", "engine", "command", "start"] if args.full else ["network"])
    models = args.model or (list(BAGS) if args.full else ["htdemucs"])
    side, python = ("peer", args.peer) if args.peer else ("upstream", sys.executable)
    length = args.seconds or 60.0
    track = work / "track.pt"
    torch.save(song(max(length, 11.0)), track)
    for model in models:
        repo = work / model
        repo.mkdir()
        write_repo(repo, model)
        order: dict[str, Any] = {
            "model": model,
            "repo": str(repo),
            "track": str(track),
            "device": args.device,
            "threads": args.threads,
            "stems": None,
        }
        common: dict[str, Any] = {"side": side, "python": python, "pairs": args.pairs, "work": work}
        for precision in args.precision or ["fp32", "bf16"]:
            order["precision"] = precision
            if "network" in levels and model != "htdemucs_ft":
                window = order | {"level": "network", "seconds": WINDOW[model]}
                yield compare(f"{model}, one window, {precision}", window, **common)
            if "engine" in levels:
                whole = order | {"level": "engine", "seconds": length}
                if model == "htdemucs_ft":
                    one = whole | {"stems": ["vocals"]}
                    yield compare(f"{model}, one stem of {length:g} s, {precision}", one, **common)
                else:
                    yield compare(f"{model}, {length:g} s, {precision}", whole, **common)
        if "command" in levels and model == "htdemucs":
            yield from compare_command_line(args, repo, work)
        if "batch" in levels and model == "htdemucs":
            yield compare_batch(args, repo, work)
        if {"workers", "process"} & set(levels) and model == "htdemucs":
            yield from compare_workers(args, repo, work, levels)
    if "start" in levels:
        yield compare_commands(
            "`--help`",
            1.0,
            {
                "ours": [[sys.executable, "-m", "demucs_infer", "--help"]],
                side: [[python, "-m", "demucs_infer" if args.peer else "demucs", "--help"]],
            },
            pairs=args.pairs,
            work=work,
        )


def compare_command_line(args: argparse.Namespace, repo: Path, work: Path) -> Iterator[Row]:
    """Compare the commands: mp3 in, wav and mp3 out."""
    seconds = args.seconds or 240.0
    source = work / "song.mp3"
    write_mp3(source, seconds)
    side, python = ("peer", args.peer) if args.peer else ("upstream", sys.executable)
    module = "demucs_infer" if args.peer else "demucs"
    shared = [
        "-n",
        "htdemucs",
        "--repo",
        str(repo),
        "-d",
        args.device,
        "--shifts",
        "0",
        str(source),
    ]
    for kind in args.to or ["wav", "mp3"]:
        flags = ["--mp3"] if kind == "mp3" else []
        ours = [sys.executable, "-m", "demucs_infer", "-o", "a", "--force", *flags, *shared]
        theirs = [python, "-W", "ignore", "-m", module, "-o", "b", *flags, *shared]
        case = f"command, {seconds:g} s mp3 to {kind}"
        both = {"ours": [ours], side: [theirs]}
        yield compare_commands(case, seconds, both, pairs=args.pairs, work=work)


def compare_batch(args: argparse.Namespace, repo: Path, work: Path) -> Row:
    """Compare runs over 20 songs of 17.5 s, three windows each, in one process."""
    seconds = args.seconds or 17.5
    names = [f"short-{number}.wav" for number in range(SHORT_SONGS)]
    write_tracks(work, names, seconds)
    shared = ["-n", "htdemucs", "--repo", str(repo), "-d", args.device, "--shifts", "0", *names]
    ours = [sys.executable, "-m", "demucs_infer", "-o", "a", "--force", "-q", *shared]
    theirs = [sys.executable, "-W", "ignore", "-m", "demucs", "-o", "b", *shared]
    case = f"command, {SHORT_SONGS} songs of {seconds:g} s"
    both = {"ours": [ours], "upstream": [theirs]}
    return compare_commands(case, SHORT_SONGS * seconds, both, pairs=args.pairs, work=work)


def compare_workers(
    args: argparse.Namespace, repo: Path, work: Path, levels: list[str]
) -> Iterator[Row]:
    """Compare batches of equal tracks: two workers ("ours") with one, a thread each.

    At the level "process": one process on two cores ("ours") with two of a thread each.
    """
    seconds = args.seconds or 17.5  # three windows
    names = [f"{number}.wav" for number in range(TRACKS)]
    write_tracks(work, names, seconds)
    manifest = work / "tracks.txt"
    manifest.write_text("".join(f"{name}\n" for name in names))

    def batch(out: str, *flags: str, threads: int = 1) -> list[str]:
        shared = ["-n", "htdemucs", "--repo", str(repo), "-d", "cpu", "--shifts", "0", "--force"]
        python = [
            "env",
            f"OMP_NUM_THREADS={threads}",
            sys.executable,
            "-m",
            "demucs_infer",
            "batch",
        ]
        return [*python, str(manifest), "-o", out, "-q", *shared, *flags]

    ray = ["--engine", "ray", "--rows-per-task", "1"]
    shards = [batch("a", "--shard", f"{number}/2") for number in range(2)]
    cases = {}
    if "workers" in levels:
        cases["two workers, two shards"] = {"two": shards, "one": [batch("b")]}
        if find_spec("ray") is not None:
            two, one = (batch(out, *ray, "--workers", n) for out, n in (("a", "2"), ("b", "1")))
            cases["two workers, Ray"] = {"two": [two], "one": [one]}
    if "process" in levels:
        name = "one process on two cores, two of a thread"
        cases[name] = {"one": [batch("b", threads=2)], "two": shards}
    for name, sides in cases.items():
        case = f"{name}: {TRACKS} tracks of {seconds:g} s"
        yield compare_commands(case, TRACKS * seconds, sides, pairs=args.pairs, work=work)


def write_tracks(folder: Path, names: list[str], seconds: float) -> None:
    """Write different songs of equal length."""
    import soundfile

    for seed, name in enumerate(names):
        soundfile.write(folder / name, song(seconds, seed).T.numpy(), RATE)


def write_mp3(path: Path, seconds: float) -> None:
    """Encode with neither side, because both read the file."""
    import lameenc

    encoder = lameenc.Encoder()
    encoder.set_bit_rate(320)
    encoder.set_in_sample_rate(RATE)
    encoder.set_channels(2)
    encoder.set_quality(7)
    samples = (song(seconds).T * 32767).short().contiguous().numpy().tobytes()
    path.write_bytes(bytes(encoder.encode(samples) + encoder.flush()))


def main() -> None:
    """Print one row of the table after the other."""
    args = parse_arguments()
    print(f"{describe_machine(args)}\n\n{HEADER}", flush=True)
    for cores, busy in product(args.cores, args.busy):
        args.threads = cores or args.threads
        conditions = [f"{cores} cores"] if cores else []
        conditions += [f"{busy} busy"] if busy else []
        conditions += ["1 moving memory"] if args.busy_memory else []
        with (
            limited_cores(cores),
            busy_processes(busy, int(args.busy_memory)),
            tempfile.TemporaryDirectory() as folder,
        ):
            for row in compare_all(args, Path(folder)):
                case = ", ".join([row.case, *conditions])
                print(replace(row, case=case).markdown(), flush=True)


if __name__ == "__main__":
    main()
