"""Which files every row of a catalogue lays claim to, and which rows claim the same ones.

A song that overwrites another one would be lost in silence, so this is found out before any work.
It takes 16 bytes a row, and as much again to sort them.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from demucs_infer.batch.orders import Model, Order
from demucs_infer.batch.targets import Target, folded
from demucs_infer.distributed.places import is_remote, joined, local
from demucs_infer.distributed.rows import Row

_STEM = "{stem}"  # which stems there are is known when the model is
_TOLD = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """Where the stems of a row lie below an output folder."""

    model_folder: str
    extension: str
    template: str
    disputed: frozenset[int] = frozenset()
    """Digests of paths that are claimed by several rows: each of those gets a name of its own."""

    @classmethod
    def of(cls, model: Model, order: Order) -> "Claims":
        """What the rows of an order claim."""
        return cls(model_folder=model.folder, extension=order.extension, template=order.template)

    def target(self, row: Row, top: Path = Path()) -> Target:
        """Where they lie below `top`."""
        if self.disputed and _number(self._path(row)) in self.disputed:
            addition = f"~{hashlib.sha256(_encoded(row.path)).hexdigest()[:12]}"
            return self._target(row, top).called(addition)
        return self._target(row, top)

    def _target(self, row: Row, top: Path) -> Target:
        return Target(
            folder=top / self.model_folder / row.folder,
            track=row.name,
            extension=self.extension,
            template=self.template,
        )

    def _path(self, row: Row) -> str:
        """Equal for two rows with the same files."""
        return self._target(row, Path()).stems([_STEM])[_STEM].as_posix()

    def disputes(self, rows: Iterable[Row]) -> tuple[frozenset[int], int]:
        """What `disputed` has to be, and how many rows there are."""
        paths, sources = array("Q"), array("Q")
        for row in rows:
            paths.append(_number(self._path(row)))
            sources.append(_number(_source(row)))
        by_path = np.lexsort((np.asarray(sources), np.asarray(paths)))
        path, source = np.asarray(paths)[by_path], np.asarray(sources)[by_path]
        # A row that stands there twice is in nobody's way.
        differ = (path[1:] == path[:-1]) & (source[1:] != source[:-1])
        return frozenset(np.unique(path[1:][differ]).tolist()), len(paths)

    def quarrels(self, rows: Iterable[Row], disputed: frozenset[int]) -> list[str]:
        """Some of the rows that claim one of the `disputed` paths, as people want to know it."""
        claimed: dict[str, list[str]] = {}
        for row in rows:
            path = self._path(row)
            if _number(path) in disputed:
                claimants = claimed.setdefault(path, [])
                if row.path not in claimants and len(claimants) < _TOLD:
                    claimants.append(row.path)
            if len(claimed) > _TOLD:
                break
        several = [(" and ".join(names), path) for path, names in claimed.items() if len(names) > 1]
        return [f"{names} would all become {path}" for names, path in several]

    def overwritten(self, rows: Iterable[Row], out: str) -> Iterator[str]:
        """The inputs that lie where stems of other rows, or of their own, may be written."""
        top = _plain(joined(out, self.model_folder)) + "/"
        if not any(_source(row).startswith(top) for row in rows):
            return
        folders = np.unique(np.asarray(array("Q", (_number(self._folder(row)) for row in rows))))
        for row in rows:
            if _source(row).startswith(top):
                parents = PurePosixPath(_source(row).removeprefix(top)).parents
                if np.isin([_number(parent.as_posix()) for parent in parents], folders).any():
                    yield row.path

    def _folder(self, row: Row) -> str:
        """The last folder, seen from the model's, that does not depend on the stem."""
        parts = self._target(row, Path()).stems([_STEM])[_STEM].parts[1:]
        depth = next(n for n, part in enumerate(parts) if _STEM in part)
        return PurePosixPath(*parts[:depth]).as_posix()


def _source(row: Row) -> str:
    """Equal for two rows with the same file."""
    return _plain(row.source)


def _plain(place: str) -> str:
    if is_remote(place):
        return place
    return folded(Path(os.path.normpath(local(place))).as_posix())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(_encoded(folded(text)), digest_size=8).digest(), "big")


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
