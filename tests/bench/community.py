"""Compare networks of the community here and in pymss: time and peak memory of one long track.

    python -m tests.bench.community --networks bs_roformer,scnet,mdx23c --minutes 10 --busy 0,1

Both read the same configuration and the same random weights, one after the other, each in a process
of its own that separates a WAV file into WAV files: ours is the command, theirs is what their
command calls. Prints one JSON object per run, then a table. pymss must be in the folder
`DEMUCS_INFER_ORACLES`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demucs_infer.system.malloc import peak_memory
from tests.bench.neighbors import busy_processes

ROOT = Path(__file__).parents[2]


def size(base: str, seconds: float, **sections: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of a small network, and what to change to have windows of `seconds`."""
    chunk = round(seconds * 44100 / 2048) * 2048
    audio = {"chunk_size": chunk, **sections.pop("audio", {})}
    inference = {"num_overlap": None, "overlap_size": chunk // 10}
    return base, {**sections, "audio": audio, "inference": inference}


ROFORMER: dict[str, Any] = {
    "dim": 192,
    "depth": 1,
    "heads": 6,
    "dim_head": 64,
    "stft_n_fft": 2048,
    "stft_hop_length": 882,
    "stft_win_length": 2048,
}
BANDS = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "bs_roformer": size(
        "bs_roformer, one target", 11, model={**ROFORMER, "freqs_per_bands": BANDS}
    ),
    "mel_band_roformer": size(
        "mel_band_roformer, one target", 11, model={**ROFORMER, "num_bands": 60}
    ),
    "scnet": size(
        "scnet, two stems",
        11,
        model={"dims": [4, 32, 64, 128], "nfft": 4096, "hop_size": 1024, "win_size": 4096},
    ),
    "mdx23c": size(
        "mdx23c, two stems",
        11.84,  # 256 frames
        model={"num_channels": 32, "growth": 32, "num_scales": 4},
        audio={"n_fft": 8192, "hop_length": 2048, "dim_f": 4096},
    ),
}
"""Networks by type, with windows of the usual size that overlap by a tenth.

Those of RoFormers are one layer of width 192, instead of six or twelve of 256 to 512, one after the
other, which take no more memory; SCNet is as published with two dual-path layers instead of six,
and MDX23C has one block instead of two or three at each of four scales.
"""


def write_inputs(kind: str, minutes: float, folder: Path) -> None:
    """Write configuration, weights and track."""
    from tests.helpers.audio_signals import make_noise
    from tests.helpers.cli_process import save
    from tests.helpers.community import CONFIGS, write_files

    base, changes = SIZES[kind]
    config = {**CONFIGS[base]}
    for section, values in changes.items():
        config[section] = {**config[section], **values}
    write_files(config, folder)
    save(folder / "song.wav", make_noise(2, round(minutes * 60 * 44100)), 44100)


def separate_here(folder: Path) -> None:
    """Separate the track with this package."""
    from demucs_infer.cli.main import main as run_command

    files = ["--config", str(folder / "model.yaml"), "--checkpoint", str(folder / "model.ckpt")]
    command = [str(folder / "song.wav"), *files, "-q", "-o", str(folder / "here")]
    if code := run_command(command):
        raise SystemExit(code)


def separate_there(folder: Path) -> None:
    """Separate the track with pymss."""
    sys.path.append(os.environ.get("DEMUCS_INFER_ORACLES", str(ROOT / ".oracles")))
    pymss: Any = importlib.import_module("pymss")
    separator = pymss.MSSeparator(
        "auto",
        str(folder / "model.ckpt"),
        str(folder / "model.yaml"),
        device="cpu",
        store_dirs=str(folder / "there"),
        inference_params={"batch_size": 1},
    )
    (folder / "input").mkdir(exist_ok=True)
    if not (folder / "input/song.wav").exists():
        (folder / "input/song.wav").symlink_to(folder / "song.wav")
    separator.process_folder(str(folder / "input"))
    if not any((folder / "there").rglob("*.wav")):
        raise SystemExit("pymss wrote no stems")


def write_track(folder: Path) -> None:
    """Write the inputs, in a process of its own: a child's peak would begin at its parent's."""
    kind, minutes = (folder / "kind").read_text().split()
    write_inputs(kind, float(minutes), folder)


PROGRAMS = {"here": separate_here, "pymss": separate_there, "inputs": write_track}


def measure(program: str, folder: Path) -> None:
    """Run a program, and print what it took."""
    started = time.perf_counter()
    PROGRAMS[program](folder)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "program": program,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round((peak_memory() or 0) / 1e6),
    }
    print(json.dumps(result))


def run(program: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run a program in a process of its own, and return what it took."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.community"]
    command += ["--run", program, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(kind: str, busy: int, folder: Path, args: argparse.Namespace) -> str:
    """Run both programs in turn, and return the row of the table."""
    pairs = []
    with busy_processes(busy):
        for _ in range(args.pairs):
            pair = [run(program, folder, args.threads) for program in ("here", "pymss")]
            for result in pair:
                print(json.dumps({"network": kind, "busy": busy, **result}), flush=True)
            pairs.append(pair)
            for output in ("here", "there"):
                shutil.rmtree(folder / output)
    return format_row(f"{kind}, {busy} busy", pairs)


def format_row(name: str, pairs: list[list[dict[str, Any]]]) -> str:
    """Format medians of all pairs, the spread of the ratio of times, and the worst peak of ours."""

    def medians(key: str) -> list[float]:
        return [statistics.median(pair[side][key] for pair in pairs) for side in (0, 1)]

    ratios = sorted(there["seconds"] / here["seconds"] for here, there in pairs)
    seconds, cpu = medians("seconds"), medians("cpu_seconds")
    here, there = max(pair[0]["peak_mb"] for pair in pairs), medians("peak_mb")[1]
    cells = [
        name,
        f"{seconds[0]:.0f} / {seconds[1]:.0f}",
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
        f"{cpu[0]:.0f} / {cpu[1]:.0f}",
        f"{here:.0f} / {there:.0f}",
        f"{there / here:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run both programs in turn, for each network beside each number of busy processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="bs_roformer,scnet,mdx23c", help=", ".join(SIZES))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", default="0,1", help="busy processes beside them")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--run", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        measure(args.run, args.folder)
        return
    rows = []
    for kind in args.networks.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "kind").write_text(f"{kind} {args.minutes}")
            run("inputs", folder, args.threads)
            for busy in map(int, args.busy.split(",")):
                rows.append(compare(kind, busy, folder, args))
                print(rows[-1], flush=True)  # if the rest of the run is interrupted
    columns = ["network", "s, ours / pymss", "ratio (spread)", "CPU s", "peak MB", "ratio"]
    print(f"\n{args.minutes:g} minutes, {args.threads} threads, {args.pairs} pairs\n")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
