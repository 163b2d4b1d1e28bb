"""Compare networks of the community here and in pymss: time and peak memory of one long track.

    python -m tests.bench.community --kind bs_roformer --minutes 10 --busy 0,1

Both read the same configuration and the same random weights, one after the other, each in a process
of its own that separates a WAV file into WAV files: ours is the command, theirs is what their
command calls. Prints one JSON object per run, then a table. pymss must be importable
(`DEMUCS_INFER_ORACLES`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.neighbors import busy_processes

ROFORMER: dict[str, Any] = {
    "dim": 256,
    "depth": 1,
    "heads": 8,
    "dim_head": 64,
    "stft_n_fft": 2048,
    "stft_hop_length": 441,
    "stft_win_length": 2048,
    "mask_estimator_depth": 2,
}
BANDS = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "bs_roformer": (
        "bs_roformer, one target",
        {"model": {**ROFORMER, "freqs_per_bands": BANDS}, "audio": {"chunk_size": 352_800}},
    ),
    "mel_band_roformer": (
        "mel_band_roformer, one target",
        {"model": {**ROFORMER, "num_bands": 60}, "audio": {"chunk_size": 352_800}},
    ),
    "scnet": (
        "scnet, two stems",
        {
            "model": {"dims": [4, 32, 64, 128], "nfft": 4096, "hop_size": 1024, "win_size": 4096},
            "audio": {"chunk_size": 485_100},
        },
    ),
    "mdx23c": (
        "mdx23c, two stems",
        {
            "model": {"num_channels": 32, "growth": 32, "num_scales": 4},
            "audio": {"chunk_size": 261_120, "n_fft": 8192, "hop_length": 1024, "dim_f": 4096},
        },
    ),
}
"""Networks of the usual width and windows, by type.

Those of RoFormers have one layer instead of six or twelve, which take as much memory one after the
other.
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
    run_command([str(folder / "song.wav"), *files, "-q", "-o", str(folder / "here")])


def separate_there(folder: Path) -> None:
    """Separate the track with pymss."""
    from tests.helpers.oracles import import_oracle

    pymss = import_oracle("pymss")
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
        "peak_mb": round(usage.ru_maxrss / 1024),
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


def main() -> None:
    """Run both programs in turn, beside each number of busy processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=SIZES, default="bs_roformer")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", default="0", help="busy processes beside them: 0,1")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--run", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        measure(args.run, args.folder)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kind").write_text(f"{args.kind} {args.minutes}")
        run("inputs", folder, args.threads)
        for busy in map(int, args.busy.split(",")):
            with busy_processes(busy):
                for _ in range(args.pairs):
                    pair = [run(program, folder, args.threads) for program in ("here", "pymss")]
                    for result in pair:
                        print(json.dumps({"busy": busy, **result}), flush=True)
                    rows.append(format_row(f"{args.kind}, {busy} busy", *pair))
                    for output in ("here", "there"):
                        shutil.rmtree(folder / output)
    print(f"\n| {args.minutes:g} minutes | ours, s | pymss, s | ratio | CPU s | peak MB | ratio |")
    print("|---" * 7 + "|")
    print("\n".join(rows))


def format_row(name: str, here: dict[str, Any], there: dict[str, Any]) -> str:
    """Return a row of the table."""
    ratios = {key: f"{there[key] / here[key]:.2f}" for key in ("seconds", "peak_mb")}
    pairs = {key: f"{here[key]:.0f} / {there[key]:.0f}" for key in ("cpu_seconds", "peak_mb")}
    cells = [name, f"{here['seconds']:.0f}", f"{there['seconds']:.0f}", ratios["seconds"]]
    cells += [pairs["cpu_seconds"], pairs["peak_mb"], ratios["peak_mb"]]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
