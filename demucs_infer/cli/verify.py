"""`demucs-infer verify FOLDER`: check the stems of earlier runs against their `stems.json`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from demucs_infer.batch.manifest import list_files, parse_manifest
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.system.checksum import sha256_file

_MANIFEST = "stems.json"


def run(words: Sequence[str]) -> int:
    """Print damaged and missing stems; return 1 if there are any, 3 if there are no manifests."""
    args = make_parser().parse_args(words)
    manifests = sorted(path for folder in args.folders for path in _find_manifests(folder))
    problems: dict[str, list[str]] = {}
    for path in manifests:
        if found := list(_check_manifest(path)):
            problems[str(path)] = found
    for name, found in problems.items():
        for problem in found:
            sys.stderr.write(f"error: {name}: {problem}\n")
    intact = len(manifests) - len(problems)
    if args.json:
        summary = {"tracks": len(manifests), "intact": intact, "problems": problems}
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        sys.stdout.write(text.encode(errors="backslashreplace").decode())
    elif not args.quiet:
        sys.stdout.write(f"{intact} of {len(manifests)} tracks intact\n")
        if problems:
            sys.stdout.write("the command that made the others repairs them with --verify\n")
    if not manifests:
        sys.stderr.write(f"error: no {_MANIFEST} in {', '.join(map(str, args.folders))}\n")
        return ExitCode.NO_INPUT
    return ExitCode.SOME_FAILED if problems else ExitCode.OK


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer verify`."""
    parser = argparse.ArgumentParser(
        "demucs-infer verify",
        description="Read all stems below the folders, and compare them with the sizes and the "
        "sha256 in their stems.json. Nothing is changed.",
        epilog="exit codes: 0 all intact, 1 some damaged or missing, 3 no stems.json found",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _find_manifests(folder: Path) -> Iterator[Path]:
    """Yield the manifests below a folder, including those with a prefix (`song_stems.json`)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the output folder of an earlier run")
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(top, name) for name in files if name.endswith(_MANIFEST))


def _check_manifest(path: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a manifest."""
    try:
        manifest = parse_manifest(json.loads(path.read_text("utf-8")))
        files = list_files(path, manifest) if manifest else {}
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        files = {}
    if not files:
        yield "is not a valid manifest"
    for file, stem in files.items():
        if problem := _check_file(file, stem):
            yield f"{file.name} {problem}"


def _check_file(file: Path, stem: Mapping[str, Any]) -> str:
    try:
        size = file.stat().st_size
        if size != stem.get("bytes"):
            return f"has {size} bytes, expected {stem.get('bytes')}"
        return "" if sha256_file(file) == stem.get("sha256") else "is damaged: its sha256 differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
