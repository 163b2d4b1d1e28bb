"""Run the checks of the repository, all or those that are named, and stop at the first that fails.

python -m tools.check             # everything but the slow tests, as before a commit
python -m tools.check lint types
python -m tools.check all slow    # as .ci/run does
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKS = {
    "lint": [["ruff", "check", "."], ["ruff", "format", "--check", "."]],
    "types": [["mypy"]],
    "docs": [["mkdocs", "build", "--strict", "--quiet"]],
    "test": [["pytest"]],
    "slow": [["pytest", "-m", "slow"]],
}
QUICK = ("lint", "types", "docs", "test")


def main() -> int:
    """Run the checks in the order of the table; return the first exit code that is not zero."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join([*CHECKS, "all"]))
    names = parser.parse_args().checks or list(QUICK)
    if unknown := set(names) - {*CHECKS, "all"}:
        parser.error(f"unknown checks {', '.join(sorted(unknown))}: use {', '.join(CHECKS)}")
    chosen = {*names, *(QUICK if "all" in names else ())}
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    for name, commands in CHECKS.items():
        for module, *words in commands if name in chosen else ():
            print(f"{name}: {' '.join([module, *words])}", flush=True)
            code = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
