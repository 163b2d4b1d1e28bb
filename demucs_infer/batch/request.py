"""Specify the model of a run, and everything that determines its stems, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from demucs_infer import __version__
from demucs_infer.batch.manifest import Recipe
from demucs_infer.batch.output_paths import model_folder
from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import load_catalog, split_bag
from demucs_infer.custom.registry import find_package
from demucs_infer.errors import DownloadError
from demucs_infer.options import Request
from demucs_infer.repo import BagOnlyRepo, HubRepo, LocalRepo
from demucs_infer.system.checksum import sha256_file


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model, and where to load it from."""

    name: str = "htdemucs"
    repo: Path | None = None
    cache_dir: Path | None = None
    offline: bool | None = None
    trust: bool = False

    @property
    def folder(self) -> str:
        """The name of its output subfolder."""
        return model_folder(self.name)

    @property
    def is_remote(self) -> bool:
        """Whether the model must be downloaded before its first use, unlike local files."""
        return self.repo is None and any(
            load_catalog().has(part) or part.startswith("hf://") for part, _ in split_bag(self.name)
        )

    def fill_settings(self, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the settings of a request, and for the others those that the model has."""
        return dict(settings)

    def weights(self) -> tuple[str, ...] | None:
        """Return the sha256 of each file of the model; None if some have not been downloaded.

        A model of another package is identified by the name and version of the package.
        """
        parts = split_bag(self.name)
        if len(parts) > 1:
            weights = [replace(self, name=part).weights() for part, _ in parts]
            return None if None in weights else tuple(sum(filter(None, weights), start=()))
        if self.repo is not None:
            return self._local_weights(self.repo)
        if self.name.startswith("hf://"):
            return self._hub_weights()
        if load_catalog().has(self.name):
            return tuple(file.sha256 for file in load_catalog().files(self.name))
        path = Path(self.name)
        if path.is_file():
            return (sha256_file(path),)
        package = find_package(self.name)
        return None if package is None else (package,)

    def _local_weights(self, repo: Path) -> tuple[str, ...] | None:
        single = LocalRepo(repo)
        bags = BagOnlyRepo(repo, single)
        files = single.list_model()
        if self.name in files:
            return tuple(map(sha256_file, single.files_of(self.name)))
        if not bags.has_model(self.name):
            return None
        paths = [Path(bags.list_model()[self.name])]
        members = [name for name in bags.bag(self.name).models if name in files]
        paths += [path for name in members for path in single.files_of(name)]
        return tuple(map(sha256_file, paths))

    def _hub_weights(self) -> tuple[str, ...] | None:
        try:
            files = HubRepo(
                self.name, CheckpointStore.from_environment(self.cache_dir, offline=True)
            ).fetch()
        except DownloadError:
            return None
        return tuple(map(sha256_file, files))


def make_recipe(
    request: Request, input_sha256: str, model: ModelSpec, weights: tuple[str, ...]
) -> Recipe:
    """Return the recipe of a track: everything that determines the bytes of its stems."""
    return Recipe(
        input_sha256=input_sha256,
        model=model.name,
        weights=weights,
        settings=request.stem_settings(),
        versions=versions(),
    )


@lru_cache(maxsize=1)  # called for every track, and reads files
def versions() -> dict[str, str]:
    """Return the versions of this package and of torch, without importing torch."""
    return {"demucs-infer": __version__, "torch": metadata.version("torch")}
