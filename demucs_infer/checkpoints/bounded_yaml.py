"""Read YAML from files that cannot be trusted: in bounded time and memory, plain values only."""

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
    """What a file may have at most."""

    num_bytes: int
    num_events: int
    """Values and brackets."""
    depth: int
    """Levels of lists and tables."""


def load_yaml(data: bytes, limits: YamlLimits, *, tuples: bool = False) -> Any:
    """Return the content of a file; `tuples` reads `!!python/tuple` as a tuple.

    Raises `ConfigError` for files beyond `limits`, for aliases, for every other tag that names a
    type of a language, and for text that is not YAML.
    """
    import yaml

    if len(data) > limits.num_bytes:
        raise ConfigError(f"too large: the limit is {limits.num_bytes} bytes")
    try:
        text = data.decode("utf-8")
        _check_events(text, limits, _TAGS | {_TUPLE} if tuples else _TAGS)
        return yaml.load(text, _make_loader())
    except (ValueError, OverflowError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"it is not valid YAML: {error}") from error


def _check_events(text: str, limits: YamlLimits, tags: set[str]) -> None:
    """Raise `ConfigError` for YAML that takes long, or much memory, to load.

    Events are parsed one by one and nothing is built from them, so that this ends early. Aliases
    are refused: a few nested ones stand for billions of values.
    """
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader), start=1):
        if count > limits.num_events:
            raise ConfigError(f"too many values: the limit is {limits.num_events}")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError("unsupported alias: write its value instead")
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
    """Return the class that builds plain values, tuples, and floats such as 1e-4."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 with the floats of YAML 1.2."""

    def read_tuple(loader: Loader, node: yaml.Node) -> tuple[Any, ...]:
        return tuple(loader.construct_sequence(cast(yaml.SequenceNode, node), deep=True))

    Loader.add_constructor(_TUPLE, read_tuple)
    Loader.add_implicit_resolver(f"{_CORE}float", _EXPONENT, list("-+0123456789"))
    return Loader
