"""Every checkpoint and bag that is known by name: records, no files and no network.

The facts are in `catalog.toml` beside this module.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from demucs_infer.errors import ConfigError, ModelNotFound

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_STATED = "not stated"
CATALOG_FILE = Path(__file__).with_name("catalog.toml")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One file of weights."""

    signature: str
    file: str
    """Its name in the cache; the one that a local repository expects."""
    sha256: str
    urls: tuple[str, ...] = ()
    """Where the very same bytes are, best first."""
    size: int | None = None
    licence: str = NOT_STATED
    source: str | None = None
    """Where the licence, or the silence about it, can be read."""
    stems: tuple[str, ...] | None = None
    """What comes out, in the file's order; it replaces the names that the file itself uses."""
    sample_rate: int | None = None
    ships: bool = False
    """The file is inside the package: nothing to fetch."""
    klass: str | None = None
    kwargs: Mapping[str, Any] | None = None
    """The architecture of a bare state dict."""
    note: str | None = None

    @property
    def path(self) -> Path:
        """Where a shipped file is."""
        return CATALOG_FILE.parent.parent / self.file


@dataclass(frozen=True, slots=True)
class Bag:
    """Networks whose answers are averaged."""

    name: str
    models: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    """A row for each network, a column for each stem."""
    segment: float | None = None
    """Seconds; `None` leaves each network its own."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError(f"the bag {self.name!r} has no models")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ConfigError(
                f"the bag {self.name!r} has {len(self.models)} models and "
                f"{len(self.weights)} rows of weights"
            )
        if self.segment is not None and not 0 < self.segment <= 3600:
            raise ConfigError(f"the bag {self.name!r} has a segment of {self.segment} seconds")


@dataclass(frozen=True, slots=True)
class Catalog:
    """All that is known by name or by signature."""

    checkpoints: Mapping[str, Checkpoint]
    bags: Mapping[str, Bag]

    def bag(self, name: str) -> Bag:
        """What `name` stands for; a signature is a bag of itself alone."""
        if name in self.bags:
            return self.bags[name]
        if name in self.checkpoints:
            return Bag(name, (name,))
        is_signature = re.fullmatch("[0-9a-f]{7,9}", name)
        raise ModelNotFound(name, self.checkpoints if is_signature else self.bags)

    def files(self, name: str) -> list[Checkpoint]:
        """The files that `name` needs, each once, in the bag's order."""
        return [self.checkpoints[signature] for signature in dict.fromkeys(self.bag(name).models)]


@cache
def load_catalog() -> Catalog:
    """The catalogue of this package."""
    return read_catalog(CATALOG_FILE)


def read_catalog(path: Path) -> Catalog:
    """A catalogue from its file, checked: every bag's networks are there."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        origins = table.get("origin", {})
        checkpoints = [_checkpoint(entry, origins) for entry in table.get("checkpoint", [])]
        bags = [bag_of(entry.pop("name"), entry) for entry in table.get("bag", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the catalogue {path} cannot be used: {error}") from error
    found = Catalog({one.signature: one for one in checkpoints}, {one.name: one for one in bags})
    lost = {one for bag in bags for one in bag.models} - found.checkpoints.keys()
    if lost or len(found.checkpoints) != len(checkpoints) or len(found.bags) != len(bags):
        raise ConfigError(f"the catalogue {path} has names twice, or networks missing: {lost}")
    return found


def _checkpoint(entry: dict[str, Any], origins: dict[str, dict[str, Any]]) -> Checkpoint:
    """One entry, with what it shares with all of its origin."""
    entry = {**origins.get(entry.pop("origin", ""), {}), **entry}
    for key in ("urls", "stems"):
        if key in entry:
            entry[key] = tuple(entry[key])
    return Checkpoint(**entry)


def bag_of(name: str, table: Mapping[str, Any]) -> Bag:
    """A bag from its table (`models`, `weights`, `segment`), as catalogue and YAML have it."""
    models, weights, segment = (table.get(key) for key in ("models", "weights", "segment"))
    if not isinstance(models, list) or not all(isinstance(one, str) for one in models):
        raise ConfigError(f"the bag {name!r} does not list its models")
    if segment is not None and (isinstance(segment, bool) or not isinstance(segment, int | float)):
        raise ConfigError(f"the bag {name!r} has {segment!r} as its segment")
    return Bag(name, tuple(models), _rows(name, weights), segment)


def _rows(name: str, weights: object) -> tuple[tuple[float, ...], ...] | None:
    if weights is None:
        return None
    rows = weights if isinstance(weights, list) else [weights]
    found = []
    for row in rows:
        if not isinstance(row, list) or not all(isinstance(one, int | float) for one in row):
            raise ConfigError(f"the bag {name!r} has weights that are not rows of numbers")
        found.append(tuple(float(one) for one in row))
    return tuple(found)
