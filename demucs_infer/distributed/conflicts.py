"""Which files every row of a catalogue lays claim to, and which rows claim the same ones.

A song that overwrites another one would be lost in silence, so this is found out before any work.
It takes 16 bytes a row, and as much again to sort them.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from demucs_infer.batch.output_paths import OutputPaths, folded
from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.distributed.storage import is_remote, join, local_path

_STEM = "{stem}"
_STEMS = ("drums", "bass", "other", "vocals", "guitar", "piano")
_TOLD = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConflicts:
    """Where the stems of a row lie below an output folder."""

    model_folder: str
    extension: str
    template: str
    stems: tuple[str, ...] = _STEMS
    """Which there may be; they are known when the model is. Only some templates need them."""

    conflicting: frozenset[int] = frozenset()
    """Digests of paths that are claimed by several rows: each of those gets a name of its own."""

    @classmethod
    def of(cls, model: ModelSpec, order: SeparationRequest) -> "OutputConflicts":
        """What the rows of an order claim."""
        asked = [*_STEMS, *(order.stems or ()), *([order.two_stems] if order.two_stems else ())]
        derived = [rule.partition("=")[0].strip() for rule in order.derive]
        return cls(
            model_folder=model.folder,
            extension=order.extension,
            template=order.template,
            stems=tuple(dict.fromkeys([*asked, *(f"no_{stem}" for stem in asked), *derived])),
        )

    def target(self, row: TrackRow, top: Path = Path()) -> OutputPaths:
        """Where they lie below `top`."""
        target = self._target(row, top)
        if self.conflicting and self.conflicting & {_number(path) for path in self._paths(row)}:
            return target.called(f"~{hashlib.sha256(_encoded(row.path)).hexdigest()[:12]}")
        return target

    def _target(self, row: TrackRow, top: Path) -> OutputPaths:
        return OutputPaths(
            folder=top / self.model_folder / row.folder,
            track=row.name,
            extension=self.extension,
            template=self.template,
        )

    def _paths(self, row: TrackRow) -> list[str]:
        """Two rows that have one of these in common would write to the same file."""
        target = self._target(row, Path())
        parts = re.split(r"[/\\]", self.template)
        if any(_STEM in part and "{track" in part for part in parts):
            # The stem stands beside a name: `no_b` of `a` may be `b` of `a_no`.
            return [path.as_posix() for path in target.stems(self.stems).values()]
        return [target.stems([_STEM])[_STEM].as_posix()]

    def find(self, rows: Iterable[TrackRow]) -> tuple[frozenset[int], int]:
        """What `disputed` has to be, and how many rows there are."""
        claimed, sources = array("Q"), array("Q")
        count = 0
        for row in rows:
            count += 1
            source = _number(_source(row))
            for claim in self._paths(row):
                claimed.append(_number(claim))
                sources.append(source)
        by_path = np.lexsort((np.asarray(sources), np.asarray(claimed)))
        path, source_of = np.asarray(claimed)[by_path], np.asarray(sources)[by_path]
        # A row that stands there twice is in nobody's way.
        differ = (path[1:] == path[:-1]) & (source_of[1:] != source_of[:-1])
        return frozenset(np.unique(path[1:][differ]).tolist()), count

    def describe_conflicts(
        self, rows: Iterable[TrackRow], conflicting: frozenset[int]
    ) -> list[str]:
        """Some of the rows that claim one of the `disputed` paths, as people want to know it."""
        told = set(sorted(conflicting)[:_TOLD])
        claimed: dict[str, list[str]] = {}
        for row in rows:
            for path in self._paths(row):
                if _number(path) in told:
                    claimants = claimed.setdefault(path, [])
                    if row.path not in claimants and len(claimants) < _TOLD:
                        claimants.append(row.path)
        return [f"{' and '.join(names)} would all become {path}" for path, names in claimed.items()]

    def overwritten(self, rows: Iterable[TrackRow], out: str) -> Iterator[str]:
        """The inputs that lie where stems of other rows, or of their own, may be written."""
        top = _plain(join(out, self.model_folder)) + "/"
        if not any(place.startswith(top) for row in rows for place in _read(row)):
            return
        folders = np.unique(np.asarray(array("Q", (_number(self._folder(row)) for row in rows))))
        for row in rows:
            for place in _read(row):
                parents = PurePosixPath(place.removeprefix(top)).parents
                known = [_number(parent.as_posix()) for parent in parents]
                if place.startswith(top) and np.isin(known, folders).any():
                    yield place

    def _folder(self, row: TrackRow) -> str:
        """The last folder, seen from the model's, that does not depend on the stem."""
        parts = self._target(row, Path()).stems([_STEM])[_STEM].parts[1:]
        depth = next(n for n, part in enumerate(parts) if _STEM in part)
        return PurePosixPath(*parts[:depth]).as_posix()


def _read(row: TrackRow) -> Iterator[str]:
    """What is read of a row, and must stay as it is."""
    yield _source(row)
    if row.references:
        yield f"{_plain(row.references)}/*"


def _source(row: TrackRow) -> str:
    """Equal for two rows with the same file."""
    return _plain(row.source)


def _plain(place: str) -> str:
    """Equal for two places that are one; of links, those of its folder are followed."""
    place = place.removeprefix("local://")
    if is_remote(place):
        return place
    path = os.path.normpath(local_path(place))
    try:
        folder = _real(os.path.dirname(path))  # noqa: PTH120 (the text, whatever it holds)
    except (OSError, ValueError):
        return folded(path)
    return folded(Path(folder, os.path.basename(path)).as_posix())  # noqa: PTH119


@lru_cache(maxsize=4096)  # a catalogue has fewer folders than tracks
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(_encoded(folded(text)), digest_size=8).digest(), "big")


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
