"""Find and load models in a repository: a local folder, the catalog, or the Hugging Face Hub.

Each repository has the methods of upstream's classes: `has_model`, `get_model` and `list_model`.
torch is imported only when a network is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from demucs_infer.checkpoints.bounded_yaml import YamlLimits, load_yaml
from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import Bag, Catalog, Checkpoint, load_catalog, parse_bag
from demucs_infer.errors import (
    CheckpointError,
    ConfigError,
    ModelLoadingError,
    ModelNotFound,
)
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.lazy import make_getattr

if TYPE_CHECKING:
    from torch import nn

    from demucs_infer.apply import BagOfModels

__all__ = [
    "AnyModelRepo",
    "BagOnlyRepo",
    "HubRepo",
    "LocalRepo",
    "ModelLoadingError",
    "ModelOnlyRepo",
    "ModelRepo",
    "RemoteRepo",
    "check_checksum",
]

__getattr__ = make_getattr(
    __name__,
    {
        **dict.fromkeys(("AnyModel", "BagOfModels", "Model"), "demucs_infer.apply"),
        "load_model": "demucs_infer.states",
    },
)

Places = Mapping[str, "str | Path"]

MAX_YAML_BYTES = 2**16
"""Limit for the size of a bag's file; those of released bags have less than 200 bytes."""

_YAML_LIMITS = YamlLimits(MAX_YAML_BYTES, num_events=4096, depth=8)
"""Limits for the files of bags; those of released bags have less than 60 events."""

DEFAULT_NAMESPACE = "adefossez"
_PLAIN_NAME = re.compile(r"[\w][\w.-]{0,99}", re.ASCII)


class ModelRepo(Protocol):
    """Single networks by signature."""

    def has_model(self, sig: str) -> bool:
        """Return whether there is a network with this signature."""

    def get_model(self, sig: str) -> nn.Module:
        """Load a network; raise `ModelNotFound` if there is none with this signature."""

    def list_model(self) -> Places:
        """Return where each network is, by signature."""


class ModelOnlyRepo:
    """Base class of repositories of single networks; subclasses define all three methods."""

    def has_model(self, sig: str) -> bool:
        """Return whether there is a network with this signature."""
        raise NotImplementedError

    def get_model(self, sig: str) -> nn.Module:
        """Load a network; raise `ModelNotFound` if there is none with this signature."""
        raise NotImplementedError

    def list_model(self) -> Places:
        """Return where each network is, by signature."""
        raise NotImplementedError


class RemoteRepo(ModelOnlyRepo):
    """The checkpoints of the catalog, or those at the URLs of `models`, downloaded on demand.

    A checkpoint of the catalog is verified by its complete sha256, any other by the checksum in its
    file name (`SIGNATURE-CHECKSUM.th`).
    """

    def __init__(
        self,
        models: Mapping[str, str] | None = None,
        *,
        store: CheckpointStore | None = None,
        catalog: Catalog | None = None,
        trust: bool = False,
    ) -> None:
        self._store = store or CheckpointStore.from_environment()
        self._catalog = catalog or load_catalog()
        self._trust = trust
        places = {
            signature: checkpoint.path if checkpoint.is_bundled else checkpoint.urls[0]
            for signature, checkpoint in self._catalog.checkpoints.items()
        }
        self._models: Places = places if models is None else models

    def has_model(self, sig: str) -> bool:
        """Return whether there is a network with this signature."""
        return sig in self._models

    def get_model(self, sig: str) -> nn.Module:
        """Load a network; raise `ModelNotFound` if there is none with this signature."""
        if sig not in self._models:
            raise ModelNotFound(sig, self._models)
        place = self._models[sig]
        checkpoint = self._catalog.checkpoints.get(sig)
        if checkpoint is not None and place in (checkpoint.path, *checkpoint.urls):
            return _load(self._store.obtain(checkpoint), checkpoint, trust=self._trust)
        return _load(self._download(str(place)), trust=self._trust)

    def list_model(self) -> Places:
        """Return where each network is, by signature."""
        return self._models

    def _download(self, url: str) -> Path:
        """Return the file at a URL that is not in the catalog."""
        name = url.rpartition("/")[2]
        if not _PLAIN_NAME.fullmatch(name):
            raise ModelLoadingError(f"invalid URL {url!r}: expected the name of a file at its end")
        folder = self._store.folder / "urls" / sha256(url.encode()).hexdigest()[:16]
        path = self._store.obtain_unlisted(url, folder / name, 2**32)
        _, dash, checksum = path.stem.rpartition("-")
        if dash:
            check_checksum(path, checksum)
        return path


class LocalRepo(ModelOnlyRepo):
    """A folder of `SIGNATURE.th`, `SIGNATURE-CHECKSUM.th` or `SIGNATURE.safetensors` files.

    A pair of files `NAME.ckpt` and `NAME.yaml` is a custom network and its configuration.
    """

    def __init__(self, root: str | os.PathLike[str], *, trust: bool = False) -> None:
        self.root = Path(root)
        self._trust = trust
        self._models: dict[str, Path] = {}
        self._checksums: dict[str, str] = {}
        self.scan()

    def scan(self) -> None:
        """List the folder again."""
        self._models.clear()
        self._checksums.clear()
        for file in _list_files(self.root, ".th", ".safetensors"):
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
        for file in _list_files(self.root, ".ckpt"):
            if file.with_suffix(".yaml").is_file():
                self._models.setdefault(file.stem, file)

    def files_of(self, sig: str) -> list[Path]:
        """Return the files of a network: its weights, after its configuration if it has one."""
        file = self._models[sig]
        return [file.with_suffix(".yaml"), file] if file.suffix == ".ckpt" else [file]

    def has_model(self, sig: str) -> bool:
        """Return whether there is a model of this name."""
        return sig in self._models

    def get_model(self, sig: str) -> nn.Module:
        """Load a model; raise `ModelNotFound` if there is none of this name."""
        if sig not in self._models:
            raise ModelNotFound(sig, self._models, in_folder=True)
        file, checksum = self._models[sig], self._checksums.get(sig)
        if checksum is not None:
            check_checksum(file, checksum)
        if file.suffix == ".ckpt":
            from demucs_infer.custom.build import load_network
            from demucs_infer.custom.config import Config

            return load_network(Config.from_file(file.with_suffix(".yaml")), file)
        return _load(file, trust=self._trust)

    def list_model(self) -> Places:
        """Return where each model is, by name."""
        return dict(self._models)


class BagOnlyRepo:
    """Bags of models from the YAML files of a folder, or from a catalog."""

    def __init__(self, root: str | os.PathLike[str] | Catalog, model_repo: ModelRepo) -> None:
        self.root = root
        self.model_repo = model_repo
        self._bags: dict[str, Path] = {}
        self.scan()

    def scan(self) -> None:
        """List the folder again."""
        if not isinstance(self.root, Catalog):
            files = _list_files(Path(self.root), ".yaml")
            is_bag = {file: not file.with_suffix(".ckpt").is_file() for file in files}
            self._bags = {file.stem: file for file in files if is_bag[file]}

    def has_model(self, name: str) -> bool:
        """Return whether there is a model of this name."""
        return name in (self.root.bags if isinstance(self.root, Catalog) else self._bags)

    def bag(self, name: str) -> Bag:
        """Return the members, weights and segment of a bag."""
        if not self.has_model(name):
            raise ModelNotFound(
                name, self.list_model(), in_folder=not isinstance(self.root, Catalog)
            )
        return (
            self.root.bags[name] if isinstance(self.root, Catalog) else read_bag(self._bags[name])
        )

    def get_model(self, name: str) -> BagOfModels:
        """Load a model; raise `ModelNotFound` if there is none of this name."""
        return build_bag(self.bag(name), self.model_repo)

    def list_model(self) -> Places:
        """Return where each model is, by name."""
        if isinstance(self.root, Catalog):
            return {name: ", ".join(bag.models) for name, bag in self.root.bags.items()}
        return dict(self._bags)


class AnyModelRepo:
    """Networks by signature, and bags by name."""

    def __init__(self, model_repo: ModelRepo, bag_repo: BagOnlyRepo) -> None:
        self.model_repo = model_repo
        self.bag_repo = bag_repo

    def has_model(self, name_or_sig: str) -> bool:
        """Return whether there is a model of this name."""
        return self.model_repo.has_model(name_or_sig) or self.bag_repo.has_model(name_or_sig)

    def get_model(self, name_or_sig: str) -> nn.Module | BagOfModels:
        """Load a model; raise `ModelNotFound` if there is none of this name."""
        if self.model_repo.has_model(name_or_sig):
            return self.model_repo.get_model(name_or_sig)
        if self.bag_repo.has_model(name_or_sig):
            return self.bag_repo.get_model(name_or_sig)
        if isinstance(self.model_repo, LocalRepo):
            weights = self.model_repo.root / f"{name_or_sig}.ckpt"
            if weights.is_file():
                config = weights.with_suffix(".yaml")
                raise ModelLoadingError(f"{weights} needs its configuration beside it, as {config}")
        raise ModelNotFound(
            name_or_sig, self.list_model(), in_folder=isinstance(self.model_repo, LocalRepo)
        )

    def list_model(self) -> Places:
        """Return where each model is, by name."""
        return {**self.model_repo.list_model(), **self.bag_repo.list_model()}


class HubRepo(ModelOnlyRepo):
    """One model on the Hugging Face Hub: `NAME.yaml` and `SIGNATURE.safetensors` files.

    The Hub is used only for `hf://` names, as the digests of its files are not known in advance.
    The digest of the first download is recorded, and later required.
    """

    def __init__(self, name: str, store: CheckpointStore, *, trust: bool = False) -> None:
        namespace, slash, rest = name.removeprefix("hf://").rpartition("/")
        self.name = rest
        self.namespace = namespace if slash else DEFAULT_NAMESPACE
        if not _PLAIN_NAME.fullmatch(self.name) or not _PLAIN_NAME.fullmatch(self.namespace):
            raise ModelLoadingError(f"invalid name {name!r}: expected hf://namespace/name")
        self._store = store
        self._trust = trust

    @property
    def repository(self) -> str:
        """Name of the repository: htdemucs_ft is in HTDemucs-ft, mdx in Demucs-mdx."""
        return f"{self.namespace}/{name_repository(self.name)}"

    def has_model(self, sig: str) -> bool:
        """Return whether there is a model of this name."""
        return sig in self.bag().models

    def get_model(self, sig: str) -> nn.Module:
        """Load a model; raise `ModelNotFound` if there is none of this name."""
        return _load(self.file(f"{sig}.safetensors"), trust=self._trust)

    def list_model(self) -> Places:
        """Return where each model is, by name."""
        return {sig: self._url(f"{sig}.safetensors") for sig in self.bag().models}

    def bag(self) -> Bag:
        """Return the bag of the model; raise `DownloadError` if it cannot be downloaded."""
        return read_bag(self.file(f"{self.name}.yaml", MAX_YAML_BYTES))

    def fetch(self) -> list[Path]:
        """Download all files of the model: bag and networks."""
        networks = [f"{signature}.safetensors" for signature in dict.fromkeys(self.bag().models)]
        return [self.file(name) for name in (f"{self.name}.yaml", *networks)]

    def file(self, name: str, max_bytes: int = 2**32) -> Path:
        """Return one file of the repository, from the cache or the Hub."""
        if not _PLAIN_NAME.fullmatch(name):
            raise ModelLoadingError(
                f"invalid file name {name!r} in the repository {self.repository}"
            )
        path = self._store.folder / "hub" / self.repository / name
        return self._store.obtain_unlisted(self._url(name), path, max_bytes)

    def _url(self, file: str) -> str:
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{self.repository}/resolve/main/{file}"


def name_repository(name: str) -> str:
    """Return the name of a model's repository on the Hub, without its namespace."""
    stem, _, rest = name.partition("_")
    if stem == "htdemucs":
        return f"HTDemucs{'-' if rest else ''}{rest}"
    return f"Demucs-{name}"


def check_checksum(path: Path, checksum: str) -> None:
    """Raise `CheckpointError` unless the sha256 of a file begins with `checksum`."""
    digest = sha256_file(path)
    if not checksum or not digest.startswith(checksum.lower()):
        raise CheckpointError(f"{path} is damaged: expected sha256 {checksum}..., got {digest}")


def read_bag(file: Path) -> Bag:
    """Read a bag from its YAML file; raise `CheckpointError` if it is not valid."""
    try:
        with file.open("rb") as stream:
            table = load_yaml(stream.read(MAX_YAML_BYTES + 1), _YAML_LIMITS)
        if not isinstance(table, dict):
            raise ConfigError("expected a table with `models`")
        return parse_bag(file.stem, table)
    except (OSError, OverflowError, ConfigError) as error:
        reason = " ".join(str(error).split())  # on one line, even if it quotes lines of the file
        raise CheckpointError(f"{file} is not a valid bag of models: {reason}") from error


def build_bag(bag: Bag, repo: ModelRepo) -> BagOfModels:
    """Build a bag; a network that occurs twice in it is loaded once."""
    from demucs_infer.apply import BagOfModels

    members = {signature: repo.get_model(signature) for signature in dict.fromkeys(bag.models)}
    weights = None if bag.weights is None else [list(row) for row in bag.weights]
    try:
        models = [members[signature] for signature in bag.models]
        return BagOfModels(models, weights, bag.segment, stems=bag.stems, combine=bag.combine)
    except (AssertionError, ValueError) as error:
        raise CheckpointError(
            f"the members of the bag {bag.name!r} do not match: {error}"
        ) from error


def combine_models(name: str, models: Sequence[tuple[nn.Module, float]]) -> BagOfModels:
    """Combine models, each with its relative weight, into one bag.

    A bag among the models is replaced by its networks. Raises `ModelLoadingError` if the models do
    not have the same stems, sample rate and channels.
    """
    from demucs_infer.apply import BagOfModels

    members: list[nn.Module] = []
    rows: list[list[float]] = []
    for model, weight in models:
        if not isinstance(model, BagOfModels):
            members.append(model)
            rows.append([weight] * len(cast("list[str]", getattr(model, "sources", ()))))
            continue
        totals = [sum(column) for column in zip(*model.weights)]
        members += model.models
        rows += [[weight * own / total for own, total in zip(row, totals)] for row in model.weights]
    try:
        return BagOfModels(members, rows)
    except ValueError as error:
        raise ModelLoadingError(f"cannot make a bag of {name!r}: {error}") from error


def _list_files(root: Path, *suffixes: str) -> list[Path]:
    if not root.is_dir():
        raise ModelLoadingError(f"{root} is not a folder: repo must be a folder with models")
    return sorted(file for file in root.iterdir() if file.suffix in suffixes and file.is_file())


def _load(file: Path, checkpoint: Checkpoint | None = None, *, trust: bool = False) -> nn.Module:
    from demucs_infer.checkpoints.reader import Architecture
    from demucs_infer.states import load_model

    if checkpoint is None:
        return load_model(file, trust=trust)
    architecture = None
    if checkpoint.klass is not None:
        architecture = Architecture(checkpoint.klass, kwargs=checkpoint.kwargs or {})
    model = load_model(file, architecture=architecture, trust=trust)
    stems = checkpoint.stems
    if stems is not None and len(stems) == len(getattr(model, "sources", stems)):
        model.sources = list(stems)  # type: ignore[assignment]
    return model
