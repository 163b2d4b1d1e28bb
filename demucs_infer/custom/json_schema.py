"""Read dataclasses from JSON data, reporting all problems at once, and derive their JSON Schema.

A field's metadata may contain JSON Schema keywords (`minimum`, `uniqueItems`, ...), which are
validated here and written into the schema. One field of a class may be marked as `rest`: it
collects all keys that are not fields.

pydantic is not used, because the parameters of custom networks are plain, nested dataclasses. For
these, pydantic ignores unknown keys and accepts NaN unless each class is configured. It would also
be a compiled dependency of the core, and takes 0.3 s to import and make one schema. It would
replace about half of this module.
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
"""Stands for a value that could not be read."""

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "null",
}
_SEQUENCES = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)


_MAX_PROBLEMS = 100
_MAX_LENGTH = 1000


def config_error(source: str, problems: Sequence[str]) -> ConfigError:
    """Return one error that lists the `problems` of `source`, up to a limit."""
    listed = [_shorten(problem) for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) == 1:
        return ConfigError(f"{source}: {listed[0]}")
    omitted = ["..."] if len(problems) > _MAX_PROBLEMS else []
    lines = "\n  ".join([*listed, *omitted])
    return ConfigError(f"{source}: {len(problems)} problems\n  {lines}")


def _shorten(problem: str) -> str:
    return problem if len(problem) <= _MAX_LENGTH else f"{problem[:_MAX_LENGTH]}..."


class SchemaReader:
    """Convert JSON data to annotated types and collect the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """One line each: `a.b: what is wrong`."""

    def add_problem(self, path: str, text: str) -> object:
        """Record a problem and return `INVALID`."""
        self.problems.append(f"{path}: {text}" if path else text)
        return INVALID

    def read(self, hint: Any, value: object, path: str) -> object:
        """Return `value` as the type `hint`, or `INVALID`."""
        hint, origin = _strip_hint(hint), get_origin(_strip_hint(hint))
        if hint is Any or hint is object:
            return value
        if hint in _JSON_TYPES:
            return self._read_scalar(hint, value, path)
        if origin is Literal:
            return self._read_choice(get_args(hint), value, path)
        if origin in (Union, types.UnionType):
            return self._read_union(get_args(hint), value, path)
        if hint in _SEQUENCES or origin in _SEQUENCES:
            return self._read_sequence(hint, value, path)
        if hint in _MAPPINGS or origin in _MAPPINGS:
            return self._read_mapping(hint, value, path)
        if is_dataclass(hint):
            return self.read_dataclass(hint, value, path)
        if isinstance(hint, type) and issubclass(hint, Enum):
            choice = self._read_choice([member.value for member in hint], value, path)
            return choice if choice is INVALID else hint(choice)
        return self.add_problem(path, f"unsupported type: {_describe_type(hint)}")

    def read_dataclass(self, cls: Any, data: object, path: str) -> object:
        """Return an instance of the dataclass `cls`, or `INVALID`."""
        num_problems = len(self.problems)
        values = self.read_fields(cls, data, path)
        if len(self.problems) > num_problems:
            return INVALID
        try:
            return cls(**values)
        except (ValueError, TypeError, ConfigError) as error:
            return self.add_problem(path, str(error))

    def read_fields(self, cls: Any, data: object, path: str) -> dict[str, object]:
        """Return the values of the fields of `cls` that are valid, defaults included."""
        if not isinstance(data, Mapping):
            self.add_problem(
                path, f"expected an object ({cls.__name__}), got {describe_value(data)}"
            )
            return {}
        hints = get_type_hints(cls)
        all_fields = {field.name: field for field in fields(cls) if field.init}
        rest = next((name for name, f in all_fields.items() if f.metadata.get(REST)), None)
        named = {name: field for name, field in all_fields.items() if name != rest}
        unknown = [key for key in data if key not in named]
        values: dict[str, object] = {}
        if rest is not None:
            values[rest] = {key: data[key] for key in unknown}
        for key in unknown if rest is None else ():
            self.add_problem(_join_path(path, key), f"unknown key{suggest_name(key, named)}")
        for name, field in named.items():
            field_path = _join_path(path, name)
            if name in data:
                value = self.read(hints[name], data[name], field_path)
                if value is not INVALID and self._check_limits(field, value, field_path):
                    values[name] = value
            elif _is_required(field):
                self.add_problem(field_path, "required key is missing")
            elif field.default_factory is not MISSING:
                values[name] = field.default_factory()
            else:
                values[name] = field.default
        return values

    def _read_scalar(self, kind: Any, value: object, path: str) -> object:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is kind and not (kind is float and not isfinite(typing.cast(float, value))):
            return value
        return self.add_problem(path, f"expected {_TYPE_NAMES[kind]}, got {describe_value(value)}")

    def _read_choice(self, choices: Sequence[object], value: object, path: str) -> object:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        listing = ", ".join(map(describe_value, choices))
        close = suggest_name(value, [choice for choice in choices if isinstance(choice, str)])
        return self.add_problem(
            path, f"expected one of {listing}, got {describe_value(value)}{close}"
        )

    def _read_union(self, hints: Sequence[Any], value: object, path: str) -> object:
        readers = []
        for hint in hints:
            reader = SchemaReader()
            result = reader.read(hint, value, path)
            if not reader.problems:
                return result
            readers.append(reader)
        not_null = [reader for hint, reader in zip(hints, readers) if hint is not type(None)]
        if len(not_null) == 1:
            self.problems += not_null[0].problems
            return INVALID
        expected = " or ".join(map(_describe_type, hints))
        return self.add_problem(path, f"expected {expected}, got {describe_value(value)}")

    def _read_sequence(self, hint: Any, value: object, path: str) -> object:
        if not isinstance(value, list | tuple):
            return self.add_problem(path, f"expected a list, got {describe_value(value)}")
        kind = tuple if (get_origin(hint) or hint) is tuple else list
        arguments = get_args(hint) or (Any, ...)
        if kind is tuple and arguments[-1] is not ...:
            if len(arguments) != len(value):
                text = f"expected a list of {len(arguments)}, got {describe_value(value)}"
                return self.add_problem(path, text)
            hints: Iterable[Any] = arguments
        else:
            hints = [arguments[0]] * len(value)
        items = [self.read(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, value))]
        return INVALID if INVALID in items else kind(items)

    def _read_mapping(self, hint: Any, value: object, path: str) -> object:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return self.add_problem(path, f"expected an object, got {describe_value(value)}")
        item_hint = get_args(hint)[1] if get_args(hint) else Any
        items = {key: self.read(item_hint, v, _join_path(path, key)) for key, v in value.items()}
        return INVALID if INVALID in items.values() else items

    def _check_limits(self, field: Field[Any], value: object, path: str) -> bool:
        """Return whether `value` satisfies the JSON Schema keywords in the field's metadata."""
        num_problems = len(self.problems)
        if isinstance(value, int | float) and not isinstance(value, bool):
            for keyword, (words, is_satisfied) in _LIMITS.items():
                limit = field.metadata.get(keyword)
                if limit is not None and not is_satisfied(value, limit):
                    self.add_problem(path, f"must be {words} {limit}, got {value}")
        if isinstance(value, tuple):
            if len(value) < field.metadata.get("minItems", 0):
                self.add_problem(path, "must have at least one entry")
            if field.metadata.get("uniqueItems"):
                for item in dict.fromkeys(item for item in value if value.count(item) > 1):
                    self.add_problem(path, f"duplicate entry {item!r}")
        return len(self.problems) == num_problems


_LIMITS: dict[str, tuple[str, Any]] = {
    "minimum": ("at least", lambda value, limit: value >= limit),
    "exclusiveMinimum": ("above", lambda value, limit: value > limit),
    "exclusiveMaximum": ("below", lambda value, limit: value < limit),
}


def validate(value: object) -> None:
    """Raise `ConfigError` if a dataclass instance could not have been read from a file."""
    reader = SchemaReader()
    data = typing.cast("dict[str, object]", to_plain_data(value))
    reader.read_fields(type(value), data, "")
    if reader.problems:
        raise config_error(type(value).__name__, reader.problems)


def to_plain_data(value: object) -> object:
    """Return `value` as JSON data: dictionaries, lists and scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        data: dict[str, object] = {}
        for field in fields(value):
            if field.init:
                item = to_plain_data(getattr(value, field.name))
                if field.metadata.get(REST):
                    data |= typing.cast("dict[str, object]", item)
                else:
                    data[field.name] = item
        return data
    if isinstance(value, Mapping):
        return {key: to_plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_data(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def json_schema(hint: Any) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what `SchemaReader` accepts for `hint`."""
    hint, origin = _strip_hint(hint), get_origin(_strip_hint(hint))
    arguments = get_args(hint)
    if hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [json_schema(member) for member in arguments]}
    if hint in _SEQUENCES or origin in _SEQUENCES:
        return {"type": "array", "items": json_schema(arguments[0] if arguments else Any)}
    if hint in _MAPPINGS or origin in _MAPPINGS:
        items = json_schema(arguments[1] if arguments else Any)
        return {"type": "object", "additionalProperties": items}
    return _dataclass_schema(hint) if is_dataclass(hint) else {}


def _dataclass_schema(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    all_fields = [field for field in fields(cls) if field.init]
    properties = {}
    for field in all_fields:
        if not field.metadata.get(REST):
            properties[field.name] = json_schema(hints[field.name]) | dict(field.metadata)
            if field.default is not MISSING:
                properties[field.name]["default"] = to_plain_data(field.default)
    return {
        "type": "object",
        "properties": properties,
        "required": [field.name for field in all_fields if _is_required(field)],
        "additionalProperties": len(properties) < len(all_fields),
    }


def _is_required(field: Field[Any]) -> bool:
    has_default = field.default is not MISSING or field.default_factory is not MISSING
    return not has_default and not field.metadata.get(REST)


def _strip_hint(hint: Any) -> Any:
    """Return the type behind `NewType` and `Annotated`."""
    while True:
        if hasattr(hint, "__supertype__"):  # NewType
            hint = hint.__supertype__
        elif get_origin(hint) is typing.Annotated:
            hint = get_args(hint)[0]
        elif hint is None:
            return type(None)
        else:
            return hint


def _join_path(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def suggest_name(key: object, names: Iterable[str]) -> str:
    """Return `; did you mean 'NAME'?` for a similar name, or an empty string."""
    close = difflib.get_close_matches(str(key), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _describe_type(hint: Any) -> str:
    hint = _strip_hint(hint)
    if hint in _TYPE_NAMES:
        return _TYPE_NAMES[hint]
    if get_origin(hint) is Literal:
        return " or ".join(map(describe_value, get_args(hint)))
    return getattr(hint, "__name__", str(hint))


def describe_value(value: object) -> str:
    """Return `value` as JSON of at most 60 characters, for messages."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
