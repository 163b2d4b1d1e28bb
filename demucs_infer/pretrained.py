"""Load models by name (`get_model`), describe them, and manage their downloaded files."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import (
    NOT_STATED,
    Bag,
    Checkpoint,
    PublishedNetwork,
    load_catalog,
    split_bag,
)
from demucs_infer.checkpoints.download import Progress
from demucs_infer.custom.registry import (
    find_package,
    list_registered_models,
    load_registered_network,
)
from demucs_infer.errors import CheckpointError, DownloadError, ModelLoadingError
from demucs_infer.repo import (
    AnyModelRepo,
    BagOnlyRepo,
    HubRepo,
    LocalRepo,
    Places,
    RemoteRepo,
    build_bag,
    combine_models,
)
from demucs_infer.repo import ModelOnlyRepo as ModelOnlyRepo
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.lazy import make_getattr
from demucs_infer.system.malloc import map_large_allocations

if TYPE_CHECKING:
    from torch import nn

    from demucs_infer.apply import BagOfModels
    from demucs_infer.hdemucs import HDemucs

__getattr__ = make_getattr(
    __name__, {"HDemucs": "demucs_infer.hdemucs", "fatal": "demucs_infer.utils"}
)

logger = logging.getLogger(__name__)

ROOT_URL = "https://dl.fbaipublicfiles.com/demucs/"
REMOTE_ROOT = Path(__file__).with_name("remote")
"""Folder with upstream's lists of its models, for programs that read these files.

This package uses its catalog instead, which contains the same models; a test compares the two.
"""

DEFAULT_MODEL = "htdemucs"
SOURCES = ["drums", "bass", "other", "vocals"]

AnyPath = str | os.PathLike[str]

_Value = TypeVar("_Value")

_SUFFIXES = frozenset({".th", ".pt", ".ckpt", ".safetensors"})


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file that a model needs."""

    signature: str
    file: str
    sha256: str
    urls: tuple[str, ...]
    size: int | None
    """Size in bytes; `None` if unknown before the download."""
    license: str
    source: str | None
    path: Path
    """Path of the file, whether or not it has been downloaded."""
    is_cached: bool


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Description of a model; its files need not be downloaded."""

    name: str
    is_bag: bool
    stems: tuple[str, ...] | None
    sample_rate: int | None
    segment: float | None
    weights: tuple[tuple[float, ...], ...] | None
    license: str
    source: str | None
    note: str | None
    is_bundled: bool
    files: tuple[FileInfo, ...]

    @property
    def size(self) -> int | None:
        """Size of all files in bytes; `None` if the size of one is unknown."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def is_cached(self) -> bool:
        """Whether all files are in the cache."""
        return all(file.is_cached for file in self.files)


@map_large_allocations()
def get_model(
    name: AnyPath = DEFAULT_MODEL,
    repo: AnyPath | None = None,
    *,
    cache_dir: AnyPath | None = None,
    offline: bool | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> nn.Module | BagOfModels:
    """Load the network, or bag of networks, called `name`, in evaluation mode.

    `name` is a model of the catalog or of another package, a signature, `hf://namespace/name`, or
    the path of a checkpoint; with `repo`, a model or bag in that folder. Several of them, as in
    `htdemucs+mdx_extra@0.5`, make a bag with relative weights. Downloads call
    `progress(received bytes, total bytes)`. Raises `ModelLoadingError` if it cannot be loaded.
    """
    text = os.fspath(name)
    parts = split_bag(text)
    if len(parts) > 1:
        _check_combinable(text, [part for part, _ in parts])
        return combine_models(
            text,
            [
                (
                    get_model(
                        part,
                        repo,
                        cache_dir=cache_dir,
                        offline=offline,
                        trust=trust,
                        progress=progress,
                    ),
                    weight,
                )
                for part, weight in parts
            ],
        )
    if text == "demucs_unittest":
        return demucs_unittest().eval()
    if repo is not None:
        return _open_folder(Path(repo), trust=trust).get_model(text)
    if text.startswith("hf://"):
        hub = HubRepo(
            text, CheckpointStore.from_environment(cache_dir, offline, progress), trust=trust
        )
        hub.fetch()
        return build_bag(hub.bag(), hub)
    if _is_path(text):
        from demucs_infer.states import load_model

        return load_model(text, trust=trust)
    if text in load_catalog().networks:
        raise ModelLoadingError(
            f"{text!r} is a configuration and a checkpoint: use Separator({text!r}), or "
            "config, checkpoint = "
            f"demucs_infer.pretrained.pull({text!r}), then Separator.from_pretrained(config=config,"
            " checkpoint=checkpoint)"
        )
    if not load_catalog().has(text):
        return load_registered_network(text)
    store = CheckpointStore.from_environment(cache_dir, offline, progress)
    _obtain_files(text, store)  # all before building the first
    single = RemoteRepo(store=store, trust=trust)
    return AnyModelRepo(single, BagOnlyRepo(load_catalog(), single)).get_model(text)


def _check_combinable(name: str, parts: Iterable[str]) -> None:
    """Raise `ModelLoadingError` if one of the models needs a bag in a folder, before downloads."""
    for part in parts:
        if part in load_catalog().networks:
            raise ModelLoadingError(
                f"cannot make a bag of {name!r}: {part!r} has windows and stems of its own: call "
                f"demucs_infer.pretrained.pull({part!r}, to=FOLDER), write a bag with the key "
                "`stems` into that folder, and use it as the repo (docs/community.md, Ensembles)"
            )


def get_model_from_sig(sig: str) -> nn.Module:
    """Load the network with this signature from the catalog.

    Upstream's function of this name searches the folder of its trainings; load such a checkpoint by
    its path with `get_model`.
    """
    return get_model(sig)


def get_model_from_args(args: argparse.Namespace) -> nn.Module | BagOfModels:
    """Load the model selected on the command line with the flags of `add_model_flags`."""
    if getattr(args, "sig", None) is not None:
        return get_model_from_sig(args.sig)
    return get_model(args.name or DEFAULT_MODEL, args.repo)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags `-n`, `-s` and `--repo` for a model to a parser."""
    group = parser.add_mutually_exclusive_group(required=False)
    group.add_argument("-s", "--sig", help="signature of a single network")
    group.add_argument(
        "-n", "--name", default=DEFAULT_MODEL, help="name or signature of a model (%(default)s)"
    )
    parser.add_argument("--repo", type=Path, help="folder of models, for use with -n")


def demucs_unittest() -> HDemucs:
    """Return a small network with random weights, for tests of programs."""
    from demucs_infer.hdemucs import HDemucs

    return HDemucs(channels=4, sources=SOURCES)


def _parse_remote_files(remote_file_list: Path) -> dict[str, str]:
    """Return URLs by signature from `files.txt`; some programs import this private function."""
    folder, models = "", {}
    for line in remote_file_list.read_text("utf-8").splitlines():
        entry = line.partition("#")[0].strip()
        if entry.startswith("root:"):
            folder = entry.removeprefix("root:").strip()
        elif entry:
            models[entry.partition("-")[0]] = f"{ROOT_URL}{folder}{entry}"
    return models


def list_models(repo: AnyPath | None = None) -> dict[str, Places]:
    """Return `{"single": {signature: URL, file or module}, "bag": {name: members or file}}`."""
    if repo is not None:
        folder = _open_folder(Path(repo))
        return {"single": folder.model_repo.list_model(), "bag": folder.bag_repo.list_model()}
    single = RemoteRepo()
    networks = {**single.list_model(), **list_registered_models()}
    return {"single": networks, "bag": BagOnlyRepo(load_catalog(), single).list_model()}


def model_info(name: str, *, cache_dir: AnyPath | None = None) -> ModelInfo:
    """Describe a model of the catalog or of another package, without downloading anything."""
    catalog, store = load_catalog(), CheckpointStore.from_environment(cache_dir, offline=True)
    if name in catalog.networks:
        return _describe_network(catalog.networks[name], store)
    if name not in {*catalog.bags, *catalog.checkpoints} and name in list_registered_models():
        return _describe_registered(name)
    parts, checkpoints = split_bag(name), catalog.files(name)
    is_combined = len(parts) > 1
    bag = Bag(name, tuple(part for part, _ in parts)) if is_combined else catalog.bag(name)
    return ModelInfo(
        name=name,
        is_bag=is_combined or name in catalog.bags,
        stems=_common_value(checkpoint.stems for checkpoint in checkpoints),
        sample_rate=_common_value(checkpoint.sample_rate for checkpoint in checkpoints),
        segment=bag.segment,
        weights=bag.weights,
        license=_common_value(checkpoint.license for checkpoint in checkpoints) or NOT_STATED,
        source=_common_value(checkpoint.source for checkpoint in checkpoints),
        note=_common_value(checkpoint.note for checkpoint in checkpoints),
        is_bundled=all(checkpoint.is_bundled for checkpoint in checkpoints),
        files=tuple(_describe_file(checkpoint, store) for checkpoint in checkpoints),
    )


def pull(
    name: str,
    *,
    to: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Download all files of a model, and return their paths.

    With `to`, copy them (and the bag file) into a folder for `get_model(name, repo=folder)`.
    """
    store = CheckpointStore.from_environment(cache_dir, offline, progress)
    parts = split_bag(name)
    if len(parts) > 1:
        _check_combinable(name, [part for part, _ in parts])
        fetched = [
            path
            for part, _ in parts
            if load_catalog().has(part) or not _is_path(part)
            for path in pull(part, to=to, cache_dir=cache_dir, offline=offline, progress=progress)
        ]
        return list(dict.fromkeys(fetched))
    if name.startswith("hf://"):
        return _copy_files(HubRepo(name, store).fetch(), to)
    paths = _obtain_files(name, store)
    if to is not None and name in load_catalog().bags:
        _write_bag(name, Path(to))
    return _copy_files(paths, to)


def _obtain_files(name: str, store: CheckpointStore) -> list[Path]:
    """Return the files of a model of the catalog, downloading missing ones.

    Raises:
        DownloadError: A file cannot be downloaded; the message explains what to do.
    """
    checkpoints = load_catalog().files(name)
    missing = [checkpoint for checkpoint in checkpoints if not store.path(checkpoint).is_file()]
    try:
        if missing and store.offline:
            raise DownloadError(_describe_missing(missing, len(checkpoints)))
        return [store.obtain(checkpoint) for checkpoint in checkpoints]
    except DownloadError as error:
        catalog = load_catalog().checkpoints.items()
        bundled = [other for other, checkpoint in catalog if checkpoint.is_bundled]
        instead = f"; the bundled model {bundled[0]!r} needs no download" if bundled else ""
        raise DownloadError(
            f"{name}: {error}. If this machine has no network, run `demucs-infer models pull "
            f"{name} --to FOLDER` on one that does, copy FOLDER here, and use it as the repo "
            f"(`demucs-infer models info {name}` lists the files, with URLs and digests){instead}"
        ) from error


def _describe_missing(missing: list[Checkpoint], count: int) -> str:
    files = f"{len(missing)} of {count} files are" if count > 1 else "its file is"
    sizes = [checkpoint.size for checkpoint in missing]
    size = "" if None in sizes else f" ({sum(filter(None, sizes)) / 1e6:.0f} MB)"
    return f"{files} not in the cache{size}, and downloads are disabled"


def paths(name: str, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Return the paths of a model's files, whether or not they have been downloaded."""
    store = CheckpointStore.from_environment(cache_dir)
    return [store.path(checkpoint) for checkpoint in load_catalog().files(name)]


def verify(name: str, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Hash every file of a model; raise `CheckpointError` if a hash is not that of the catalog."""
    store = CheckpointStore.from_environment(cache_dir)
    checkpoints = load_catalog().files(name)
    for checkpoint in checkpoints:
        store.verify(checkpoint)
    return [store.path(checkpoint) for checkpoint in checkpoints]


def remove(name: str, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Delete the downloaded files of a model, and return their paths.

    Files that another complete bag in the cache uses are kept.
    """
    store, catalog = CheckpointStore.from_environment(cache_dir), load_catalog()
    shared = {
        signature
        for bag in catalog.bags.values()
        if bag.name != name and all(store.has(checkpoint) for checkpoint in catalog.files(bag.name))
        for signature in bag.models
    }
    checkpoints = catalog.files(name)
    unshared = [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint.signature not in shared or checkpoint.signature == name
    ]
    return [
        store.path(checkpoint) for checkpoint in unshared or checkpoints if store.remove(checkpoint)
    ]


def add_checkpoint(source: AnyPath, *, cache_dir: AnyPath | None = None) -> list[Path]:
    """Copy a checkpoint, or all checkpoints in a folder, into the cache, without a network.

    Checkpoints are recognized by their sha256, not by their name.
    """
    origin, store = Path(source), CheckpointStore.from_environment(cache_dir)
    files = sorted(origin.iterdir()) if origin.is_dir() else [origin]
    by_digest = {
        checkpoint.sha256: checkpoint for checkpoint in load_catalog().checkpoints.values()
    }
    added, unknown = [], []
    for file in files:
        if file.suffix not in _SUFFIXES or not file.is_file():
            continue
        checkpoint = by_digest.get(sha256_file(file))
        if checkpoint is None:
            unknown.append(file.name)
        else:
            added.append(store.add_file(file, checkpoint))
    if not added:
        raise CheckpointError(
            f"no file in {origin} has a sha256 of the catalog"
            + (f" (checked: {', '.join(unknown[:5])})" if unknown else "")
            + "; pass the path of your own model instead of a name, or repo=its folder"
        )
    return added


def _is_path(name: str) -> bool:
    """Return whether a name is a path: it has a checkpoint's suffix, or is a file in a folder."""
    return Path(name).suffix in _SUFFIXES or (Path(name).parent != Path() and Path(name).is_file())


def _open_folder(root: Path, *, trust: bool = False) -> AnyModelRepo:
    single = LocalRepo(root, trust=trust)
    return AnyModelRepo(single, BagOnlyRepo(root, single))


def _describe_registered(name: str) -> ModelInfo:
    """Describe a model registered by another package, without importing that package."""
    return ModelInfo(
        name=name,
        is_bag=False,
        stems=None,
        sample_rate=None,
        segment=None,
        weights=None,
        license=NOT_STATED,
        source=find_package(name) or list_registered_models()[name],
        note=None,
        is_bundled=False,
        files=(),
    )


def _describe_network(network: PublishedNetwork, store: CheckpointStore) -> ModelInfo:
    score = f"{network.score} ({network.score_source})" if network.score else "no score published"
    return ModelInfo(
        name=network.name,
        is_bag=False,
        stems=network.stems,
        sample_rate=None,
        segment=None,
        weights=None,
        license=f"{network.license} (as of {network.as_of})",
        source=network.source,
        note=f"{network.architecture} by {network.author}; {score}; needs the extra 'community'",
        is_bundled=False,
        files=tuple(_describe_file(file, store) for file in network.files),
    )


def _common_value(values: Iterable[_Value | None]) -> _Value | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _describe_file(checkpoint: Checkpoint, store: CheckpointStore) -> FileInfo:
    path = store.path(checkpoint)
    return FileInfo(
        signature=checkpoint.signature,
        file=checkpoint.file,
        sha256=store.digest(checkpoint) or "not published: that of the first download is enforced",
        urls=checkpoint.urls,
        size=path.stat().st_size if path.is_file() else checkpoint.size,
        license=checkpoint.license,
        source=checkpoint.source,
        path=path,
        is_cached=store.has(checkpoint),
    )


def _write_bag(name: str, folder: Path) -> None:
    """Write the bag as a YAML file (in its JSON subset, so that yaml is not imported)."""
    bag = load_catalog().bags[name]
    fields = {"models": bag.models, "weights": bag.weights, "segment": bag.segment}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: value for key, value in fields.items() if value is not None}, indent=1)
    (folder / f"{name}.yaml").write_text(text + "\n", "utf-8")


def _copy_files(paths: list[Path], to: AnyPath | None) -> list[Path]:
    if to is None:
        return paths
    folder = Path(to)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy2(path, folder / path.name)) for path in paths]
    except OSError as error:
        raise ModelLoadingError(f"cannot copy to {folder}: {error.strerror}") from error
