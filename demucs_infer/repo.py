"""Where models come from: a folder of one's own, the catalogue, or the Hugging Face hub.

Each kind answers the same three questions: `has_model`, `get_model`, `list_model`. Nothing here
imports torch before a network is really built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import Bag, Catalog, Checkpoint, bag_of, load_catalog
from demucs_infer.checkpoints.download import sha256_of
from demucs_infer.errors import (
    CheckpointError,
    ConfigError,
    ModelLoadingError,
    ModelNotFound,
)

if TYPE_CHECKING:
    from torch import nn

    from demucs_infer.apply import BagOfModels

__all__ = [
    "AnyModelRepo",
    "BagOnlyRepo",
    "HubRepo",
    "LocalRepo",
    "ModelLoadingError",
    "ModelRepo",
    "RemoteRepo",
]

Places = Mapping[str, "str | Path"]
MAX_YAML_BYTES = 2**20
DEFAULT_NAMESPACE = "adefossez"
_PLAIN_NAME = re.compile(r"[\w][\w.-]{0,99}", re.ASCII)


class ModelRepo(Protocol):
    """Single networks by signature."""

    def has_model(self, sig: str) -> bool: ...
    def get_model(self, sig: str) -> nn.Module: ...
    def list_model(self) -> Places: ...


class RemoteRepo:
    """The checkpoints of the catalogue, downloaded when they are asked for."""

    def __init__(
        self,
        store: CheckpointStore | None = None,
        catalog: Catalog | None = None,
        *,
        trust: bool = False,
    ) -> None:
        self._store = store or CheckpointStore.of()
        self._catalog = catalog or load_catalog()
        self._trust = trust

    def has_model(self, sig: str) -> bool:
        return sig in self._catalog.checkpoints

    def get_model(self, sig: str) -> nn.Module:
        if sig not in self._catalog.checkpoints:
            raise ModelNotFound(sig, self._catalog.checkpoints)
        checkpoint = self._catalog.checkpoints[sig]
        return _build(self._store.obtain(checkpoint), checkpoint, trust=self._trust)

    def list_model(self) -> Places:
        return {
            signature: checkpoint.path if checkpoint.ships else checkpoint.urls[0]
            for signature, checkpoint in self._catalog.checkpoints.items()
        }


class LocalRepo:
    """A folder of `SIGNATURE.th`, `SIGNATURE-CHECKSUM.th` or `SIGNATURE.safetensors` files."""

    def __init__(self, root: str | os.PathLike[str], *, trust: bool = False) -> None:
        self.root = Path(root)
        self._trust = trust
        self._models: dict[str, Path] = {}
        self._checksums: dict[str, str] = {}
        self.scan()

    def scan(self) -> None:
        """Look at the folder again."""
        self._models.clear()
        self._checksums.clear()
        for file in _files(self.root, ".th", ".safetensors"):
            signature, dash, checksum = file.stem.rpartition("-")
            if not dash:
                signature = file.stem
            if signature in self._models:
                raise ModelLoadingError(
                    f"{self.root} has two files for {signature!r}: {self._models[signature].name} "
                    f"and {file.name}; remove one"
                )
            self._models[signature] = file
            if dash:
                self._checksums[signature] = checksum

    def has_model(self, sig: str) -> bool:
        return sig in self._models

    def get_model(self, sig: str) -> nn.Module:
        if sig not in self._models:
            raise ModelNotFound(sig, self._models)
        file, checksum = self._models[sig], self._checksums.get(sig)
        if checksum is not None:
            digest = sha256_of(file)
            if not checksum or not digest.startswith(checksum.lower()):
                raise CheckpointError(
                    f"{file} is damaged: its name says {checksum} and its sha256 is {digest}"
                )
        return _build(file, trust=self._trust)

    def list_model(self) -> Places:
        return dict(self._models)


class BagOnlyRepo:
    """Bags of models from the YAML files of a folder, or from a catalogue."""

    def __init__(self, root: str | os.PathLike[str] | Catalog, model_repo: ModelRepo) -> None:
        self.root = root
        self.model_repo = model_repo
        self._bags: dict[str, Path] = {}
        self.scan()

    def scan(self) -> None:
        """Look at the folder again."""
        if not isinstance(self.root, Catalog):
            self._bags = {file.stem: file for file in _files(Path(self.root), ".yaml")}

    def has_model(self, name: str) -> bool:
        return name in (self.root.bags if isinstance(self.root, Catalog) else self._bags)

    def bag(self, name: str) -> Bag:
        """What a bag is made of."""
        if not self.has_model(name):
            raise ModelNotFound(name, self.list_model())
        return (
            self.root.bags[name] if isinstance(self.root, Catalog) else read_bag(self._bags[name])
        )

    def get_model(self, name: str) -> BagOfModels:
        return build_bag(self.bag(name), self.model_repo)

    def list_model(self) -> Places:
        if isinstance(self.root, Catalog):
            return {name: ", ".join(bag.models) for name, bag in self.root.bags.items()}
        return dict(self._bags)


class AnyModelRepo:
    """Networks by signature, and bags by name."""

    def __init__(self, model_repo: ModelRepo, bag_repo: BagOnlyRepo) -> None:
        self.model_repo = model_repo
        self.bag_repo = bag_repo

    def has_model(self, name_or_sig: str) -> bool:
        return self.model_repo.has_model(name_or_sig) or self.bag_repo.has_model(name_or_sig)

    def get_model(self, name_or_sig: str) -> nn.Module | BagOfModels:
        if self.model_repo.has_model(name_or_sig):
            return self.model_repo.get_model(name_or_sig)
        if self.bag_repo.has_model(name_or_sig):
            return self.bag_repo.get_model(name_or_sig)
        raise ModelNotFound(name_or_sig, self.list_model())

    def list_model(self) -> Places:
        return {**self.model_repo.list_model(), **self.bag_repo.list_model()}


class HubRepo:
    """One model of the hub, as upstream lays it out: `NAME.yaml` and `SIGNATURE.safetensors`.

    The hub states no digest that we could know beforehand, so nothing is taken from it unless it
    is asked for by `hf://`; what came is recorded, and must be the same ever after.
    """

    def __init__(self, name: str, store: CheckpointStore, *, trust: bool = False) -> None:
        namespace, slash, rest = name.removeprefix("hf://").rpartition("/")
        self.name = rest
        self.namespace = namespace if slash else DEFAULT_NAMESPACE
        if not _PLAIN_NAME.fullmatch(self.name) or not _PLAIN_NAME.fullmatch(self.namespace):
            raise ModelLoadingError(f"{name!r} is not of the form hf://namespace/name")
        self._store = store
        self._trust = trust

    @property
    def repository(self) -> str:
        """The hub's name for it: htdemucs_ft is in HTDemucs-ft, mdx in Demucs-mdx."""
        stem, _, rest = self.name.partition("_")
        if stem == "htdemucs":
            return f"{self.namespace}/HTDemucs{'-' if rest else ''}{rest}"
        return f"{self.namespace}/Demucs-{self.name}"

    def has_model(self, sig: str) -> bool:
        return sig in self.bag().models

    def get_model(self, sig: str) -> nn.Module:
        return _build(self.file(f"{sig}.safetensors"), trust=self._trust)

    def list_model(self) -> Places:
        return {sig: self._url(f"{sig}.safetensors") for sig in self.bag().models}

    def bag(self) -> Bag:
        return read_bag(self.file(f"{self.name}.yaml", MAX_YAML_BYTES))

    def fetch(self) -> list[Path]:
        """All files of the model: its bag, its networks."""
        networks = [f"{signature}.safetensors" for signature in dict.fromkeys(self.bag().models)]
        return [self.file(name) for name in (f"{self.name}.yaml", *networks)]

    def file(self, name: str, max_bytes: int = 2**32) -> Path:
        """One file of the repository, from the cache or the hub."""
        if not _PLAIN_NAME.fullmatch(name):
            raise ModelLoadingError(f"the hub's {self.repository} mentions the file {name!r}")
        path = self._store.folder / "hub" / self.repository / name
        return self._store.obtain_unlisted(self._url(name), path, max_bytes)

    def _url(self, file: str) -> str:
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{self.repository}/resolve/main/{file}"


def read_bag(file: Path) -> Bag:
    """A bag from its YAML file."""
    import yaml

    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError("it is too large for a list of models")
        table: Any = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(table, dict):
            raise ConfigError("it is not a table with `models`")
        return bag_of(file.stem, table)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, ConfigError) as error:
        raise CheckpointError(f"{file} is not a bag of models: {error}") from error


def build_bag(bag: Bag, repo: ModelRepo) -> BagOfModels:
    """The networks of a bag, each built once, and its weights."""
    from demucs_infer.apply import BagOfModels

    members = {signature: repo.get_model(signature) for signature in dict.fromkeys(bag.models)}
    weights = None if bag.weights is None else [list(row) for row in bag.weights]
    try:
        return BagOfModels([members[one] for one in bag.models], weights, bag.segment)
    except (AssertionError, ValueError) as error:
        raise CheckpointError(f"the bag {bag.name!r} does not fit together: {error}") from error


def _files(root: Path, *suffixes: str) -> list[Path]:
    if not root.is_dir():
        raise ModelLoadingError(f"{root} is not a folder; repo must be one that holds models")
    return sorted(file for file in root.iterdir() if file.suffix in suffixes and file.is_file())


def _build(file: Path, checkpoint: Checkpoint | None = None, *, trust: bool = False) -> nn.Module:
    from demucs_infer.checkpoints.reader import Architecture
    from demucs_infer.states import load_model

    if checkpoint is None:
        return load_model(file, trust=trust)
    bare = None
    if checkpoint.klass is not None:
        bare = Architecture(checkpoint.klass, kwargs=checkpoint.kwargs or {})
    model = load_model(file, architecture=bare, trust=trust)
    stems = checkpoint.stems
    if stems is not None and len(stems) == len(getattr(model, "sources", stems)):
        model.sources = list(stems)  # type: ignore[assignment]
    return model
