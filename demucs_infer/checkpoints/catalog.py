"""Look up checkpoints and bags of models by name: plain records, without files or network.

The data is in `catalog.toml` beside this module.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import inf, nan
from pathlib import Path
from typing import Any

from demucs_infer.errors import ConfigError, ModelLoadingError, ModelNotFound

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_MEMBERS = 16
"""Limit for the models of a bag on the spot."""

NOT_STATED = "not stated"
CATALOG_FILE = Path(__file__).with_name("catalog.toml")


def split_bag(name: str) -> list[tuple[str, float]]:
    """Return the models of a bag on the spot, such as `a+b@0.3`, and their weights.

    A weight is relative to the others, and 1 if omitted. A plain name, and the path of a file,
    is the only entry. Raises `ModelLoadingError` for an invalid weight.
    """
    if "+" not in name or Path(name).is_file():
        return [(name, 1.0)]
    entries = []
    for part in name.split("+"):
        model, at, text = part.rpartition("@")
        try:
            weight = float(text) if at else 1.0
        except ValueError:
            weight = nan
        model = model if at else text
        if not model or not 0 < weight < inf:
            raise ModelLoadingError(
                f"invalid bag {name!r}: {part!r} must be the name of a model, or NAME@WEIGHT with "
                "a weight above 0, such as mdx_extra@0.5"
            )
        entries.append((model, weight))
    if len(entries) > MAX_MEMBERS:
        raise ModelLoadingError(f"{len(entries)} models in one bag: the limit is {MAX_MEMBERS}")
    return entries


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One file of weights."""

    signature: str
    file: str
    """File name in the cache, the one that a local repository expects."""
    sha256: str
    urls: tuple[str, ...] = ()
    """Addresses of the same bytes, best first."""
    size: int | None = None
    license: str = NOT_STATED
    source: str | None = None
    """Where the license, or its absence, can be looked up."""
    stems: tuple[str, ...] | None = None
    """Names of the outputs in the file's order; they replace the names in the file."""
    sample_rate: int | None = None
    is_bundled: bool = False
    """Whether the file is part of the package: nothing to download."""
    klass: str | None = None
    kwargs: Mapping[str, Any] | None = None
    """Architecture of a bare state dict."""
    note: str | None = None

    @property
    def path(self) -> Path:
        """Path of a bundled file."""
        return CATALOG_FILE.parent.parent / self.file


@dataclass(frozen=True, slots=True)
class Bag:
    """Networks whose outputs are averaged."""

    name: str
    models: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    """One row for each network, one column for each stem."""
    segment: float | None = None
    """Segment in seconds; `None` keeps each network's own."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError(f"the bag {self.name!r} has no models")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ConfigError(
                f"the bag {self.name!r} has {len(self.models)} models and "
                f"{len(self.weights)} rows of weights"
            )
        if self.segment is not None and not 0 < self.segment <= 3600:
            raise ConfigError(
                f"the bag {self.name!r} has a segment of {self.segment} seconds: "
                "it must be above 0 and at most 3600"
            )


@dataclass(frozen=True, slots=True)
class Catalog:
    """Checkpoints by signature and bags by name."""

    checkpoints: Mapping[str, Checkpoint]
    bags: Mapping[str, Bag]

    def bag(self, name: str) -> Bag:
        """Return the bag called `name`; a signature gives a bag of that single network."""
        if name in self.bags:
            return self.bags[name]
        if name in self.checkpoints:
            return Bag(name, (name,))
        raise ModelNotFound(name, {*self.bags, *self.checkpoints})

    def files(self, name: str) -> list[Checkpoint]:
        """Return the checkpoints that `name` needs, each once, in the bag's order."""
        signatures = [
            signature for part, _ in split_bag(name) for signature in self.bag(part).models
        ]
        return [self.checkpoints[signature] for signature in dict.fromkeys(signatures)]

    def has(self, name: str) -> bool:
        """Return whether there is a bag or a checkpoint of this name."""
        return name in self.bags or name in self.checkpoints


@cache
def load_catalog() -> Catalog:
    """Load the catalog of this package."""
    return read_catalog(CATALOG_FILE)


def read_catalog(path: Path) -> Catalog:
    """Read a catalog; raise `ConfigError` unless names are unique and all members exist."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        origins = table.get("origin", {})
        checkpoints = [_parse_checkpoint(entry, origins) for entry in table.get("checkpoint", [])]
        bags = [parse_bag(entry.pop("name"), entry) for entry in table.get("bag", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the catalog {path}: {error}") from error
    catalog = Catalog(
        {checkpoint.signature: checkpoint for checkpoint in checkpoints},
        {bag.name: bag for bag in bags},
    )
    missing = {model for bag in bags for model in bag.models} - catalog.checkpoints.keys()
    if missing:
        raise ConfigError(f"the catalog {path} lacks members of its bags: {sorted(missing)}")
    if len(catalog.checkpoints) != len(checkpoints) or len(catalog.bags) != len(bags):
        raise ConfigError(f"the catalog {path} has duplicate names")
    return catalog


def _parse_checkpoint(entry: dict[str, Any], origins: dict[str, dict[str, Any]]) -> Checkpoint:
    """Create a checkpoint from its table; fields that it lacks come from its origin's."""
    entry = {**origins.get(entry.pop("origin", ""), {}), **entry}
    for key in ("urls", "stems"):
        if key in entry:
            entry[key] = tuple(entry[key])
    return Checkpoint(**entry)


def parse_bag(name: str, table: Mapping[str, Any]) -> Bag:
    """Create a bag from a table with `models`, `weights` and `segment` (catalog or YAML)."""
    models, weights, segment = (table.get(key) for key in ("models", "weights", "segment"))
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise ConfigError(f"the bag {name!r} needs `models`, a list of signatures")
    if segment is not None and (isinstance(segment, bool) or not isinstance(segment, int | float)):
        raise ConfigError(
            f"the bag {name!r} has the segment {reprlib.repr(segment)}: it must be a number"
        )
    return Bag(name, tuple(models), _parse_weights(name, weights), segment)


def _parse_weights(name: str, weights: object) -> tuple[tuple[float, ...], ...] | None:
    if weights is None:
        return None
    rows = []
    for row in weights if isinstance(weights, list) else [weights]:
        if not isinstance(row, list) or not all(isinstance(value, int | float) for value in row):
            raise ConfigError(f"the bag {name!r} has `weights` that are not rows of numbers")
        rows.append(tuple(float(value) for value in row))
    return tuple(rows)
