"""The command line of `demucs-infer TRACKS...`: upstream's flags by upstream's names, and ours."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from demucs_infer import __version__
from demucs_infer.cli.exit_codes import EXIT_CODE_HELP
from demucs_infer.options import NAMES, PARTS, Option, Request, drop_inapplicable, list_options

COMMANDS = {
    "models": "list, describe, fetch, find, remove and import models",
    "doctor": "versions, devices, codecs, cache and disk of this machine",
    "eval": "how good stems are, given the true ones",
    "serve": "stems over HTTP, with a page to play them",
    "batch": "all tracks of a manifest, on this machine or on many",
}
"""Words that are a command when they come first; a track of that name is written ./models."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer TRACKS...`; the other commands have their own."""
    commands = "\n".join(f"  demucs-infer {name:7} {text}" for name, text in COMMANDS.items())
    top = argparse.ArgumentParser(
        "demucs-infer",
        usage="%(prog)s [options] TRACK [TRACK ...]",
        description="Separate music into stems with the Demucs networks.",
        epilog=f"commands:\n{commands}\n"
        f"  (a track that is called like a command is written ./{next(iter(COMMANDS))})\n\n"
        f"{EXIT_CODE_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=True,
    )
    top.add_argument(
        "tracks",
        nargs="*",
        metavar="TRACK",
        help="files, folders (searched for audio files, mirrored in the output), patterns such as "
        "'**/*.flac', or - for standard input",
    )
    add_request_flags(top)
    _add_run_flags(top.add_argument_group("what to do, and what to say"))
    return top


def add_request_flags(top: argparse.ArgumentParser) -> None:
    """Add the flags of the model, and of every setting of a request."""
    _add_model_flags(top.add_argument_group("model"))
    defaults = Request()
    for part, options in PARTS.items():
        group = top.add_argument_group(part)
        exclusive: dict[str, Any] = {}
        for option in list_options(options):
            if not option.is_in("cli"):
                continue
            place: Any = group
            if option.setting.excludes:
                place = exclusive.get(option.setting.excludes)
                if place is None:
                    place = group.add_mutually_exclusive_group()
                    exclusive[option.setting.excludes] = place
            _add_option(place, option, getattr(getattr(defaults, part), option.name))
        if part == "output":
            _add_output_flags(group)


def read_request(args: argparse.Namespace, base: Mapping[str, object]) -> Request:
    """Return the request that the flags make; `base` has settings that have no flag."""
    values = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    others = {name: value for name, value in base.items() if name not in values}
    return Request().replace(drop_inapplicable({**others, **values}))


def _add_option(group: Any, option: Option, default: Any) -> None:
    setting = option.setting
    help_text = (setting.no_help or setting.help) if default is True else setting.help
    details: dict[str, Any] = {"dest": option.name, "default": default}
    if option.types == (bool,):
        action = "store_false" if default else "store_true"
        group.add_argument(*option.flags, action=action, help=help_text, **details)
        return
    if default not in (None, ()):
        help_text += f" ({default})"
    if setting.metavar:
        details["metavar"] = setting.metavar
    if default == ():
        group.add_argument(
            *option.flags, action="append", help=help_text, **{**details, "default": []}
        )
        return
    if option.choices and not option.types and not setting.metavar:
        details["choices"] = option.choices
    group.add_argument(*option.flags, type=_make_type(option), help=help_text, **details)
    for flag, value in setting.shortcuts.items():
        group.add_argument(
            flag,
            dest=option.name,
            action="store_const",
            const=value,
            help=f"the same as {option.flags[-1]} {value}",
        )


def _make_type(option: Option) -> Callable[[str], object]:
    limited = option.limited_to("cli")

    def parse(text: str) -> object:
        try:
            return limited.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _add_model_flags(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "-n", "--name", default="htdemucs", help="name or signature of a model (%(default)s)"
    )
    which.add_argument("-s", "--sig", help="signature of a single network")
    which.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="how a network of your own is built and run, as JSON; it speaks for flags that are "
        "not given",
    )
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights")
    group.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change its configuration: 'inference.batch_size=2'; repeatable",
    )
    group.add_argument(
        "--module", help="import its class from here; otherwise its package is asked for it"
    )
    group.add_argument("--class", dest="class_name", metavar="CLASS", help="name of its class")
    group.add_argument(
        "--repo", type=Path, help="folder of models to use instead of the known ones"
    )
    group.add_argument("--list-models", action="store_true", help="list the models and exit")
    group.add_argument("--cache-dir", type=Path, help="folder for downloaded models")
    group.add_argument("--offline", action="store_true", default=None, help="download nothing")
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint that may run code of its own; only for files you made yourself",
    )


def _add_output_flags(group: Any) -> None:
    group.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("separated"),
        help="folder for the stems, in a sub-folder named like the model (%(default)s); "
        "- writes one stem to standard output",
    )
    group.add_argument(
        "--no-manifest",
        dest="manifest",
        action="store_false",
        help="write no stems.json beside the stems; then nothing can be skipped",
    )
    group.add_argument(
        "--page",
        action="store_true",
        help="write stems.html beside the stems, a player with all of them inside",
    )


def _add_run_flags(group: Any) -> None:
    again = group.add_mutually_exclusive_group()
    again.add_argument(
        "--force",
        action="store_true",
        help="redo what is done; otherwise a track whose stems.json "
        "says the same input, model and settings is skipped",
    )
    again.add_argument(
        "--skip-existing", action="store_true", help="skip whatever has its files, however made"
    )
    group.add_argument(
        "--collisions",
        choices=("error", "number"),
        default="error",
        help="two tracks with the same output: refuse to start, or add -2, -3, ... (%(default)s)",
    )
    group.add_argument(
        "--demo", action="store_true", help="separate a little song that is composed on the spot"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and what it would take"
    )
    group.add_argument(
        "--progress",
        choices=("auto", "bar", "json", "none"),
        default="auto",
        help="on standard error; auto: a bar at a terminal (%(default)s)",
    )
    group.add_argument(
        "--json", action="store_true", help="a summary on standard output, as one JSON object"
    )
    loud = group.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="say more")
    loud.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    group.add_argument("--debug", action="store_true", help="show where an error comes from")
    group.add_argument("--version", action="version", version=f"demucs-infer {__version__}")
