"""`demucs-infer eval`: how good stems are, given what they should be."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def run(words: Sequence[str]) -> int:
    """Score a folder of stems, and print the table."""
    top = argparse.ArgumentParser(
        "demucs-infer eval",
        description="Compare stems with the true ones, both as FOLDER/track/stem.wav: SDR, SI-SDR "
        "and SNR in decibels.",
    )
    top.add_argument("references", type=Path, help="folder of the true stems")
    made = top.add_mutually_exclusive_group(required=True)
    made.add_argument("estimates", type=Path, nargs="?", help="folder of the stems to score")
    made.add_argument("-n", "--name", help="or a model that is to separate the mixes")
    top.add_argument("--repo", type=Path, help="folder with that model")
    top.add_argument("-d", "--device", default="auto", help="where it runs (%(default)s)")
    top.add_argument("--stems", help="only these, separated by commas")
    top.add_argument("--frames", action="store_true", help="also the median over seconds (BSS v4)")
    kind = top.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="as JSON on standard output")
    kind.add_argument("--csv", action="store_true", help="as a table for a spreadsheet")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = top.parse_args(words)
    from demucs_infer.metrics import evaluate

    report = evaluate(
        args.references,
        args.estimates or _model(args),
        stems=args.stems.split(",") if args.stems else None,
        framewise=args.frames,
    )
    form = report.json if args.json else report.csv if args.csv else report.table
    sys.stdout.write(f"{form().rstrip()}\n")
    return 0


def _model(args: argparse.Namespace) -> "Callable[[Tensor, int], Mapping[str, Tensor]]":
    """What separates a mix."""
    from demucs_infer.api import Separator

    separator = Separator(args.name, args.repo, args.device)
    return lambda mix, sample_rate: separator.separate_tensor(mix, sample_rate)[1]
