"""`demucs-infer models`: what there is, where it is, and how it gets there; no torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demucs_infer import pretrained
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.checkpoints.download import progress_bar
from demucs_infer.pretrained import ModelInfo, list_models, model_info


def parser() -> argparse.ArgumentParser:
    """The words after `models`."""
    top = argparse.ArgumentParser("demucs-infer models", description="The models and their files.")
    top.set_defaults(json=False, cache_dir=None)
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, *words: str, nargs: str | None = None) -> Any:
        one = actions.add_parser(name, help=text, description=text)
        for word in words:
            one.add_argument(word, nargs=nargs)
        one.add_argument("--cache-dir", type=Path, help="folder for downloaded models")
        one.add_argument("--json", action="store_true", help="as JSON on standard output")
        one.add_argument("--debug", action="store_true", help="show where an error comes from")
        return one

    listing = action("ls", "list the models: name, stems, size, whether they are here")
    listing.add_argument("--repo", type=Path, help="those of a folder instead")
    listing.add_argument("--all", action="store_true", help="every single network too")
    action("info", "all that is known about a model", "name")
    fetch = action("pull", "download models, to be used without a network later", "name", nargs="+")
    fetch.add_argument("--to", type=Path, help="also copy them into a folder for --repo")
    fetch.add_argument("--offline", action="store_true", default=None, help="download nothing")
    action("path", "where the files of a model are, or will be", "name")
    action("rm", "delete the downloaded files of models", "name", nargs="+")
    action("import", "take downloaded files, or folders of them, into the cache", "file", nargs="+")
    return top


def run(words: Sequence[str]) -> int:
    """Do what `words` say."""
    args = parser().parse_args(words)
    actions = {
        "ls": _list,
        "info": _describe,
        "pull": _pull,
        "path": _path,
        "rm": _remove,
        "import": _import,
    }
    actions[args.action](args)
    return 0


def list_as_upstream(repo: Path | None) -> int:
    """The list of `--list-models`, in upstream's form."""
    found = list_models(repo)
    for title, kind in (("Bag of models:", "bag"), ("Single models:", "single")):
        _say("\n    ".join([title, *found[kind]]))
    return 0


def _list(args: argparse.Namespace) -> None:
    if args.repo:
        found = list_models(args.repo)
        rows = [{"name": name, "kind": kind, "path": str(path)} for kind in ("bag", "single")
                for name, path in found[kind].items()]  # fmt: skip
        lines = [f"{row['name']:24} {row['kind']:7} {row['path']}" for row in rows]
    else:
        catalog = load_catalog()
        shipped = [one.signature for one in catalog.checkpoints.values() if one.is_bundled]
        names = [*catalog.bags, *(catalog.checkpoints if args.all else shipped)]
        infos = [model_info(name, cache_dir=args.cache_dir) for name in dict.fromkeys(names)]
        rows = [_row(info) for info in infos]
        lines = [_line(info) for info in infos]
    _say(json.dumps(rows, indent=2, default=str) if args.json else "\n".join(lines))


def _describe(args: argparse.Namespace) -> None:
    info = model_info(args.name, cache_dir=args.cache_dir)
    if args.json:
        return _say(json.dumps(asdict(info), indent=2, default=str))
    lines = [
        _line(info),
        f"  license of the weights: {info.license}" + (f" ({info.source})" if info.source else ""),
        *([f"  {info.note}"] if info.note else []),
    ]
    for file in info.files:
        where = file.path if file.is_cached else file.urls[0] if file.urls else "no address known"
        lines += [f"  {file.file}  {where}", f"    sha256 {file.sha256}"]
    return _say("\n".join(lines))


def _pull(args: argparse.Namespace) -> None:
    for name in args.name:
        _files(args, fetch(name, to=args.to, cache_dir=args.cache_dir, offline=args.offline))


def fetch(
    name: str,
    *,
    to: Path | None = None,
    cache_dir: Path | None = None,
    offline: bool | None = None,
    quiet: bool = False,
) -> list[Path]:
    """The files of a model; a bar at a terminal tells of those that have to come from afar."""
    with progress_bar(name, hidden=True if quiet else None) as on_progress:
        return pretrained.pull(
            name, to=to, cache_dir=cache_dir, offline=offline, progress=on_progress
        )


def _path(args: argparse.Namespace) -> None:
    _files(args, pretrained.paths(args.name, cache_dir=args.cache_dir))


def _remove(args: argparse.Namespace) -> None:
    gone = {name: pretrained.remove(name, cache_dir=args.cache_dir) for name in args.name}
    for name, paths in gone.items():
        if not paths:
            sys.stderr.write(f"{name}: no file of it is in the cache, so nothing was deleted\n")
    _files(args, [path for paths in gone.values() for path in paths])


def _import(args: argparse.Namespace) -> None:
    for file in args.file:
        _files(args, pretrained.add_checkpoint(file, cache_dir=args.cache_dir))


def _files(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    names = [str(path) for path in paths]
    if args.json or names:
        _say(json.dumps(names) if args.json else "\n".join(names))


def _row(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "stems": info.stems,
        "bytes": info.size,
        "is_cached": info.is_cached,
        "is_bundled": info.is_bundled,
        "license": info.license,
    }


def _line(info: ModelInfo) -> str:
    size = "" if info.size is None else f"{info.size / 1e6:.1f} MB"
    state = (
        "is_bundled with the package"
        if info.is_bundled
        else "here"
        if info.is_cached
        else "to download"
    )
    stems = ", ".join(info.stems or ("stems unknown",))
    return f"{info.name:24} {size:>10}  {state:12} {stems}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
