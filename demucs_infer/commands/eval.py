"""`demucs-infer eval`: how good stems are, given what they should be."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run(words: Sequence[str]) -> int:
    """Score a folder of stems, and print the table."""
    top = argparse.ArgumentParser(
        "demucs-infer eval",
        description="Compare stems with the true ones, both as FOLDER/track/stem.wav: SDR, SI-SDR "
        "and SNR in decibels.",
    )
    top.add_argument("references", type=Path, help="folder of the true stems")
    top.add_argument("estimates", type=Path, help="folder of the stems to score")
    top.add_argument("--stems", help="only these, separated by commas")
    top.add_argument("--frames", action="store_true", help="also the median over seconds (BSS v4)")
    top.add_argument("--json", action="store_true", help="as JSON on standard output")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = top.parse_args(words)
    from demucs_infer.metrics import evaluate

    report = evaluate(
        args.references,
        args.estimates,
        stems=args.stems.split(",") if args.stems else None,
        framewise=args.frames,
    )
    sys.stdout.write(f"{report.json() if args.json else report.table()}\n")
    return 0
