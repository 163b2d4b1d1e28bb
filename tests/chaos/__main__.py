"""Run one subject: `python -m tests.chaos NAME --seconds N --seed S [--json FILE]`."""

import argparse
import importlib
import json
import resource
import sys
from pathlib import Path

from tests.chaos.report import Limits, Report

MAX_BYTES = 12 * 2**30
SUBJECTS = ("checkpoints", "audio", "faults", "kills", "power", "soak", "threads", "numbers")
SUBJECTS += ("ray_kills",)


def main() -> int:
    """Run the subject and return 1 if it found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--share", type=float, default=1.0, help="share of a core for a soak")
    parser.add_argument(
        "--coverage", action="store_true", help="of checkpoints: let atheris choose what to mutate"
    )
    parser.add_argument("--json", type=Path, help="write figures and findings to this file")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))  # of a mistake in here
    limits = Limits(args.seed, args.seconds, args.count, args.first, args.share)
    name = "coverage" if args.coverage else args.subject
    report: Report = importlib.import_module(f"tests.chaos.{name}").run(limits)
    if args.json:
        report.write(args.json)
    print(json.dumps(report.to_json(), indent=2))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
