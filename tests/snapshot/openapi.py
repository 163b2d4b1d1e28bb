"""The addresses of the server and the shapes of what goes in and out.

FastAPI and pydantic add titles, and words of their own, that change with their versions; what is
kept are paths, methods, parameters, status codes, kinds of content, and of every shape the names,
types, defaults and limits.
"""

from pathlib import Path
from typing import Any

from demucs_infer.server import ServerSettings, create_app

_LIMITS = (
    "type", "format", "enum", "const", "default", "required", "$ref", "additionalProperties",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength",
    "pattern", "minItems", "maxItems", "uniqueItems",
)  # fmt: skip
_THEIRS = ("HTTPValidationError", "ValidationError")
"""What FastAPI declares of its own accord."""


def collect_openapi(folder: Path) -> dict[str, Any]:
    """Describe what a server with the settings it has by default offers."""
    settings = ServerSettings(data_dir=folder / "server", models=("tiny",), devices=("cpu",))
    found = create_app(settings).openapi()
    shapes = found["components"]["schemas"]
    return {
        "paths": {
            path: {method: _operation(one) for method, one in sorted(methods.items())}
            for path, methods in sorted(found["paths"].items())
        },
        "shapes": {name: _shape(shapes[name]) for name in sorted(shapes) if name not in _THEIRS},
    }


def _operation(found: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if parameters := found.get("parameters"):
        told["parameters"] = {
            f"{one['in']} {one['name']}": {"required": one.get("required", False)}
            | _shape(one.get("schema", {}))
            for one in sorted(parameters, key=lambda one: (one["in"], one["name"]))
        }
    if body := found.get("requestBody"):
        told["body"] = {"required": body.get("required", False), **_contents(body)}
    told["answers"] = {code: _contents(one) for code, one in sorted(found["responses"].items())}
    return told


def _contents(found: dict[str, Any]) -> dict[str, Any]:
    contents = found.get("content", {})
    return {kind: _shape(contents[kind].get("schema", {})) for kind in sorted(contents)}


def _shape(found: Any) -> Any:
    """Keep what a client has to know of a schema, at every depth."""
    if not isinstance(found, dict):
        return found
    told: dict[str, Any] = {}
    for name in sorted(found):
        value = found[name]
        if name in _LIMITS:
            told[name] = _shape(value) if name == "additionalProperties" else value
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            told[name] = [_shape(one) for one in value]
        elif name == "items":
            told[name] = _shape(value)
        elif name == "properties":
            told[name] = {one: _shape(value[one]) for one in sorted(value)}
    return told
