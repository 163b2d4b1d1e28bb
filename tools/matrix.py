"""Run the tests on every Python at hand, with the oldest and the newest torch that it takes.

    python -m tools.matrix                          # all, in environments below build/matrix
    python -m tools.matrix --python 3.10 --oldest   # one of them
    python -m tools.matrix -- tests/engine -x       # other arguments for pytest

Oldest means the floors of pyproject.toml, of all packages that the package itself needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
QUICK = ["tests", "-m", "not slow and not browser", "-q", "-p", "no:cacheprovider"]
TEST_PACKAGES = [
    "pytest", "hypothesis", "julius", "safetensors", "soundfile", "soxr", "fastapi", "uvicorn",
    "python-multipart", "prometheus-client", "httpx", "httpx2", "jsonschema", "hatchling",
    "museval", "einops", "sphn", "huggingface_hub",
]  # fmt: skip


def read_floors() -> list[str]:
    """Return the oldest version of each dependency, as pyproject.toml has it."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = text[text.index("\ndependencies = [") :].split("\n]")[0]
    return [f"{name}=={floor}" for name, floor in re.findall(r'"([\w-]+)>=([\d.]+)"', needed)]


def run_one(python: str, *, oldest: bool, arguments: list[str]) -> int:
    """Make an environment, install the package, and run the tests in it."""
    interpreter = shutil.which(f"python{python}")
    # The launchers of pyenv are there for versions, too, that are not switched on.
    if (
        not interpreter
        or subprocess.run([interpreter, "--version"], capture_output=True).returncode
    ):
        print(f"python{python}: not at hand", flush=True)
        return 0
    folder = ROOT / "build/matrix" / f"{python}-{'oldest' if oldest else 'newest'}"
    subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, *(read_floors() if oldest else []), "-e", ".", *TEST_PACKAGES], cwd=ROOT,
                   check=True)  # fmt: skip
    subprocess.run([*pip, "--no-deps", "demucs==4.1.0"], check=True)  # an oracle
    print(f"python{python}, {'oldest' if oldest else 'newest'} packages", flush=True)
    command = [folder / "bin/python", "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT).returncode


def main() -> int:
    """Run the chosen combinations; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", choices=PYTHONS, help="default: all at hand")
    parser.add_argument("--oldest", action="store_true", help="only the floors")
    parser.add_argument("--newest", action="store_true", help="only the newest packages")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    args = parser.parse_args()
    kinds = [True] * (args.oldest or not args.newest) + [False] * (args.newest or not args.oldest)
    codes = [
        run_one(python, oldest=oldest, arguments=args.arguments or QUICK)
        for python in args.python or PYTHONS
        for oldest in kinds
    ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
