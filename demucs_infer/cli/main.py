"""The entry point of `demucs-infer`: run a command, and print its error on one line.

torch is imported as late as possible.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module

from demucs_infer.cli.arguments import parse_arguments
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
from demucs_infer.options import OPTIONS

_INTERRUPTED = "interrupted; the same command continues where this one stopped"
_NO_COMMANDS = {"separate", "seperate", "split", "run"}
"""First words of users who expect a command for what needs none."""
_MODULES = {"eval": "evaluate"}  # `eval` is a function of Python
_COMMANDS_WITHOUT_MODEL = {"serve", "eval"}  # an invalid configuration is wrong usage there
_BATCH_GRACE_SECONDS = 10.0  # for running windows, uploads, and a cluster


def main(opts: Sequence[str] | None = None, *, announces_tracks: bool = False) -> int:
    """Run a command line, by default that of the process, and return the exit code.

    With `announces_tracks`, upstream's lines about the folder and the tracks are printed, too.
    `--help`, `--version` and wrong usage raise `SystemExit`, as argparse does.
    """
    is_process = opts is None
    if is_process:
        _reopen_closed_streams()
    words = list(sys.argv[1:] if opts is None else opts)
    command = words[0] if words and words[0] in COMMANDS else None
    try:
        with _exit_on_signal(command) if is_process else nullcontext():
            if command is None:
                return _separate(words, announces_tracks=announces_tracks)
            name = _MODULES.get(command, command.replace("-", "_"))
            module = import_module(f"demucs_infer.cli.{name}")
            return int(module.run(words[1:]))
    except KeyboardInterrupt as error:
        print(_INTERRUPTED, file=sys.stderr)
        return ExitCode.TERMINATED if isinstance(error, Terminated) else ExitCode.INTERRUPTED
    except BrokenPipeError:
        return ExitCode.SOME_FAILED  # the reader of our output, such as `head`, has closed it
    except Exception as error:  # noqa: BLE001 (users get a message, not a traceback)
        if "--debug" in words:
            traceback.print_exc()
        _print_error(error, words)
        if command in _COMMANDS_WITHOUT_MODEL and isinstance(error, ConfigError):
            return ExitCode.USAGE
        if isinstance(error, ModelLoadingError | ConfigError):
            return ExitCode.NO_MODEL
        return ExitCode.USAGE if isinstance(error, ValueError) else ExitCode.SOME_FAILED


@contextmanager
def _exit_on_signal(command: str | None) -> Iterator[None]:
    """Exit soon after a signal in commands that separate; a server handles signals itself."""
    if command is None:
        with exit_on_signal(_INTERRUPTED):
            yield
    elif command == "batch":
        with exit_on_signal(_INTERRUPTED, _BATCH_GRACE_SECONDS):
            yield
    else:
        yield


def _reopen_closed_streams() -> None:
    """Open the null device in place of closed standard streams.

    Otherwise the next file that is opened gets the descriptor of a closed stream, and the output
    meant for that stream.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)
            if name == "stderr":  # the others stay None, so that `-` and `--out -` are refused
                sys.stderr = open(number, "w")  # noqa: PTH123, SIM115 (open until the end)


def _print_error(error: Exception, words: Sequence[str]) -> None:
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = _use_flag_name(format_error(error), words)
        is_expected = isinstance(error, DemucsError | ValueError | OSError)
        if not is_expected and not is_out_of_memory(error):
            text += " (--debug shows the traceback; please report it)"
    print(f"error: {text}", file=sys.stderr)


def _use_flag_name(text: str, words: Sequence[str]) -> str:
    """Replace the setting at the beginning of a message of the library by the flag as typed."""
    match = re.match(r"((?:invalid |unsupported )?)(\w+) ?= ?", text)
    option = OPTIONS.get(match[2]) if match else None
    if match is None or option is None or not option.is_in("cli"):
        return text
    typed = {word.partition("=")[0] for word in words if word.startswith("--")}
    flag = next((flag for flag in option.flags if flag in typed), option.long_flag)
    return f"{match[1]}{flag} {text[match.end() :]}"


def _separate(words: Sequence[str], *, announces_tracks: bool) -> int:
    """Run `demucs-infer TRACKS...`."""
    parser = make_parser()
    if words and not os.path.lexists(words[0]):
        if words[0] == "help":
            words = ["--help"]
        elif words[0] in _NO_COMMANDS:
            track = words[1] if len(words) > 1 else "song.mp3"
            parser.error(f"no command is needed: demucs-infer {track}")
    args = parse_arguments(parser, words)
    if args.demo and not args.tracks and args.repo is None:
        parser.set_defaults(name="tiny")  # so that the demo needs no download
        args = parse_arguments(parser, words)
    if args.list_models:
        from demucs_infer.cli.models import print_upstream_list

        print_upstream_list(args.repo)
        return ExitCode.OK
    if not args.tracks and not args.demo:
        parser.error(
            "no tracks given: name files, folders or patterns, or - for standard input; "
            "write ./-name for a file whose name begins with -"
        )
    from demucs_infer.cli.separate import separate_tracks

    with _log_to_stderr(args.debug, args.verbose):
        return separate_tracks(args, announces_tracks=announces_tracks)


@contextmanager
def _log_to_stderr(is_debug: bool, is_verbose: bool) -> Iterator[None]:
    """Print the log of the library with --verbose or --debug."""
    if not (is_debug or is_verbose):
        yield
        return
    logger, handler = logging.getLogger("demucs_infer"), logging.StreamHandler()
    level = logger.level
    logger.setLevel(logging.DEBUG if is_debug else logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
