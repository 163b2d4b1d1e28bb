"""`demucs-infer eval`: score stems against the true ones."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from demucs_infer.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from torch import Tensor


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer eval`."""
    parser = argparse.ArgumentParser(
        "demucs-infer eval",
        description="Compare stems with the true ones, both as FOLDER/track/stem.wav: SDR, SI-SDR "
        "and SNR in decibels, fullness and bleedless from 0 to 100.",
    )
    parser.add_argument("references", type=Path, help="folder of the true stems")
    compared = parser.add_mutually_exclusive_group(required=True)
    compared.add_argument("estimates", type=Path, nargs="?", help="folder of the stems to score")
    compared.add_argument("-n", "--name", help="or a model that separates the mixtures")
    parser.add_argument("--repo", type=Path, help="folder of that model")
    parser.add_argument("-d", "--device", default="auto", help="device of the model (%(default)s)")
    parser.add_argument("--stems", help="score only these, separated by commas")
    parser.add_argument(
        "--frames", action="store_true", help="add the median over seconds (BSS v4)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON on standard output")
    form.add_argument("--csv", action="store_true", help="print a table for a spreadsheet")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page with boxplots and all scores"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(words: Sequence[str]) -> int:
    """Score a folder of stems, or a model, and print the table."""
    args = make_parser().parse_args(words)
    from demucs_infer.metrics import evaluate

    report = evaluate(
        args.references,
        args.estimates or _open_model(args),
        stems=args.stems.split(",") if args.stems else None,
        framewise=args.frames,
    )
    if args.html:
        args.html.write_text(report.html(), "utf-8")
    text = report.json() if args.json else report.csv() if args.csv else report.table()
    sys.stdout.write(f"{text.rstrip()}\n")
    return ExitCode.OK


def _open_model(
    args: argparse.Namespace,
) -> "Callable[[Tensor, int], Mapping[str, Tensor]]":
    from demucs_infer.api import Separator

    separator = Separator(args.name, args.repo, args.device)
    return lambda mixture, sample_rate: separator.separate_tensor(mixture, sample_rate)[1]
