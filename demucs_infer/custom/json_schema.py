"""Strict values out of plain data: dataclasses from JSON, every problem at once, and its schema.

A field may carry keywords of JSON Schema in its metadata (`minimum`, `uniqueItems`, ...): they are
checked here and written into the schema. One field of a class may be the `rest`: it keeps what no
other field is called.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from math import isfinite
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from demucs_infer.errors import ConfigError

REST = "rest"
INVALID = object()
"""What is read where there is a problem."""

_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "null",
}
_MANY = (list, tuple, Sequence)
_TABLES = (dict, Mapping)


def refusal(what: str, problems: Sequence[str]) -> ConfigError:
    """One error that lists all problems."""
    if len(problems) == 1:
        return ConfigError(f"{what}: {problems[0]}")
    return ConfigError(f"{what}: {len(problems)} problems\n  " + "\n  ".join(problems))


class SchemaReader:
    """Reads plain data as what an annotation says, and collects what is wrong with it."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """`a.b: what was given and what was expected`."""

    def complain(self, path: str, text: str) -> object:
        """Note a problem."""
        self.problems.append(f"{path}: {text}" if path else text)
        return INVALID

    def value(self, hint: Any, value: object, path: str) -> object:
        """`value` as `hint`, or `INVALID`."""
        hint, origin = _bare(hint), get_origin(_bare(hint))
        if hint is Any or hint is object:
            return value
        if hint in _SCALARS:
            return self._scalar(hint, value, path)
        if origin is Literal:
            return self._one_of(get_args(hint), value, path)
        if origin in (Union, types.UnionType):
            return self._union(get_args(hint), value, path)
        if hint in _MANY or origin in _MANY:
            return self._many(hint, value, path)
        if hint in _TABLES or origin in _TABLES:
            return self._table(hint, value, path)
        if is_dataclass(hint):
            return self.record(hint, value, path)
        if isinstance(hint, type) and issubclass(hint, Enum):
            found = self._one_of([each.value for each in hint], value, path)
            return found if found is INVALID else hint(found)
        return self.complain(path, f"{_name(hint)} is nothing that JSON can say")

    def record(self, cls: Any, data: object, path: str) -> object:
        """An object of the dataclass `cls`, or `INVALID`."""
        before = len(self.problems)
        parts = self.fields(cls, data, path)
        if len(self.problems) > before:
            return INVALID
        try:
            return cls(**parts)
        except (ValueError, TypeError, ConfigError) as error:
            return self.complain(path, str(error))

    def fields(self, cls: Any, data: object, path: str) -> dict[str, object]:
        """The fields of `cls` that could be read, those left out with their defaults."""
        if not isinstance(data, Mapping):
            self.complain(path, f"{_short(data)} is not a table of {cls.__name__}")
            return {}
        hints = get_type_hints(cls)
        known = {each.name: each for each in fields(cls) if each.init}
        rest = next((name for name, each in known.items() if each.metadata.get(REST)), None)
        named = {name: each for name, each in known.items() if name != rest}
        unknown = [key for key in data if key not in named]
        parts: dict[str, object] = {}
        if rest is not None:
            parts[rest] = {key: data[key] for key in unknown}
        for key in unknown if rest is None else ():
            self.complain(_join(path, key), f"there is no such key{_hint(key, named)}")
        for name, each in named.items():
            where = _join(path, name)
            if name in data:
                found = self.value(hints[name], data[name], where)
                if found is not INVALID and self._keeps(each, found, where):
                    parts[name] = found
            elif _is_required(each):
                self.complain(where, "is missing")
            elif each.default_factory is not MISSING:
                parts[name] = each.default_factory()
            else:
                parts[name] = each.default
        return parts

    def _scalar(self, kind: Any, value: object, path: str) -> object:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is kind and not (kind is float and not isfinite(typing.cast(float, value))):
            return value
        return self.complain(path, f"{_short(value)} is not {_WORDS[kind]}")

    def _one_of(self, choices: Sequence[object], value: object, path: str) -> object:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        words = ", ".join(map(_short, choices))
        close = _hint(value, [each for each in choices if isinstance(each, str)])
        return self.complain(path, f"{_short(value)} is not one of {words}{close}")

    def _union(self, hints: Sequence[Any], value: object, path: str) -> object:
        readers = []
        for hint in hints:
            reader = SchemaReader()
            found = reader.value(hint, value, path)
            if not reader.problems:
                return found
            readers.append(reader)
        alone = [reader for hint, reader in zip(hints, readers) if hint is not type(None)]
        if len(alone) == 1:
            self.problems += alone[0].problems
            return INVALID
        return self.complain(path, f"{_short(value)} is not {' or '.join(map(_name, hints))}")

    def _many(self, hint: Any, value: object, path: str) -> object:
        if not isinstance(value, list | tuple):
            return self.complain(path, f"{_short(value)} is not a list")
        kind = tuple if (get_origin(hint) or hint) is tuple else list
        inside = get_args(hint) or (Any, ...)
        if kind is tuple and inside[-1] is not ...:
            if len(inside) != len(value):
                return self.complain(path, f"{_short(value)} is not a list of {len(inside)}")
            hints: Iterable[Any] = inside
        else:
            hints = [inside[0]] * len(value)
        found = [self.value(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, value))]
        return INVALID if INVALID in found else kind(found)

    def _table(self, hint: Any, value: object, path: str) -> object:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return self.complain(path, f"{_short(value)} is not a table")
        inside = get_args(hint)[1] if get_args(hint) else Any
        found = {key: self.value(inside, one, _join(path, key)) for key, one in value.items()}
        return INVALID if INVALID in found.values() else found

    def _keeps(self, each: Field[Any], value: object, path: str) -> bool:
        """Whether `value` is within what the field's metadata allows."""
        before = len(self.problems)
        if isinstance(value, int | float) and not isinstance(value, bool):
            for keyword, (words, is_kept) in _LIMITS.items():
                limit = each.metadata.get(keyword)
                if limit is not None and not is_kept(value, limit):
                    self.complain(path, f"{value} must be {words} {limit}")
        if isinstance(value, tuple):
            if len(value) < each.metadata.get("minItems", 0):
                self.complain(path, "is empty: name at least one")
            if each.metadata.get("uniqueItems"):
                for one in dict.fromkeys(each for each in value if value.count(each) > 1):
                    self.complain(path, f"{one!r} is named more than once")
        return len(self.problems) == before


_LIMITS: dict[str, tuple[str, Any]] = {
    "minimum": ("at least", lambda value, limit: value >= limit),
    "exclusiveMinimum": ("above", lambda value, limit: value > limit),
    "exclusiveMaximum": ("below", lambda value, limit: value < limit),
}


def check(value: object) -> None:
    """Refuse an object of a dataclass that could not have been read from a file."""
    reader = SchemaReader()
    parts = typing.cast("dict[str, object]", plain(value))
    reader.fields(type(value), parts, "")
    if reader.problems:
        raise refusal(type(value).__name__, reader.problems)


def plain(value: object) -> object:
    """`value` as JSON has it: tables, lists, and what is in them."""
    if is_dataclass(value) and not isinstance(value, type):
        found: dict[str, object] = {}
        for each in fields(value):
            if each.init:
                one = plain(getattr(value, each.name))
                found |= (
                    typing.cast("dict[str, object]", one)
                    if each.metadata.get(REST)
                    else {each.name: one}
                )
        return found
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.value if isinstance(value, Enum) else value


def schema(hint: Any) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what `SchemaReader` takes for `hint`."""
    hint, origin = _bare(hint), get_origin(_bare(hint))
    inside = get_args(hint)
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin is Literal:
        return {"enum": list(inside)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema(each) for each in inside]}
    if hint in _MANY or origin in _MANY:
        return {"type": "array", "items": schema(inside[0] if inside else Any)}
    if hint in _TABLES or origin in _TABLES:
        return {"type": "object", "additionalProperties": schema(inside[1] if inside else Any)}
    return _record_schema(hint) if is_dataclass(hint) else {}


def _record_schema(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    known = [each for each in fields(cls) if each.init]
    properties = {}
    for each in known:
        if not each.metadata.get(REST):
            properties[each.name] = schema(hints[each.name]) | dict(each.metadata)
            if each.default is not MISSING:
                properties[each.name]["default"] = plain(each.default)
    return {
        "type": "object",
        "properties": properties,
        "required": [each.name for each in known if _is_required(each)],
        "additionalProperties": len(properties) < len(known),
    }


def _is_required(each: Field[Any]) -> bool:
    has_none = each.default is MISSING and each.default_factory is MISSING
    return has_none and not each.metadata.get(REST)


def _bare(hint: Any) -> Any:
    """An annotation without the names and notes around it."""
    while True:
        if hasattr(hint, "__supertype__"):  # NewType
            hint = hint.__supertype__
        elif get_origin(hint) is typing.Annotated:
            hint = get_args(hint)[0]
        elif hint is None:
            return type(None)
        else:
            return hint


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _hint(key: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _name(hint: Any) -> str:
    hint = _bare(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if get_origin(hint) is Literal:
        return " or ".join(map(_short, get_args(hint)))
    return getattr(hint, "__name__", str(hint))


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
