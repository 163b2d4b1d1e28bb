"""A network from a name: `get_model`, and what is known about each name before it is fetched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import NOT_STATED, Checkpoint, load_catalog
from demucs_infer.checkpoints.download import Progress, sha256_of
from demucs_infer.custom.registry import (
    find_package,
    list_registered_models,
    load_registered_network,
)
from demucs_infer.errors import CheckpointError, ModelLoadingError
from demucs_infer.repo import (
    AnyModelRepo,
    BagOnlyRepo,
    HubRepo,
    LocalRepo,
    Places,
    RemoteRepo,
    build_bag,
)

if TYPE_CHECKING:
    from torch import nn

    from demucs_infer.apply import BagOfModels

DEFAULT_MODEL = "htdemucs"
SOURCES = ["drums", "bass", "other", "vocals"]

AnyPath = str | os.PathLike[str]

_SUFFIXES = frozenset({".th", ".pt", ".ckpt", ".safetensors"})


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file that a model needs."""

    signature: str
    file: str
    sha256: str
    urls: tuple[str, ...]
    size: int | None
    """Bytes; `None` where it is not known before the download."""
    licence: str
    source: str | None
    path: Path
    """Where it is, or will be."""
    is_cached: bool


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known about a name without opening, or having, its files."""

    name: str
    is_bag: bool
    stems: tuple[str, ...] | None
    sample_rate: int | None
    segment: float | None
    weights: tuple[tuple[float, ...], ...] | None
    licence: str
    source: str | None
    note: str | None
    ships: bool
    files: tuple[FileInfo, ...]

    @property
    def size(self) -> int | None:
        """Bytes of all files, if every one is known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def is_cached(self) -> bool:
        return all(file.is_cached for file in self.files)


def get_model(
    name: AnyPath = DEFAULT_MODEL,
    repo: AnyPath | None = None,
    *,
    cache_dir: AnyPath | None = None,
    offline: bool | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> nn.Module | BagOfModels:
    """The network, or bag of networks, called `name`, in evaluation mode.

    `name` is a model of the catalogue or of another package, a signature, `hf://namespace/name`, or
    the path of a checkpoint; with `repo`, a model or bag of that folder. `progress(done, total)` is
    told about bytes that arrive.
    """
    text = os.fspath(name)
    if repo is not None:
        return _local(Path(repo), trust=trust).get_model(text)
    if text.startswith("hf://"):
        hub = HubRepo(text, CheckpointStore.of(cache_dir, offline, progress), trust=trust)
        hub.fetch()
        return build_bag(hub.bag(), hub)
    if _is_path(text):
        from demucs_infer.states import load_model

        return load_model(text, trust=trust)
    if text not in load_catalog().bags and text not in load_catalog().checkpoints:
        return load_registered_network(text)
    store = CheckpointStore.of(cache_dir, offline, progress)
    for checkpoint in load_catalog().files(text):  # all of them before the first one is built
        store.obtain(checkpoint)
    single = RemoteRepo(store, trust=trust)
    return AnyModelRepo(single, BagOnlyRepo(load_catalog(), single)).get_model(text)


def list_models(repo: AnyPath | None = None) -> dict[str, Places]:
    """`{"single": {signature: address, file or module}, "bag": {name: its networks or file}}`."""
    if repo is not None:
        found = _local(Path(repo))
        return {"single": found.model_repo.list_model(), "bag": found.bag_repo.list_model()}
    single = RemoteRepo()
    networks = {**single.list_model(), **list_registered_models()}
    return {"single": networks, "bag": BagOnlyRepo(load_catalog(), single).list_model()}


def model_info(name: str, *, cache_dir: AnyPath | None = None) -> ModelInfo:
    """What the catalogue, or another package, says about a name; nothing is fetched."""
    catalog, store = load_catalog(), CheckpointStore.of(cache_dir, offline=True)
    if name not in {*catalog.bags, *catalog.checkpoints} and name in list_registered_models():
        return _offered_info(name)
    bag, checkpoints = catalog.bag(name), catalog.files(name)
    stems = {checkpoint.stems for checkpoint in checkpoints}
    licences = {checkpoint.licence for checkpoint in checkpoints}
    return ModelInfo(
        name=name,
        is_bag=name in catalog.bags,
        stems=stems.pop() if len(stems) == 1 else None,
        sample_rate=_agreed(checkpoint.sample_rate for checkpoint in checkpoints),
        segment=bag.segment,
        weights=bag.weights,
        licence=licences.pop() if len(licences) == 1 else NOT_STATED,
        source=checkpoints[0].source,
        note=checkpoints[0].note,
        ships=all(checkpoint.ships for checkpoint in checkpoints),
        files=tuple(_file_info(checkpoint, store) for checkpoint in checkpoints),
    )


def pull(
    name: str,
    *,
    to: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Download all that `name` needs, and say where it is.

    `to` also copies it into a folder that `get_model(name, repo=folder)` reads, bag file included.
    """
    store = CheckpointStore.of(cache_dir, offline, progress)
    if name.startswith("hf://"):
        return _copies(HubRepo(name, store).fetch(), to)
    paths = [store.obtain(checkpoint) for checkpoint in load_catalog().files(name)]
    if to is not None and name in load_catalog().bags:
        _write_bag(name, Path(to))
    return _copies(paths, to)


def paths(name: str, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Where the files of `name` are, or would be."""
    store = CheckpointStore.of(cache_dir)
    return [store.path(checkpoint) for checkpoint in load_catalog().files(name)]


def verify(name: str, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Take the full sha256 of every file of `name`; `CheckpointError` if one is not right."""
    store = CheckpointStore.of(cache_dir)
    checkpoints = load_catalog().files(name)
    for checkpoint in checkpoints:
        store.verify(checkpoint)
    return [store.path(checkpoint) for checkpoint in checkpoints]


def remove(name: str, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Delete the downloaded files of `name` that no other bag shares; says which were there."""
    store, catalog = CheckpointStore.of(cache_dir), load_catalog()
    shared = {
        signature
        for bag in catalog.bags.values()
        if bag.name != name and all(store.has(one) for one in catalog.files(bag.name))
        for signature in bag.models
    }
    wanted = catalog.files(name)
    alone = [one for one in wanted if one.signature not in shared or one.signature == name]
    return [store.path(one) for one in alone or wanted if store.remove(one)]


def add_checkpoint(source: AnyPath, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Take a file, or every file of a folder, into the cache: for machines without a network.

    What a file is is told by its sha256, not by its name.
    """
    origin, store = Path(source), CheckpointStore.of(cache_dir)
    files = sorted(origin.iterdir()) if origin.is_dir() else [origin]
    by_digest = {one.sha256: one for one in load_catalog().checkpoints.values()}
    taken, others = [], []
    for file in files:
        if file.suffix not in _SUFFIXES or not file.is_file():
            continue
        checkpoint = by_digest.get(sha256_of(file))
        if checkpoint is None:
            others.append(file.name)
        else:
            taken.append(store.add_file(file, checkpoint))
    if not taken:
        raise CheckpointError(
            f"{origin} holds no file of the catalogue, by sha256"
            + (f" (it has {', '.join(others[:5])})" if others else "")
            + "; a model of your own is used by its path, or with repo=its folder"
        )
    return taken


def _is_path(name: str) -> bool:
    """Whether a name is meant as a file: it has a checkpoint's suffix, or is there."""
    return Path(name).suffix in _SUFFIXES or (Path(name).parent != Path() and Path(name).is_file())


def _local(root: Path, *, trust: bool = False) -> AnyModelRepo:
    single = LocalRepo(root, trust=trust)
    return AnyModelRepo(single, BagOnlyRepo(root, single))


def _offered_info(name: str) -> ModelInfo:
    """What is known of a model of another package before that is imported: where it is."""
    return ModelInfo(
        name=name,
        is_bag=False,
        stems=None,
        sample_rate=None,
        segment=None,
        weights=None,
        licence=NOT_STATED,
        source=find_package(name) or list_registered_models()[name],
        note=None,
        ships=False,
        files=(),
    )


def _agreed(rates: Iterable[int | None]) -> int | None:
    found = set(rates)
    return found.pop() if len(found) == 1 else None


def _file_info(checkpoint: Checkpoint, store: CheckpointStore) -> FileInfo:
    path = store.path(checkpoint)
    return FileInfo(
        signature=checkpoint.signature,
        file=checkpoint.file,
        sha256=checkpoint.sha256,
        urls=checkpoint.urls,
        size=path.stat().st_size if path.is_file() else checkpoint.size,
        licence=checkpoint.licence,
        source=checkpoint.source,
        path=path,
        is_cached=store.has(checkpoint),
    )


def _write_bag(name: str, folder: Path) -> None:
    """The bag as a YAML file, JSON being the part of YAML that both know."""
    bag = load_catalog().bags[name]
    fields = {"models": bag.models, "weights": bag.weights, "segment": bag.segment}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: value for key, value in fields.items() if value is not None}, indent=1)
    (folder / f"{name}.yaml").write_text(text + "\n", "utf-8")


def _copies(paths: list[Path], to: AnyPath | None) -> list[Path]:
    if to is None:
        return paths
    folder = Path(to)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy2(path, folder / path.name)) for path in paths]
    except OSError as error:
        raise ModelLoadingError(f"cannot copy to {folder}: {error.strerror}") from error
