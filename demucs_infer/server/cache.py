"""Keep finished stems on disk by the key of their recipe, with limits on size and age."""

import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from demucs_infer.batch.manifest import Recipe, find_match, read_manifest
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.server.schemas import STEM_TEMPLATE
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.folders import remove_folder

MANIFEST = "stems.json"
_VERIFIED_SECONDS = 60.0
_MAX_VERIFIED = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CachedStem:
    """A finished stem file."""

    stem: str
    path: Path
    size: int
    sha256: str


class _FileState(NamedTuple):
    """What differs after a file was written to."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def read(cls, path: Path) -> "_FileState":
        """Return the state of a file."""
        status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class CachedStems:
    """The complete stems of one track."""

    folder: Path
    stems: tuple[CachedStem, ...]
    manifest: dict[str, Any]

    def public_manifest(self) -> dict[str, Any]:
        """Return the manifest without the fields that describe this machine."""
        return {
            name: value for name, value in self.manifest.items() if name not in ("input", "device")
        }


@dataclass(frozen=True, slots=True)
class ResultCache:
    """A folder with one subfolder per entry, named by the key of its recipe."""

    root: Path
    max_bytes: int
    keep_seconds: float
    _verified: dict[str, tuple[float, list[_FileState]]] = field(
        default_factory=dict, init=False, compare=False
    )
    """When the files of a folder were verified, and their states then, by path of the folder."""

    def output_paths(self, name: str, extension: str) -> OutputPaths:
        """Return where to write the stems of the entry `name`."""
        return OutputPaths(
            folder=self.root / name, track="x", extension=extension, template=STEM_TEMPLATE
        )

    def find(self, recipe: Recipe, name: str | None = None) -> CachedStems | None:
        """Return the entry of a recipe after verifying its files; None if there is no valid one."""
        folder = self.root / (name or recipe.key)
        if find_match(folder / MANIFEST, recipe) is None:
            return None
        stems = self.open(folder.name)
        if stems is not None and not self.verify(stems):
            logger.error("entry %s of the result cache is damaged: it will be made again", name)
            self.remove(folder.name)
            return None
        return stems

    def verify(self, stems: CachedStems) -> bool:
        """Return whether the files have the recorded digests, as a failing disk may damage them.

        Files that nothing has changed are read at most once in `_VERIFIED_SECONDS`.
        """
        now, path = time.monotonic(), str(stems.folder)
        try:
            states = [_FileState.read(stem.path) for stem in stems.stems]
        except OSError:  # deleted meanwhile
            return False
        verified_at, verified = self._verified.get(path, (-inf, states))
        if verified_at > now - _VERIFIED_SECONDS and verified == states:
            return True
        if any(sha256_file(stem.path) != stem.sha256 for stem in stems.stems):
            return False
        while len(self._verified) >= _MAX_VERIFIED:
            self._verified.pop(next(iter(self._verified)))
        self._verified[path] = now, states
        return True

    def open(self, name: str) -> CachedStems | None:
        """Return the entry `name` if all its files are complete, and mark it as used now."""
        folder = self.root / name
        manifest = read_manifest(folder / MANIFEST)
        if manifest is None:
            return None
        try:
            files = manifest["stems"].items()
            stems = tuple(
                CachedStem(
                    stem,
                    folder / file["file"],
                    (folder / file["file"]).stat().st_size,
                    str(file["sha256"]),
                )
                for stem, file in files
            )
            if any(stem.size != manifest["stems"][stem.stem]["bytes"] for stem in stems):
                return None
            os.utime(folder)
        except (OSError, KeyError, TypeError):
            return None
        return CachedStems(folder, stems, manifest)

    def remove(self, name: str) -> None:
        """Delete an entry, complete or not."""
        self._verified.pop(str(self.root / name), None)
        remove_folder(self.root / name)

    def evict(
        self,
        in_use: Collection[str],
        kept: Collection[str],
        now: Callable[[], float] = time.time,
    ) -> list[str]:
        """Delete entries that are too old, then the oldest until the rest fits into `max_bytes`.

        Entries in `in_use` are never deleted; those in `kept` are deleted last, and only for lack
        of space. Returns the names of the deleted entries.
        """
        entries = [entry for entry in self._list_entries() if entry[2] not in in_use]
        total, deleted = sum(size for _, size, _ in entries), []
        for used, size, name in sorted(entries, key=lambda entry: (entry[2] in kept, entry[0])):
            is_old = used < now() - self.keep_seconds and name not in kept
            if is_old or total > self.max_bytes:
                self.remove(name)
                total -= size
                deleted.append(name)
        return deleted

    def _list_entries(self) -> list[tuple[float, int, str]]:
        """Return (time of last use, bytes, name) of every entry."""
        entries = []
        for folder in self.root.iterdir():
            try:
                used = folder.stat().st_mtime
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            except OSError:
                continue
            entries.append((used, size, folder.name))
        return entries
