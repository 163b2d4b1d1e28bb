"""What `--help` says, of the command and of every command below it.

The text itself is laid out by argparse, and by each version of Python differently: 3.13 writes
`-o, --out OUT` for `-o OUT, --out OUT` and wraps the usage elsewhere. So it is not the text that is
kept, but what the parser that would print it was told: every flag, with its value, choices,
default and words, in our own layout.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from demucs_infer.cli.main import main

COMMANDS = {
    "demucs-infer": [],
    "models": ["models"],
    "models-ls": ["models", "ls"],
    "models-info": ["models", "info"],
    "models-pull": ["models", "pull"],
    "models-path": ["models", "path"],
    "models-rm": ["models", "rm"],
    "models-import": ["models", "import"],
    "doctor": ["doctor"],
    "eval": ["eval"],
    "serve": ["serve"],
    "mcp": ["mcp"],
    "batch": ["batch"],
    "plot": ["plot"],
    "completion": ["completion"],
    "verify": ["verify"],
    "config-schema": ["config-schema"],
}
"""The words before `--help`, by the name of the data file."""


def collect_helps() -> dict[str, str]:
    """Describe what each command's `--help` says."""
    return {name: describe(*ask_for_help(words)) for name, words in COMMANDS.items()}


def ask_for_help(words: list[str]) -> tuple[argparse.ArgumentParser, str]:
    """Run `demucs-infer WORDS --help`; give the parser that answered, and its answer."""
    asked: list[argparse.ArgumentParser] = []
    answer = io.StringIO()
    usual = argparse.ArgumentParser.print_help

    def remember(self: argparse.ArgumentParser, file: Any = None) -> None:
        asked.append(self)
        usual(self, file)

    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", remember),
        mock.patch.dict(os.environ, {"COLUMNS": "100", "DEMUCS_INFER_CACHE": "CACHE"}),
        contextlib.redirect_stdout(answer),
        contextlib.suppress(SystemExit),
    ):
        main([*words, "--help"])
    (parser,) = asked
    return parser, answer.getvalue()


def describe(parser: argparse.ArgumentParser, answer: str) -> str:
    """Lay out what a parser was told; each flag of it must be in the answer that people see."""
    lines = [parser.prog, "", " ".join((parser.description or "").split()), ""]
    for group in parser._action_groups:
        # Where a later flag of the same name takes its place, the former has none left.
        actions = [one for one in group._group_actions if one in parser._actions]
        if actions:
            lines += [f"[{group.title}]"]
            lines += [line for action in actions for line in _action(parser, action)]
    for one in parser._mutually_exclusive_groups:
        names = [_name(action) for action in one._group_actions if action in parser._actions]
        lines += [f"at most one of: {', '.join(names)}"]
    for action in parser._actions:
        for flag in action.option_strings:
            assert flag in answer, f"{parser.prog} --help does not tell {flag}"
    lines += ["", *(line.rstrip() for line in (parser.epilog or "").splitlines())]
    return "\n".join(lines).strip() + "\n"


def _name(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def _action(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    if isinstance(action, argparse._SubParsersAction):
        for choice in action._choices_actions:
            yield f"{choice.dest}: {choice.help}"
        return
    yield ", ".join(action.option_strings) or f"({_name(action)})"
    if action.option_strings and action.nargs != 0:
        yield f"    value: {action.metavar or action.dest.upper()}"
    for name in ("nargs", "const"):
        value = getattr(action, name)
        if value is not None and value != 0:
            yield f"    {name}: {value!r}"
    if action.choices is not None:
        yield f"    choices: {', '.join(map(str, action.choices))}"
    if action.required and action.option_strings:
        yield "    required"
    default = action.default
    if default is not None and default != argparse.SUPPRESS:
        yield f"    default: {str(default) if isinstance(default, Path) else repr(default)}"
    if action.help:
        said = parser._get_formatter()._expand_help(action)
        yield f"    {' '.join(said.split())}"
