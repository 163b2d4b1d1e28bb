"""What is asked of every track of a run, known to be possible before torch is imported."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from demucs_infer import __version__
from demucs_infer.audio.filenames import valid_template
from demucs_infer.audio.formats import FORMATS, RATES, Encoding
from demucs_infer.batch.manifest import Recipe
from demucs_infer.batch.output_paths import DEFAULT_TEMPLATE, model_folder
from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.custom.registry import find_package
from demucs_infer.errors import DownloadError
from demucs_infer.options import Options
from demucs_infer.repo import BagOnlyRepo, HubRepo, LocalRepo
from demucs_infer.system.checksum import sha256_file

Clip = Literal["track", "rescale", "clamp", "tanh", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model, and where it comes from."""

    name: str = "htdemucs"
    repo: Path | None = None
    cache_dir: Path | None = None
    offline: bool | None = None
    trust: bool = False

    @property
    def folder(self) -> str:
        """Its folder below the output folder."""
        return model_folder(self.name)

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched, unless it was before; not so a folder's or a file's."""
        is_known = self.name in {*load_catalog().bags, *load_catalog().checkpoints}
        return self.repo is None and (is_known or self.name.startswith("hf://"))

    def weights(self) -> tuple[str, ...] | None:
        """The sha256 of every file that makes the model; None if some are not here yet.

        A model of another package stands for itself, by the version of that.
        """
        if self.repo is not None:
            return self._local_weights(self.repo)
        if self.name.startswith("hf://"):
            return self._hub_weights()
        if self.name in {*load_catalog().bags, *load_catalog().checkpoints}:
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
            return (sha256_file(Path(files[self.name])),)
        if not bags.has_model(self.name):
            return None
        paths = [Path(bags.list_model()[self.name])]
        paths += [Path(files[name]) for name in bags.bag(self.name).models if name in files]
        return tuple(map(sha256_file, paths))

    def _hub_weights(self) -> tuple[str, ...] | None:
        try:
            files = HubRepo(
                self.name, CheckpointStore.from_environment(self.cache_dir, offline=True)
            ).fetch()
        except DownloadError:
            return None
        return tuple(map(sha256_file, files))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparationRequest:
    """Everything that decides the samples of the stems, apart from the track and the model."""

    shifts: int = 1
    overlap: float = 0.25
    split: bool = True
    segment: float | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    batch_size: int | Literal["auto"] = "auto"
    stems: tuple[str, ...] | None = None
    derive: tuple[str, ...] = ()
    two_stems: str | None = None
    other_method: Literal["add", "minus", "none"] = "add"
    start: float = 0.0
    duration: float | None = None
    strict: bool = False
    format: str = "wav"
    bits: int | Literal["source"] | None = None
    bitrate: int | None = None
    preset: int | None = None
    rate: int | Literal["model", "source"] = "model"
    channels: int | Literal["model", "source"] = "model"
    clip: Clip = "track"
    tags: bool = True
    template: str = DEFAULT_TEMPLATE
    options: Options = field(init=False)
    """The part that the engine knows."""

    def __post_init__(self) -> None:
        options = Options(
            shifts=self.shifts,
            overlap=self.overlap,
            split=self.split,
            segment_seconds=self.segment,
            seed=self.seed,
            # What "auto" is on a device is known when the device is.
            precision="fp32" if self.precision == "auto" else self.precision,
            batch_size=self.batch_size,
        )
        object.__setattr__(self, "options", options)
        self.encoding(16)
        valid_template(self.template)
        for name in ("rate", "channels"):
            value = getattr(self, name)
            if value not in ("model", "source") and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name} = {value!r} must be 'source', 'model' or a number")
        if isinstance(self.rate, int) and self.rate not in RATES:
            raise ValueError(f"rate = {self.rate} must be {RATES[0]} to {RATES[-1]} Hz")

    def encoding(self, source_bits: int | None) -> Encoding:
        """How to encode a track whose own depth, where `bits="source"` asks for it, is known."""
        bits = source_bits if self.bits == "source" else self.bits
        is_lossy = self.format in FORMATS and FORMATS[self.format].is_lossy
        return Encoding(
            self.format,
            bits=None if is_lossy else bits,
            bitrate=self.bitrate,
            preset=self.preset,
        )

    @property
    def extension(self) -> str:
        """Of the files, without the dot."""
        return FORMATS[self.format].suffixes[0].removeprefix(".")

    def recipe(self, input_sha256: str, model: ModelSpec, weights: tuple[str, ...]) -> Recipe:
        """What decides the bytes of the stems of one track."""
        return Recipe(
            input_sha256=input_sha256,
            model=model.name,
            weights=weights,
            settings=self.settings(),
            versions=versions(),
        )

    def settings(self) -> Mapping[str, Any]:
        """Every parameter by its name."""
        settings = asdict(self)
        del settings["options"]  # the same once more
        return settings


@lru_cache(maxsize=1)  # a catalogue asks for every track, and it means reading files
def versions() -> dict[str, str]:
    """Of what computes the samples; asked of the installation, so that torch stays unloaded."""
    return {"demucs-infer": __version__, "torch": metadata.version("torch")}
