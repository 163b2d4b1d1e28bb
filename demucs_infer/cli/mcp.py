"""`demucs-infer mcp`: tools for agents over the Model Context Protocol, on standard streams."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.errors import ConfigError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer mcp`."""
    parser = argparse.ArgumentParser(
        "demucs-infer mcp",
        description="Offer separate, list_models, inspect_file and evaluate to an agent, over the "
        "Model Context Protocol on standard input and output.",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(),
        help="folder whose files an agent may read, and below which it may write (default: the "
        "current folder)",
    )
    parser.add_argument("--repo", type=Path, help="folder of models to use instead of the catalog")
    parser.add_argument("-d", "--device", default="auto", help="device of the models (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(words: Sequence[str]) -> int:
    """Serve until standard input ends."""
    args = make_parser().parse_args(words)
    if not args.root.is_dir():
        raise ValueError(f"--root {args.root} is not a folder")
    try:
        from demucs_infer.cli.mcp_tools import Toolbox, make_server
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'mcp>=2.3,<3'") from error
    make_server(Toolbox(args.root.resolve(), args.repo, args.device)).run("stdio")
    return ExitCode.OK
