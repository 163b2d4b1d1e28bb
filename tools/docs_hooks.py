"""Add to the site what is made from the code, and the pages at the top of the repository."""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages at the top of the repository, and where they are on the site."""


def on_config(config: Any) -> Any:
    """Add pages of `docs/` that the menu in `mkdocs.yml` lacks to its section "Explanation"."""
    (section,) = [entry["Explanation"] for entry in config.nav if "Explanation" in entry]
    section += list_unlisted_pages()
    return config


def list_unlisted_pages() -> list[str]:
    """Return the pages of `docs/` that `mkdocs.yml` does not name."""
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    pages = (path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return sorted(set(pages) - menu)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files in `docs/`."""
    from mkdocs.structure.files import File

    pages = {place: (ROOT / name).read_text("utf-8") for name, place in OUTSIDE.items()}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to the top of the repository lead to pages of the site; add flags and routes."""
    if page.file.src_uri == "reference/commands.md":
        markdown = f"{markdown}\n{describe_commands()}"
    if page.file.src_uri == "reference/http.md":
        markdown = f"{markdown}\n{describe_http()}"
    prefix = "../" * page.file.src_uri.count("/")
    for name, place in OUTSIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{name}", f"]({prefix}{place}", markdown)
    return markdown.replace("](docs/", f"]({prefix}")


# ── commands ──


def describe_commands() -> str:
    """Return every flag of every command, from the parsers."""
    from demucs_infer.cli.parser import COMMANDS, make_parser

    parts = [_describe_parser("demucs-infer", make_parser())]
    modules = {"eval": "evaluate"}
    for name in COMMANDS:
        module_name = modules.get(name, name.replace("-", "_"))
        module = importlib.import_module(f"demucs_infer.cli.{module_name}")
        if hasattr(module, "make_parser"):
            parts.append(_describe_parser(f"demucs-infer {name}", module.make_parser()))
        else:
            parts.append(f"## demucs-infer {name}\n\n{COMMANDS[name].capitalize()}.\n")
    return "\n".join(parts)


def _describe_parser(title: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## {title}\n", f"{_clean(parser.description or '')}\n"]
    rows, actions = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [(f"{title} {name}", choice) for name, choice in action.choices.items()]
        elif action.help != argparse.SUPPRESS and action.dest != "help":
            rows.append(_describe_action(parser, action))
    if rows:
        lines += ["| flag | meaning |", "|---|---|", *rows, ""]
    lines += [_describe_parser(name, choice).replace("## ", "### ", 1) for name, choice in actions]
    return "\n".join(lines)


def _describe_action(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    names = ", ".join(f"`{flag}`" for flag in action.option_strings)
    if not names:
        names = f"`{action.metavar or action.dest}`"
    elif action.nargs != 0:
        values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
        names += f" `{values or action.metavar or action.dest.upper()}`".replace("|", "\\|")
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"| {names} | {_clean(text)} |"


def _clean(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


# ── HTTP ──


def describe_http() -> str:
    """Return every route of the server, from its OpenAPI description."""
    from demucs_infer.server import ServerSettings, create_app

    logging.getLogger("demucs_infer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        settings = ServerSettings(data_dir=Path(folder), models=("tiny",), devices=("cpu",))
        schema = create_app(settings).openapi()
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            parts.append(_describe_route(method, path, route))
    return "\n".join(parts)


def _describe_route(method: str, path: str, route: dict[str, Any]) -> str:
    lines = [f"## `{method.upper()} {path}`\n", f"{route.get('description', '')}\n"]
    parameters = route.get("parameters", ())
    if parameters:
        lines += ["| parameter | in | meaning |", "|---|---|---|"]
        lines += [
            f"| `{parameter['name']}` | {parameter['in']} | "
            f"{_clean(parameter.get('description', ''))} |"
            for parameter in parameters
        ]
        lines.append("")
    bodies = ", ".join(f"`{kind}`" for kind in route.get("requestBody", {}).get("content", ()))
    if bodies:
        lines.append(f"Body: {bodies}\n")
    lines += ["| status | meaning |", "|---|---|"]
    lines += [
        f"| {status} | {_clean(response.get('description', ''))} |"
        for status, response in route["responses"].items()
    ]
    return "\n".join([*lines, ""])
