"""Compare networks of the community here and in pymss: time and peak memory of one long track.

    python -m tests.bench.community --kind bs_roformer --minutes 10 --threads 2

Both read the same configuration and the same random weights, one after the other, each in a process
of its own that separates a WAV file into WAV files. Prints one JSON object per program, then the
ratios. pymss must be importable (`DEMUCS_INFER_ORACLES`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROFORMER: dict[str, Any] = {
    "dim": 256,
    "depth": 4,
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
"""Networks of about a fifth of the work of published ones, by type."""


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
    from demucs_infer import Separator

    separator = Separator.from_pretrained(
        config=folder / "model.yaml", checkpoint=folder / "model.ckpt"
    )
    separator.separate_to(folder / "song.wav", folder / "here")


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
    (folder / "input/song.wav").symlink_to(folder / "song.wav")
    separator.process_folder(str(folder / "input"))


PROGRAMS = {"here": separate_here, "pymss": separate_there}


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


def main() -> None:
    """Run both programs in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=SIZES, default="bs_roformer")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        measure(args.run, args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        write_inputs(args.kind, args.minutes, Path(name))
        results = []
        for program in PROGRAMS:
            command = [sys.executable, "-W", "ignore", "-m", "tests.bench.community"]
            command += ["--run", program, "--folder", name]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]))
        here, there = results
        ratios = {
            key: round(there[key] / here[key], 2) for key in ("seconds", "cpu_seconds", "peak_mb")
        }
        print(json.dumps({"kind": args.kind, "minutes": args.minutes, "pymss / here": ratios}))


if __name__ == "__main__":
    main()
