"""Read YAML from untrusted files: only plain values, with limits on time and memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from demucs_infer.errors import ConfigError

_CORE = "tag:yaml.org,2002:"
_TUPLE = f"{_CORE}python/tuple"
_TAGS = {f"{_CORE}{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


@dataclass(frozen=True, slots=True)
class YamlLimits:
    """The largest YAML file that is read."""

    num_bytes: int
    num_events: int
    """Number of values, and of starts and ends of lists and tables."""
    depth: int
    """Levels of nested lists and tables."""


def load_yaml(data: bytes, limits: YamlLimits, *, tuples: bool = False) -> Any:
    """Return the content of a YAML file; with `tuples`, `!!python/tuple` is read as a tuple.

    Raises `ConfigError` if the file exceeds `limits`, contains an alias or any other tag of a
    type (such as `!!python/object`), or is not valid YAML.
    """
    import yaml

    if len(data) > limits.num_bytes:
        raise ConfigError(f"too large: the limit is {limits.num_bytes} bytes")
    try:
        text = data.decode("utf-8")
        _check_events(text, limits, _TAGS | {_TUPLE} if tuples else _TAGS)
        return yaml.load(text, _make_loader())
    except (ValueError, OverflowError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {_summarize(error)}") from error


def _summarize(error: Exception) -> str:
    """Return the problem and its place on one line; PyYAML quotes the text on eight."""
    import yaml

    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def _check_events(text: str, limits: YamlLimits, tags: set[str]) -> None:
    """Raise `ConfigError` for YAML that would take too much time or memory to load.

    The parser's events are counted one by one, and no values are built from them, so a file that
    is too large is rejected early. Aliases are rejected because a few nested ones can expand to
    billions of values.
    """
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader), start=1):
        if count > limits.num_events:
            raise ConfigError(f"too many values: the limit is {limits.num_events}")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                "YAML aliases (`*name`) are not supported: write the value out in full"
            )
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in tags:
            name = tag.replace(_CORE, "!!", 1)
            line = event.start_mark.line + 1 if event.start_mark else 0
            supported = "!!python/tuple" if _TUPLE in tags else "plain values"
            raise ConfigError(f"line {line}: unsupported tag {name[:80]!r}: use {supported} only")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > limits.depth:
            raise ConfigError(f"nested too deeply: the limit is {limits.depth} levels")


def _make_loader() -> Any:
    """Return a YAML loader class for plain values and tuples that reads 1e-4 as a float."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 with the floats of YAML 1.2."""

    def read_tuple(loader: Loader, node: yaml.Node) -> tuple[Any, ...]:
        return tuple(loader.construct_sequence(cast(yaml.SequenceNode, node), deep=True))

    Loader.add_constructor(_TUPLE, read_tuple)
    Loader.add_implicit_resolver(f"{_CORE}float", _EXPONENT, list("-+0123456789"))
    return Loader
