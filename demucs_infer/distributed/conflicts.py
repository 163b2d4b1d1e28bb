"""Find tracks of a manifest whose stems would overwrite each other, or an input.

All rows are checked before the first track is separated. This takes 16 bytes per row, and the same
again for sorting.
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

from demucs_infer.batch.output_paths import OutputPaths, excerpt_suffix, fold_case
from demucs_infer.batch.request import ModelSpec
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.options import Request
from demucs_infer.system.storage import is_remote, join, local_path

_STEM = "{stem}"
_STEMS = ("drums", "bass", "other", "vocals", "guitar", "piano")
_MAX_EXAMPLES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConflicts:
    """Where the stems of each row go below the output folder, and which rows share a path."""

    model_folder: str
    extension: str
    template: str
    excerpt: str = ""
    """Suffix for the names of tracks of which only a part is separated."""

    stems: tuple[str, ...] = _STEMS
    """All stems that the model may have, as it is not loaded yet; few templates need them."""

    shared_path_digests: frozenset[int] = frozenset()
    """Digests of paths that several rows share: the names of those rows get a suffix."""

    @classmethod
    def from_request(cls, model: ModelSpec, request: Request) -> "OutputConflicts":
        """Return the output layout of a request."""
        two_stems = [request.stems.two_stems] if request.stems.two_stems else []
        stems = [*_STEMS, *(request.stems.stems or ()), *two_stems]
        derived = [rule.partition("=")[0].strip() for rule in request.stems.derive]
        return cls(
            model_folder=model.folder,
            extension=request.output.extension,
            template=request.output.template,
            excerpt=excerpt_suffix(request.input.start, request.input.duration),
            stems=tuple(dict.fromkeys([*stems, *(f"no_{stem}" for stem in stems), *derived])),
        )

    def output_paths(self, row: TrackRow, top: Path = Path()) -> OutputPaths:
        """Return the output paths of a row below `top`, with a suffix if it is in conflict."""
        outputs = self._plain_output_paths(row, top)
        if self.shared_path_digests and self.shared_path_digests & {
            _hash(path) for path in self._keys(row)
        }:
            return outputs.with_track_suffix(
                f"~{hashlib.sha256(_encode(row.path)).hexdigest()[:12]}"
            )
        return outputs

    def _plain_output_paths(self, row: TrackRow, top: Path = Path()) -> OutputPaths:
        return OutputPaths(
            folder=top / self.model_folder / row.folder,
            track=row.name,
            extension=self.extension,
            template=self.template,
        ).with_track_suffix(self.excerpt)

    def _keys(self, row: TrackRow) -> list[str]:
        """Return paths for a row; rows with a path in common would write the same file."""
        outputs = self._plain_output_paths(row)
        parts = re.split(r"[/\\]", self.template)
        if any(_STEM in part and "{track" in part for part in parts):
            # `no_b` of track `a` may have the same name as `b` of track `a_no`.
            return [path.as_posix() for path in outputs.stems(self.stems).values()]
        return [outputs.stems([_STEM])[_STEM].as_posix()]

    def find(self, rows: Iterable[TrackRow]) -> tuple[frozenset[int], int]:
        """Return the value for `shared_path_digests`, and the number of rows."""
        keys, sources = array("Q"), array("Q")
        count = 0
        for row in rows:
            count += 1
            source = _hash(_normalize(row.source))
            for key in self._keys(row):
                keys.append(_hash(key))
                sources.append(source)
        by_key = np.lexsort((np.asarray(sources), np.asarray(keys)))
        key_of, source_of = np.asarray(keys)[by_key], np.asarray(sources)[by_key]
        # A file that is listed twice is not in conflict with itself.
        differ = (key_of[1:] == key_of[:-1]) & (source_of[1:] != source_of[:-1])
        return frozenset(np.unique(key_of[1:][differ]).tolist()), count

    def describe(self, rows: Iterable[TrackRow], shared_path_digests: frozenset[int]) -> list[str]:
        """Return one line for each of the first few conflicts, with the paths of its rows."""
        examples = set(sorted(shared_path_digests)[:_MAX_EXAMPLES])
        paths_of: dict[str, list[str]] = {}
        for row in rows:
            for key in self._keys(row):
                if _hash(key) in examples:
                    paths = paths_of.setdefault(key, [])
                    if row.path not in paths and len(paths) < _MAX_EXAMPLES:
                        paths.append(row.path)
        return [f"{' and '.join(paths)} would all become {key}" for key, paths in paths_of.items()]

    def find_overwritten_inputs(self, rows: Iterable[TrackRow], out: str) -> Iterator[str]:
        """Yield the inputs that lie in a folder to which stems may be written."""
        top = _normalize(join(out, self.model_folder)) + "/"
        if not any(path.startswith(top) for row in rows for path in _inputs(row)):
            return
        folders = np.unique(np.asarray(array("Q", (_hash(self._folder(row)) for row in rows))))
        for row in rows:
            for path in _inputs(row):
                parents = PurePosixPath(path.removeprefix(top)).parents
                hashes = [_hash(parent.as_posix()) for parent in parents]
                if path.startswith(top) and np.isin(hashes, folders).any():
                    yield path

    def _folder(self, row: TrackRow) -> str:
        """Return the deepest folder, below the model's, that is the same for all stems."""
        parts = self._plain_output_paths(row).stems([_STEM])[_STEM].parts[1:]
        depth = next(n for n, part in enumerate(parts) if _STEM in part)
        return PurePosixPath(*parts[:depth]).as_posix()


def _inputs(row: TrackRow) -> Iterator[str]:
    """Yield the locations that are read for a row and must not be overwritten."""
    yield _normalize(row.source)
    if row.references:
        yield f"{_normalize(row.references)}/*"


def _normalize(location: str) -> str:
    """Return a text that is the same for all locations of a file; links are resolved."""
    location = location.removeprefix("local://")
    if is_remote(location):
        return location
    path = os.path.normpath(local_path(location))
    try:
        folder = _real_path(os.path.dirname(path))  # noqa: PTH120 (any text, not only valid paths)
    except (OSError, ValueError):
        return fold_case(path)
    return fold_case(Path(folder, os.path.basename(path)).as_posix())  # noqa: PTH119


@lru_cache(maxsize=4096)  # a manifest has fewer folders than tracks
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(_encode(fold_case(text)), digest_size=8).digest(), "big")


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
