"""Generate songs: `python -m tools.studio FOLDER --first 0 --songs 200 --seconds 40`.

Each becomes FOLDER/SEED.npy, half precision, (4 stems, 2 channels, samples) at 44.1 kHz;
existing files are kept.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from tools.studio.song import make_song


def main() -> None:
    """Parse the arguments and write one file per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0, help="the first song's seed")
    parser.add_argument("--songs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first, args.first + args.songs):
        path = args.folder / f"{seed}.npy"
        if path.exists():
            continue
        began = time.monotonic()
        stems = make_song(seed, args.seconds).astype(np.float16)
        partial = path.with_suffix(".part")
        with partial.open("wb") as file:
            np.save(file, stems)
        partial.rename(path)
        print(f"{path} {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
