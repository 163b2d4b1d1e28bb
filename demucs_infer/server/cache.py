"""Finished stems by what they were made of: found again, bounded in size and age, never half."""

import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from demucs_infer.batch.manifest import Recipe, matches, read_manifest
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.server.schemas import TEMPLATE

MANIFEST = "stems.json"


@dataclass(frozen=True, slots=True)
class CachedStem:
    """A finished file."""

    stem: str
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class CachedStems:
    """The stems of one track, complete."""

    folder: Path
    stems: tuple[CachedStem, ...]
    about: dict[str, object]
    """The manifest."""

    def public(self) -> dict[str, object]:
        """What the manifest says, apart from what is this machine's alone."""
        return {
            name: value for name, value in self.about.items() if name not in ("input", "device")
        }


@dataclass(frozen=True, slots=True)
class ResultCache:
    """A folder of entries; the folder of one is named by the key of its recipe."""

    root: Path
    max_bytes: int
    keep_seconds: float

    def target(self, name: str, extension: str) -> OutputPaths:
        """Where the stems of the entry `name` are to be written."""
        return OutputPaths(
            folder=self.root / name, track="x", extension=extension, template=TEMPLATE
        )

    def find(self, recipe: Recipe, name: str | None = None) -> CachedStems | None:
        """The entry of a recipe, if every file of it is there."""
        folder = self.root / (name or recipe.key)
        if matches(folder / MANIFEST, recipe) is None:
            return None
        return self.open(folder.name)

    def open(self, name: str) -> CachedStems | None:
        """The entry called `name`, if every file of it is there; it counts as used now."""
        folder = self.root / name
        about = read_manifest(folder / MANIFEST)
        if about is None:
            return None
        try:
            stems = tuple(
                CachedStem(stem, folder / one["file"], (folder / one["file"]).stat().st_size)
                for stem, one in about["stems"].items()
            )
            if any(one.size != about["stems"][one.stem]["bytes"] for one in stems):
                return None
            os.utime(folder)
        except (OSError, KeyError, TypeError):
            return None
        return CachedStems(folder, stems, about)

    def remove(self, name: str) -> None:
        """Forget an entry, or what there is of one."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def tidy(
        self,
        busy: Collection[str],
        promised: Collection[str],
        now: Callable[[], float] = time.time,
    ) -> list[str]:
        """Remove what is too old, and the oldest while there is too much; says what has gone.

        `busy` are entries at work, which stay; `promised` leave for want of room only.
        """
        found = [(used, size, name) for name, used, size in self._all() if name not in busy]
        total, gone = sum(size for _, size, _ in found), []
        for used, size, name in sorted(found, key=lambda one: (one[2] in promised, one[0])):
            is_old = used < now() - self.keep_seconds and name not in promised
            if is_old or total > self.max_bytes:
                self.remove(name)
                total -= size
                gone.append(name)
        return gone

    def _all(self) -> list[tuple[str, float, int]]:
        entries = []
        for folder in self.root.iterdir():
            try:
                used = folder.stat().st_mtime
                size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
            except OSError:
                continue
            entries.append((folder.name, used, size))
        return entries
