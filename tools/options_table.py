"""Write docs/options.md from the declarations in `options.py`: `python -m tools.options_table`."""

from collections.abc import Iterator
from pathlib import Path

from demucs_infer.options import PARTS, Option, Request, list_options

PAGE = Path(__file__).parents[1] / "docs/options.md"
FRONT_ENDS = {
    "python": "in Python",
    "cli": "on the command line",
    "http": "over HTTP",
    "config": "in a configuration",
}
KEYWORDS = {
    "separation": "Separator(...)",
    "stems": "Separator(...)",
    "input": "Separator.open_audio(...)",
    "output": "Separator.separate_to(...)",
}
HEAD = """\
# Settings

This page is generated from `demucs_infer/options.py`; `python -m tools.options_table` rewrites it.

Every setting has one name. It is a keyword in Python, a flag of the command, a parameter of HTTP
requests (in the query, a form or JSON), and a key in the section `options` of a network's
configuration. Where a setting is missing on purpose, the table of its section is followed by the
reason. "Key" tells whether the setting is part of the key in `stems.json`: a track is separated
again when such a setting changes.
"""


def options_table() -> str:
    """Return the page as Markdown."""
    lines = "\n".join(line for part in PARTS for line in _section(part))
    return f"{HEAD}\n{lines}".rstrip() + "\n"


def _section(part: str) -> Iterator[str]:
    options, defaults = list_options(PARTS[part]), getattr(Request(), part)
    yield f"## {part.capitalize()}\n"
    yield f"Keywords of `{KEYWORDS[part]}`; fields of `{PARTS[part].__name__}`.\n"
    yield "| setting | flags | default | values | what it does | key |"
    yield "|---|---|---|---|---|---|"
    for option in options:
        yield _row(option, getattr(defaults, option.name))
    yield ""
    missing: dict[tuple[str, str], list[str]] = {}
    for option in options:
        for entry in option.setting.not_in.items():
            missing.setdefault(entry, []).append(f"`{option.name}`")
    for (front_end, reason), names in missing.items():
        yield f"- Not {FRONT_ENDS[front_end]}: {', '.join(names)}; {reason}."
    yield ""


def _row(option: Option, default: object) -> str:
    setting = option.setting
    flags = [*option.flags, *setting.shortcuts] if option.is_in("cli") else []
    values = option.expectation + ("; or None" if option.is_optional else "")
    for front_end, limits in setting.limits.items():
        words = [_limit(name, limit) for name, limit in limits.items()]
        values += f"; {FRONT_ENDS[front_end]}: {' and '.join(words)}"
    for front_end, choices in setting.excluded.items():
        values += f"; {FRONT_ENDS[front_end]}: not {', '.join(choices)}"
    key = "yes" if setting.changes_stems else "no"
    cells = [f"`{option.name}`", ", ".join(f"`{flag}`" for flag in flags) or "none"]
    python = f" (Python: `{option.default!r}`)" if option.default != default else ""
    cells += [f"`{default!r}`{python}", values, setting.help, key]
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(cell: str) -> str:
    return cell.replace("|", r"\|")


def _limit(name: str, limit: float) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    if name == "max_length":
        return f"at most {limit} entries"
    return f"{signs[name]} {int(limit) if limit == int(limit) else limit}"


if __name__ == "__main__":
    PAGE.write_text(options_table(), "utf-8")
