"""Read and write `stems.json`: the input, model and settings that a track's stems were made with.

This file, the manifest, is in the folder of the stems and is written last: stems without a manifest
are incomplete. A track whose manifest matches the current input, model and settings is skipped.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from demucs_infer.system.boot import is_from_before_start
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.durability import make_folder, rename_file, sync_file

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that determines the bytes of the stems: equal recipes give equal stems."""

    input_sha256: str
    model: str
    weights: tuple[str, ...]
    """The sha256 of every member's weights."""

    settings: Mapping[str, Any]
    """Settings by name, as JSON values."""

    versions: Mapping[str, str]
    """Versions of this package and of torch."""

    @property
    def key(self) -> str:
        """A digest of the recipe: the same on every machine."""
        text = json.dumps(_to_json_value(asdict(self)), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stem:
    """A complete file of a stem."""

    file: str
    """Path relative to the manifest."""

    bytes: int
    sha256: str
    gain: float = 1.0
    """Factor that prevented clipping."""

    @classmethod
    def from_file(cls, path: Path, name: str, gain: float) -> "Stem":
        """Describe a complete file at `path`, whose final name will be `name`."""
        size, digest = path.stat().st_size, sha256_file(path)
        return cls(file=name, bytes=size, sha256=digest, gain=gain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `stems.json`."""

    input: str
    recipe: Recipe
    stems: Mapping[str, Stem]
    sample_rate: int
    channels: int
    duration_seconds: float
    gain: float
    """The smallest gain of a stem."""

    device: str = ""
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    """Processing time of this run, without that of an interrupted run that it resumed."""

    resumed_seconds: float = 0.0
    """Seconds of audio that an interrupted run had separated before."""

    def to_json(self) -> str:
        """Return the text of the file."""
        values = {"schema": SCHEMA, "key": self.recipe.key, **_to_json_value(asdict(self))}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path, temp_folder: Path) -> None:
        """Write the file atomically, so that it survives a power loss.

        It is first written to `temp_folder`, and then renamed.
        """
        temporary = temp_folder / "manifest"
        # Names that are not UTF-8 are written as JSON escapes.
        with temporary.open("wb") as file:
            file.write(self.to_json().encode(errors="backslashreplace"))
            sync_file(file)
        make_folder(path.parent)
        rename_file(temporary, path)


def _to_json_value(value: Any) -> Any:
    """Convert a value to what JSON can represent: tuples to lists, keys and other types to text."""
    return json.loads(json.dumps(value, default=str))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest at `path`; None if it is missing or invalid."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return parse_manifest(value)


def parse_manifest(value: Any) -> dict[str, Any] | None:
    """Return the parsed JSON if it is a manifest of this schema, otherwise None."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return None
    return value if {field.name for field in fields(Manifest)} <= value.keys() else None


def find_match(path: Path, recipe: Recipe, *, verify: bool = False) -> dict[str, Any] | None:
    """Return the manifest at `path` if it matches `recipe` and all its files are intact, or None.

    Files must have the recorded sizes; with `verify`, also the recorded digests. Files from before
    the last start of the machine are always compared by digest, as the power may have failed.
    """
    manifest = read_manifest(path)
    if manifest is None or manifest.get("key") != recipe.key:
        return None
    try:
        stems = list_files(path, manifest)
        is_complete = all(is_intact(file, stem, verify=verify) for file, stem in stems.items())
    except (OSError, KeyError, TypeError, AttributeError):
        return None
    return manifest if is_complete else None


def list_files(path: Path, manifest: Mapping[str, Any]) -> dict[Path, Mapping[str, Any]]:
    """Return the path of each file in the manifest at `path`, and its entry there."""
    return {path.parent / stem["file"]: stem for stem in manifest["stems"].values()}


def is_intact(file: Path, stem: Mapping[str, Any], *, verify: bool) -> bool:
    """Return whether a file has the size in its entry, and the digest if it is to be compared."""
    status = file.stat()
    if status.st_size != stem["bytes"]:
        return False
    is_doubtful = verify or is_from_before_start(status.st_mtime)
    return not is_doubtful or sha256_file(file) == stem["sha256"]
