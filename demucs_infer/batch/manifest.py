"""`stems.json`: what was made of which bytes, by which weights, with which settings.

It lies beside the stems and is written last, so stems without one are unfinished, and stems whose
manifest says what would be done now need not be done again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from demucs_infer.system.checksum import sha256_file

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of the stems; equal recipes give equal stems."""

    input_sha256: str
    model: str
    weights: tuple[str, ...]
    """The sha256 of every member's weights."""

    settings: Mapping[str, Any]
    """Each parameter by its name, as plain JSON values."""

    versions: Mapping[str, str]
    """Of this package and of torch."""

    @property
    def key(self) -> str:
        """A name for this recipe: the same anywhere, for the same content and settings."""
        text = json.dumps(_plain(asdict(self)), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stem:
    """A finished file."""

    file: str
    """Relative to the manifest."""

    bytes: int
    sha256: str
    gain: float = 1.0
    """What the stem was multiplied by so that it would not clip."""

    @classmethod
    def from_file(cls, path: Path, name: str, gain: float) -> "Stem":
        """Describe a finished file that is at `path` now, and will be called `name`."""
        size, digest = path.stat().st_size, sha256_file(path)
        return cls(file=name, bytes=size, sha256=digest, gain=gain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What stands in the file."""

    input: str
    recipe: Recipe
    stems: Mapping[str, Stem]
    sample_rate: int
    channels: int
    duration_seconds: float
    gain: float
    """The smallest of the stems'."""

    device: str = ""
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    """How long it took, without what an interrupted run had done before."""

    resumed_seconds: float = 0.0
    """How much of the track that was."""

    def to_json(self) -> str:
        """The text of the file."""
        fields = {"schema": SCHEMA, "key": self.recipe.key, **_plain(asdict(self))}
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Put the file at `path` in one step, complete or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            # A file's name need not be UTF-8: what is none is written as JSON's own escape.
            partial.write_text(self.to_json(), encoding="utf-8", errors="backslashreplace")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """The same value as `json` gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value, default=str))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What the manifest at `path` says; None where there is none that can be understood."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return parse_manifest(found)


def parse_manifest(found: Any) -> dict[str, Any] | None:
    """What was read as JSON, if it is a manifest."""
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return None
    return found if {one.name for one in fields(Manifest)} <= found.keys() else None


def find_match(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The manifest at `path` if it tells of this recipe, and its files lie there whole."""
    found = read_manifest(path)
    if found is None or found.get("key") != recipe.key:
        return None
    try:
        sizes = {path.parent / one["file"]: one["bytes"] for one in found["stems"].values()}
        is_whole = all(file.stat().st_size == size for file, size in sizes.items())
    except (OSError, KeyError, TypeError, AttributeError):
        return None
    return found if is_whole else None
