"""Look up checkpoints and bags of models by name, without downloading or opening them.

The records are in `catalog.toml` beside this module.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
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
"""Limit for the number of models in a name such as `a+b@0.3`."""

NOT_STATED = "not stated"
CATALOG_FILE = Path(__file__).with_name("catalog.toml")


def split_bag(name: str) -> list[tuple[str, float]]:
    """Split a name that combines models, such as `a+b@0.3`, into models and their weights.

    A weight is relative to the others, and 1 if omitted. Any other name, or the path of a file,
    is returned as the only model. Raises `ModelLoadingError` for an invalid weight or an empty
    name.
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
    """File name, in the cache and in a local repository."""
    sha256: str
    """Empty if none is published; then that of the first download is recorded and required."""
    urls: tuple[str, ...] = ()
    """Addresses of the same file, in the order in which they are tried."""
    size: int | None = None
    license: str = NOT_STATED
    source: str | None = None
    """Address of a page that states the license, or lacks one."""
    stems: tuple[str, ...] | None = None
    """Names of the stems, which replace the names in the file, in the same order."""
    sample_rate: int | None = None
    is_bundled: bool = False
    """Whether the file is part of this package and need not be downloaded."""
    klass: str | None = None
    kwargs: Mapping[str, Any] | None = None
    """Class (`klass`) and arguments of the network, for a file that contains only weights."""
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
    """Weights of the average: one row for each network, one column for each stem."""
    segment: float | None = None
    """Segment in seconds; with `None`, each network uses its own."""
    stems: tuple[str, ...] | None = None
    """Stems of the bag, if its networks have different stems; `None` if all have the same."""
    combine: str = "mean"
    """How the outputs of the networks are combined: mean, median, min or max."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedNetwork:
    """A network of the community, published as a configuration and a checkpoint."""

    name: str
    architecture: str
    """Its type, as in `custom.community`."""
    author: str
    config: str
    """Address of the configuration."""
    checkpoint: str
    """Address of the weights."""
    stems: tuple[str, ...]
    source: str
    """Where the author, the files and the license can be looked up."""
    as_of: str
    """Date on which the license was looked up."""
    license: str = NOT_STATED
    score: str | None = None
    """What `score_source` measured."""
    score_source: str | None = None
    sha256: str = ""
    """Of the weights; empty if none is published."""
    size: int | None = None
    """Bytes of the weights."""

    @property
    def files(self) -> tuple[Checkpoint, Checkpoint]:
        """The configuration and the weights."""
        details: dict[str, Any] = {"license": self.license, "source": self.source}
        config = Checkpoint(
            self.name, f"{self.name}.yaml", "", (self.config,), size=2**18, **details
        )
        weights = Checkpoint(
            self.name,
            f"{self.name}.ckpt",
            self.sha256,
            (self.checkpoint,),
            size=self.size,
            stems=self.stems,
            **details,
        )
        return config, weights


@dataclass(frozen=True, slots=True)
class Catalog:
    """Checkpoints by signature, bags by name and networks of the community by name."""

    checkpoints: Mapping[str, Checkpoint]
    bags: Mapping[str, Bag]
    networks: Mapping[str, PublishedNetwork] = field(default_factory=dict)

    def bag(self, name: str) -> Bag:
        """Return the bag called `name`; a signature gives a bag of that single network."""
        if name in self.bags:
            return self.bags[name]
        if name in self.checkpoints:
            return Bag(name, (name,))
        raise ModelNotFound(name, {*self.bags, *self.checkpoints, *self.networks})

    def files(self, name: str) -> list[Checkpoint]:
        """Return the checkpoints that `name` needs, each once, in the bag's order.

        For a network of the community, these are its configuration and its weights.
        """
        if name in self.networks:
            return list(self.networks[name].files)
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
    """Read a catalog file.

    Raises `ConfigError` if it is invalid, if two records have the same name, or if a bag refers to
    a missing checkpoint.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        origins = table.get("origin", {})
        checkpoints = [_parse_checkpoint(entry, origins) for entry in table.get("checkpoint", [])]
        networks = [
            PublishedNetwork(**{**entry, "stems": tuple(entry["stems"])})
            for entry in table.get("network", [])
        ]
        bags = [parse_bag(entry.pop("name"), entry) for entry in table.get("bag", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the catalog {path}: {error}") from error
    catalog = Catalog(
        {checkpoint.signature: checkpoint for checkpoint in checkpoints},
        {bag.name: bag for bag in bags},
        {network.name: network for network in networks},
    )
    missing = {model for bag in bags for model in bag.models} - catalog.checkpoints.keys()
    if missing:
        raise ConfigError(
            f"bags in the catalog {path} refer to missing checkpoints: {sorted(missing)}"
        )
    names = [*catalog.checkpoints, *catalog.bags, *catalog.networks]
    if len(names) != len(checkpoints) + len(bags) + len(networks):
        raise ConfigError(f"the catalog {path} has duplicate names")
    return catalog


def _parse_checkpoint(entry: dict[str, Any], origins: dict[str, dict[str, Any]]) -> Checkpoint:
    """Create a checkpoint from its table, with missing fields from the table of its `origin`."""
    entry = {**origins.get(entry.pop("origin", ""), {}), **entry}
    for key in ("urls", "stems"):
        if key in entry:
            entry[key] = tuple(entry[key])
    return Checkpoint(**entry)


def parse_bag(name: str, table: Mapping[str, Any]) -> Bag:
    """Create a bag from a table with `models`, `weights` and `segment` (catalog or YAML).

    `stems` lists the stems of networks with different ones; `combine` is mean by default.
    """
    models, weights, segment = (table.get(key) for key in ("models", "weights", "segment"))
    stems, combine = table.get("stems"), table.get("combine", "mean")
    if stems is not None and (
        not isinstance(stems, list)
        or not all(isinstance(stem, str) and stem for stem in stems)
        or len(set(stems)) != len(stems)
    ):
        raise ConfigError(f"the bag {name!r} has `stems` that are not a list of different names")
    if combine not in ("mean", "median", "min", "max"):
        raise ConfigError(
            f"the bag {name!r} has combine = {reprlib.repr(combine)}: it must be mean, median, "
            "min or max"
        )
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise ConfigError(f"the bag {name!r} needs `models`, a list of signatures")
    if segment is not None and (isinstance(segment, bool) or not isinstance(segment, int | float)):
        raise ConfigError(
            f"the bag {name!r} has the segment {reprlib.repr(segment)}: it must be a number"
        )
    return Bag(
        name,
        tuple(models),
        _parse_weights(name, weights),
        segment,
        stems=None if stems is None else tuple(stems),
        combine=combine,
    )


def _parse_weights(name: str, weights: object) -> tuple[tuple[float, ...], ...] | None:
    if weights is None:
        return None
    rows = []
    for row in weights if isinstance(weights, list) else [weights]:
        if not isinstance(row, list) or not all(isinstance(value, int | float) for value in row):
            raise ConfigError(f"the `weights` of the bag {name!r} must be lists of numbers")
        rows.append(tuple(float(value) for value in row))
    return tuple(rows)
