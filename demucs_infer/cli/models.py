"""`demucs-infer models`: list, describe, download and remove models; without importing torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demucs_infer import pretrained
from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.checkpoints.download import progress_bar
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.pretrained import ModelInfo, list_models, model_info


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer models`."""
    parser = argparse.ArgumentParser(
        "demucs-infer models", description="List, download and remove models."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add_action(
        name: str,
        text: str,
        positional: str | None = None,
        nargs: str | None = None,
        aliases: Sequence[str] = (),
    ) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text, aliases=aliases)
        if positional:
            action.add_argument(positional, nargs=nargs)
        action.add_argument("--cache-dir", type=Path, help="folder for downloaded models")
        action.add_argument("--json", action="store_true", help="print JSON on standard output")
        action.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return action

    listing = add_action(
        "ls", "list models: name, size, whether it is downloaded, stems", aliases=["list"]
    )
    listing.add_argument("--repo", type=Path, help="list the models of this folder instead")
    listing.add_argument("--all", action="store_true", help="also list single networks of bags")
    add_action("info", "describe a model and its files", "name")
    pull = add_action("pull", "download models, for use without a network later", "name", "+")
    pull.add_argument("--to", type=Path, help="also copy them into a folder for --repo")
    pull.add_argument("--offline", action="store_true", default=None, help="download nothing")
    add_action("path", "print the paths of the files of a model, downloaded or not", "name")
    add_action("rm", "delete the downloaded files of models", "name", "+")
    add_action("import", "copy downloaded files, or folders of them, into the cache", "file", "+")
    return parser


def run(words: Sequence[str]) -> int:
    """Run one of the actions."""
    args = make_parser().parse_args(words or ["ls"])
    actions = {
        "ls": _list,
        "list": _list,
        "info": _describe,
        "pull": _pull,
        "path": _print_paths_of_model,
        "rm": _remove,
        "import": _import,
    }
    actions[args.action](args)
    return ExitCode.OK


def print_upstream_list(repo: Path | None) -> None:
    """Print the models as upstream's `--list-models` does."""
    models = list_models(repo)
    for title, kind in (("Bag of models:", "bag"), ("Single models:", "single")):
        _print("\n    ".join([title, *models[kind]]))


def download(
    name: str,
    *,
    to: Path | None = None,
    cache_dir: Path | None = None,
    offline: bool | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Return the files of a model, downloading missing ones with a bar if this is a terminal."""
    network = load_catalog().networks.get(name)
    store = CheckpointStore.from_environment(cache_dir)
    is_first = network is not None and not store.digest(network.files[1])
    with progress_bar(name, hidden=True if quiet else None) as on_progress:
        paths = pretrained.pull(
            name, to=to, cache_dir=cache_dir, offline=offline, progress=on_progress
        )
    if network and is_first and not quiet and (digest := store.digest(network.files[1])):
        sys.stderr.write(
            f"{name}: no sha256 of its weights is published; that of this download, {digest}, is "
            "kept and enforced from now on\n"
        )
    return paths


def _list(args: argparse.Namespace) -> None:
    if args.repo:
        models = list_models(args.repo)
        rows = [{"name": name, "kind": kind, "path": str(path)} for kind in ("bag", "single")
                for name, path in models[kind].items()]  # fmt: skip
        lines = [f"{row['name']:24} {row['kind']:7} {row['path']}" for row in rows]
    else:
        catalog = load_catalog()
        bundled = [entry.signature for entry in catalog.checkpoints.values() if entry.is_bundled]
        names = [*catalog.bags, *(catalog.checkpoints if args.all else bundled)]
        names += catalog.networks
        infos = [model_info(name, cache_dir=args.cache_dir) for name in dict.fromkeys(names)]
        rows = [_make_row(info) for info in infos]
        width = max(len(info.name) for info in infos)
        lines = [_format_line(info, width) for info in infos]
    _print(json.dumps(rows, indent=2, default=str) if args.json else "\n".join(lines))


def _describe(args: argparse.Namespace) -> None:
    info = model_info(args.name, cache_dir=args.cache_dir)
    if args.json:
        _print(json.dumps(asdict(info), indent=2, default=str))
        return
    source = f" ({info.source})" if info.source else ""
    lines = [_format_line(info), f"  license of the weights: {info.license}{source}"]
    if info.note and info.name not in load_catalog().networks:
        lines.append(f"  {info.note}")
    for file in info.files:
        url = file.urls[0] if file.urls else "no known URL"
        lines += [f"  {file.file}  {file.path if file.is_cached else url}"]
        lines += [f"    sha256 {file.sha256}"]
    _print("\n".join(lines))


def _pull(args: argparse.Namespace) -> None:
    for name in args.name:
        paths = download(name, to=args.to, cache_dir=args.cache_dir, offline=args.offline)
        _print_paths(args, paths)


def _print_paths_of_model(args: argparse.Namespace) -> None:
    _print_paths(args, pretrained.paths(args.name, cache_dir=args.cache_dir))


def _remove(args: argparse.Namespace) -> None:
    removed: list[Path] = []
    for name in args.name:
        paths = pretrained.remove(name, cache_dir=args.cache_dir)
        if not paths:
            sys.stderr.write(f"{name}: not in the cache, nothing was deleted\n")
        removed += paths
    _print_paths(args, removed)


def _import(args: argparse.Namespace) -> None:
    for file in args.file:
        _print_paths(args, pretrained.add_checkpoint(file, cache_dir=args.cache_dir))


def _print_paths(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    names = [str(path) for path in paths]
    if args.json:
        _print(json.dumps(names))
    elif names:
        _print("\n".join(names))


def _make_row(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "stems": info.stems,
        "bytes": info.size,
        "is_cached": info.is_cached,
        "is_bundled": info.is_bundled,
        "license": info.license,
        "note": info.note,
    }


def _format_line(info: ModelInfo, width: int = 0) -> str:
    size = "" if info.size is None else f"{info.size / 1e6:.1f} MB"
    state = "bundled" if info.is_bundled else "downloaded" if info.is_cached else "to download"
    stems = ", ".join(info.stems or ("stems unknown",))
    note = ""
    if info.name == pretrained.DEFAULT_MODEL:
        note = " (default: start here)"
    elif info.is_bundled:
        note = " (to try the program; trained on synthetic music)"
    line = f"{info.name:{width}} {size:>10}  {state:12} {stems}{note}"
    if info.name in load_catalog().networks:
        line += f"\n    {info.note}; license: {info.license}"
    return line


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
