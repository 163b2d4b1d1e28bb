"""The parser of `demucs-infer TRACKS...`: the flags of upstream's command, and more.

The flags of all settings (`--overlap` and so on) are made from the fields in `options.py`.
"""

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from demucs_infer import __version__
from demucs_infer.audio.formats import FORMATS
from demucs_infer.cli.exit_codes import EXIT_CODE_HELP
from demucs_infer.options import PARTS, Option, Request, list_options
from demucs_infer.pretrained import DEFAULT_MODEL

COMMANDS = {
    "models": "list, describe, download, remove and import models",
    "doctor": "print versions, devices, codecs, cache and disk of this machine",
    "eval": "score stems against the true ones",
    "serve": "separate over HTTP, with a web page to play the stems",
    "mcp": "offer separation to agents, over the Model Context Protocol",
    "batch": "separate all tracks of a manifest, on one machine or many",
    "plot": "draw waveforms and spectrograms of stems",
    "completion": "print a script that completes flags in bash, zsh or fish",
    "verify": "check the stems of earlier runs against their stems.json",
    "config-schema": "print the JSON Schema of the files for --config",
}
"""Commands, if they are the first word; a track of that name is written ./models."""

_EXAMPLES = """\
examples:
  demucs-infer song.mp3                      all stems, into separated/htdemucs/song/
  demucs-infer song.mp3 --two-stems vocals   vocals, and everything else
  demucs-infer song.mp3 -n tiny --mp3        a small model, and small files
"""
_MODEL_NOTE = """\
The default model htdemucs is downloaded at first use (see `demucs-infer models ls`); the small
model tiny ships with the package.
"""
_SYNONYMS = {
    **{f"--{name}": f"--format {name}" for name in FORMATS},
    "--bit-depth": "--bits",
    "--cpu": "--device cpu",
    "--cuda": "--device cuda",
    "--end": "--duration (seconds after --start)",
    "--gpu": "--device cuda",
    "--instrumental": "--two-stems vocals",
    "--karaoke": "--two-stems vocals",
    "--model": "--name",
    "--output": "--out",
    "--output-dir": "--out",
    "--sample-rate": "--rate",
    "--samplerate": "--rate",
    "--stop": "--duration (seconds after --start)",
    "--threads": "--jobs",
    "--to": "--duration (seconds after --start)",
    "--vocals": "--stems vocals",
    "--workers": "--jobs",
}
"""Flags that other programs have, and what they are called here."""


class FlagParser(argparse.ArgumentParser):
    """A parser that suggests a flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message and suggestions."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        hints = [f"use {hint} instead of {flag}" for flag in flags if (hint := self._suggest(flag))]
        takes_tracks = any(action.nargs in ("*", "+") for action in self._get_positional_actions())
        if unknown and not flags and takes_tracks:  # argparse reads tracks in one place only
            hints.append("name all tracks in one place, before the flags or after them")
        super().error("; ".join([message, *hints]))

    def _get_option_tuples(self, option_string: str) -> Any:
        """Return the flags that this may abbreviate; a flag of another program is none of them."""
        if self._translate(option_string.partition("=")[0]):
            return []
        return super()._get_option_tuples(option_string)

    def _translate(self, flag: str) -> str | None:
        """Return what a flag of another program is called here, if this command has it."""
        own = _SYNONYMS.get(flag)
        return own if own and own.split()[0] in self._option_string_actions else None

    def _suggest(self, flag: str) -> str | None:
        if own := self._translate(flag):
            return own
        return next(iter(difflib.get_close_matches(flag, self._option_string_actions, 1)), None)


class _StoreWithFlag(argparse.Action):
    """Store the value, and which of several flags was typed as `NAME_flag`, for messages."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 (argparse passes it)
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        if option_string and option_string.startswith("--"):
            setattr(namespace, f"{self.dest}_flag", option_string)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer TRACKS...`; the other commands have their own."""
    commands = "\n".join(f"  demucs-infer {name:13} {text}" for name, text in COMMANDS.items())
    parser = FlagParser(
        "demucs-infer",
        usage="%(prog)s [options] TRACK [TRACK ...]",
        description="Separate music into stems with the Demucs networks.",
        epilog=f"{_EXAMPLES}\n{_MODEL_NOTE}\ncommands:\n{commands}\n"
        f"  (write ./{next(iter(COMMANDS))} for a track with the name of a command)\n\n"
        f"{EXIT_CODE_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=True,
    )
    parser.add_argument(
        "tracks",
        nargs="*",
        metavar="TRACK",
        help="files, folders (searched for audio files, mirrored in the output), patterns such as "
        "'**/*.flac', or - for standard input",
    )
    add_request_flags(parser)
    _add_run_flags(parser.add_argument_group("run and report"))
    return parser


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model and of every setting of a request."""
    _add_model_flags(parser.add_argument_group("model"))
    defaults = Request()
    for part, options in PARTS.items():
        group = parser.add_argument_group(part)
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


def _add_option(group: Any, option: Option, default: Any) -> None:
    setting = option.setting
    help_text = (setting.no_help or setting.help) if default is True else setting.help
    help_text = help_text.replace("%", "%%")
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
    if len(option.flags) > 1:
        details["action"] = _StoreWithFlag
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
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "-n", "--name", default=DEFAULT_MODEL, help="name or signature of a model (%(default)s)"
    )
    source.add_argument("-s", "--sig", help="signature of a single network")
    source.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration of a custom network, JSON or the YAML of "
        "Music-Source-Separation-Training; flags take precedence over its settings",
    )
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for --config")
    group.add_argument(
        "--model-type",
        metavar="TYPE",
        help="type of the network of --config, such as bs_roformer, if the file leaves it open",
    )
    group.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of --config: 'inference.batch_size=2'; repeatable",
    )
    group.add_argument(
        "--module",
        help="module with the class of the network (default: the package that registered it)",
    )
    group.add_argument("--class", dest="class_name", metavar="CLASS", help="its class in --module")
    group.add_argument(
        "--then",
        metavar="STEM=MODEL",
        help="separate a stem again with another model, and write the stems of it instead: "
        "drums=drumsep; name STEM in --stems to keep it, too",
    )
    group.add_argument("--repo", type=Path, help="folder of models to use instead of the catalog")
    group.add_argument("--list-models", action="store_true", help="list the models and exit")
    group.add_argument("--cache-dir", type=Path, help="folder for downloaded models")
    group.add_argument("--offline", action="store_true", default=None, help="download nothing")
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint that may execute code: only for files that you made yourself",
    )


def _add_output_flags(group: Any) -> None:
    group.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("separated"),
        help="folder for the stems, in a subfolder named after the model (%(default)s); "
        "- writes one stem to standard output",
    )
    group.add_argument(
        "--no-manifest",
        dest="manifest",
        action="store_false",
        help="do not write stems.json; later runs then cannot skip finished tracks",
    )
    group.add_argument(
        "--page",
        action="store_true",
        help="write stems.html beside the stems, a player that contains them",
    )


def _add_run_flags(group: Any) -> None:
    repeated = group.add_mutually_exclusive_group()
    repeated.add_argument(
        "--force",
        action="store_true",
        help="separate again; otherwise tracks are skipped whose stems.json has the same input, "
        "model and settings, and stems of another input are not replaced",
    )
    repeated.add_argument(
        "--skip-existing",
        action="store_true",
        help="skip tracks whose files exist, whatever their settings were",
    )
    repeated.add_argument(
        "--verify",
        action="store_true",
        help="read the stems of finished tracks, and separate those again whose sha256 differs "
        "from stems.json; otherwise only their sizes are compared",
    )
    group.add_argument(
        "--reuse",
        action="store_true",
        help="if only another format is requested, encode the lossless stems of an earlier run "
        "instead of separating again; float stems are used without this flag, as nothing is lost",
    )
    group.add_argument(
        "--clean",
        action="store_true",
        help="remove files that earlier runs left beside the stems; "
        "otherwise they stay, and are listed",
    )
    group.add_argument(
        "--collisions",
        choices=("auto", "error", "number"),
        default="auto",
        help="if two tracks have the same output: stop with an error, or add -2, -3, ... to their "
        "names; auto: add the type to names from folders and patterns, as in song-mp3 and "
        "song-flac, and stop otherwise (%(default)s)",
    )
    group.add_argument(
        "--demo", action="store_true", help="separate a synthesized song, and score the stems"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and estimate its cost"
    )
    group.add_argument(
        "--progress",
        choices=("auto", "bar", "json", "none"),
        default="auto",
        help="what to print on standard error; auto: a bar if it is a terminal (%(default)s)",
    )
    group.add_argument(
        "--json", action="store_true", help="print a summary on standard output, as a JSON object"
    )
    level = group.add_mutually_exclusive_group()
    level.add_argument("-v", "--verbose", action="store_true", help="print the log")
    level.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument("--version", action="version", version=f"demucs-infer {__version__}")
