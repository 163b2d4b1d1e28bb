"""Run `demucs-infer completion SHELL`: print a script that completes commands, flags and values.

The script is generated from the parsers of all commands. The package shtab does the same, but would
be one more dependency, and does not support commands whose parsers are in separate modules.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from demucs_infer.cli import parser as separate_parser
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.parser import COMMANDS

_BASH = """\
_demucs_infer() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local command="${{COMP_WORDS[1]}}" words=""
    case "$command $previous" in
{values}
    esac
    if [ -z "$words" ]; then
        case "$command" in
{flags}
            *) words="{main}" ;;
        esac
        [ "$COMP_CWORD" -eq 1 ] && words="{commands} $words"
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _demucs_infer demucs-infer
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer completion`."""
    parser = argparse.ArgumentParser(
        "demucs-infer completion",
        description="Print a script that completes commands, flags and their values in a shell.",
        epilog="example: echo 'eval \"$(demucs-infer completion bash)\"' >> ~/.bashrc",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def run(words: Sequence[str]) -> int:
    """Print the script."""
    sys.stdout.write(make_script(make_parser().parse_args(words).shell))
    return ExitCode.OK


def make_script(shell: str) -> str:
    """Return the completion script for bash, zsh or fish."""
    parsers = {"": separate_parser.make_parser()}
    for name in COMMANDS:
        module = import_module(
            f"demucs_infer.cli.{ {'eval': 'evaluate'}.get(name, name.replace('-', '_')) }"
        )
        if hasattr(module, "make_parser"):
            try:
                parsers[name] = module.make_parser()
            except ImportError:  # an extra of this command is missing
                continue
    return _make_fish(parsers) if shell == "fish" else _make_bash(parsers, is_zsh=shell == "zsh")


def _list_flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _list_values(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Return the values of every flag that has a fixed set of them."""
    return {
        flag: [str(choice) for choice in action.choices]
        for action in parser._actions
        if action.choices is not None
        for flag in action.option_strings
    }


def _make_bash(parsers: dict[str, argparse.ArgumentParser], *, is_zsh: bool) -> str:
    # The flags of the commands come first: some have other values than the same flag without one.
    values = [
        (f'"{name} {flag}"' if name else f'*" {flag}"', choices)
        for name, parser in sorted(parsers.items(), key=lambda item: not item[0])
        for flag, choices in _list_values(parser).items()
    ]
    script = _BASH.format(
        values="\n".join(
            f'        {words}) words="{" ".join(choices)}" ;;' for words, choices in values
        ),
        flags="\n".join(
            f'            {name}) words="{" ".join(_list_flags(parser))}" ;;'
            for name, parser in parsers.items()
            if name
        ),
        main=" ".join(_list_flags(parsers[""])),
        commands=" ".join(COMMANDS),
    )
    return _ZSH + script if is_zsh else script


def _make_fish(parsers: dict[str, argparse.ArgumentParser]) -> str:
    lines = [
        f"complete -c demucs-infer -n __fish_use_subcommand -a {name} -d {text!r}"
        for name, text in COMMANDS.items()
    ]
    for name, parser in parsers.items():
        seen = f" -n '__fish_seen_subcommand_from {name}'" if name else ""
        values = _list_values(parser)
        for flag in _list_flags(parser):
            kind = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            choices = f" -xa '{' '.join(values[flag])}'" if flag in values else ""
            lines.append(f"complete -c demucs-infer{seen} {kind}{choices}")
    return "\n".join(lines) + "\n"
