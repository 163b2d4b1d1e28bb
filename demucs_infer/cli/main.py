"""`demucs-infer`: parse, call, report. Nothing here computes, and torch comes last."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module

from demucs_infer.cli.custom_model import with_config
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.parser import COMMANDS, make_parser
from demucs_infer.cli.signals import Terminated, exit_on_signal
from demucs_infer.errors import (
    ConfigError,
    DemucsError,
    ModelLoadingError,
    format_error,
    is_out_of_memory,
)

_INTERRUPTED_WORDS = "interrupted; the same command continues where this one stopped"
_WITHOUT_MODEL = {"serve", "eval"}  # where a contradiction is in what was typed
_BATCH_GRACE_SECONDS = 10.0  # for its network, files that are on their way, and a cluster


def main(opts: Sequence[str] | None = None) -> int:
    """Run the command line `opts`, or that of the process, and say how it went.

    `--help`, `--version` and wrong usage leave by `SystemExit`, as argparse does.
    """
    if opts is None:
        _occupy_closed_streams()
    words = list(sys.argv[1:] if opts is None else opts)
    is_debug = "--debug" in words
    try:
        if words and words[0] == "batch" and opts is None:
            with exit_on_signal(_INTERRUPTED_WORDS, _BATCH_GRACE_SECONDS):
                return _command(words)
        if words and words[0] in COMMANDS:
            return _command(words)
        with exit_on_signal(_INTERRUPTED_WORDS) if opts is None else nullcontext():
            return _tracks(words)
    except KeyboardInterrupt as error:
        print(_INTERRUPTED_WORDS, file=sys.stderr)
        return ExitCode.TERMINATED if isinstance(error, Terminated) else ExitCode.INTERRUPTED
    except BrokenPipeError:
        return ExitCode.SOME_FAILED  # whoever read our output has seen enough
    except Exception as error:  # noqa: BLE001 (people get a sentence, not a traceback)
        if is_debug:
            traceback.print_exc()
        code = _explained(error)
        is_about_model = not words or words[0] not in _WITHOUT_MODEL
        return code if is_about_model or not isinstance(error, ConfigError) else ExitCode.USAGE


def _occupy_closed_streams() -> None:
    """A process may be started without them: a file would get the number of one, and its words."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)
            if name == "stderr":  # whoever reads or writes the others has to know
                sys.stderr = open(number, "w")  # noqa: PTH123, SIM115 (as long as the process)


def _command(words: Sequence[str]) -> int:
    """`demucs-infer models`, and the others of that kind."""
    name = {"eval": "evaluate"}.get(words[0], words[0])  # eval is a function of Python's
    code: int = import_module(f"demucs_infer.cli.{name}").run(words[1:])
    return code


def _explained(error: Exception) -> int:
    """Say what went wrong, and give the exit code of it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    elif isinstance(error, DemucsError | ValueError | OSError) or is_out_of_memory(error):
        print(f"error: {format_error(error)}", file=sys.stderr)
    else:
        print(
            f"error: {format_error(error)} (--debug shows where; please report it)", file=sys.stderr
        )
    if isinstance(error, ModelLoadingError | ConfigError):
        return ExitCode.NO_MODEL
    return ExitCode.USAGE if isinstance(error, ValueError) else ExitCode.SOME_FAILED


def _tracks(words: Sequence[str]) -> int:
    """`demucs-infer TRACKS...`"""
    top = make_parser()
    args = with_config(top, words)
    if args.demo and not args.tracks and args.repo is None:
        top.set_defaults(name="tiny")  # the demo needs no network, whatever else is asked for
        args = with_config(top, words)
    if args.list_models:
        from demucs_infer.cli.models import list_as_upstream

        return list_as_upstream(args.repo)
    if not args.tracks and not args.demo:
        top.error(
            "which tracks? Name files, folders or patterns, or - for standard input; "
            "a name that begins with - is written ./-name"
        )
    from demucs_infer.cli.separate import separate_tracks

    with _logging(args):
        return separate_tracks(args)


@contextmanager
def _logging(args: argparse.Namespace) -> Iterator[None]:
    """What the library says of itself goes to the error stream, if it is asked for."""
    logger, handler, before = logging.getLogger("demucs_infer"), logging.StreamHandler(), 0
    if args.debug or args.verbose:
        before = logger.level
        logger.setLevel(logging.DEBUG if args.debug else logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        if handler in logger.handlers:
            logger.removeHandler(handler)
            logger.setLevel(before)
