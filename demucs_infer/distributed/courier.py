"""Brings tracks to where they can be read, and stems to where they belong.

On local and mounted paths there is nothing to carry. From and to URIs it works in a folder of its
own, and keeps beside the stems, where every machine sees it, how often a track killed its worker.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from demucs_infer.batch.manifest import SCHEMA, matches, sha256_file
from demucs_infer.batch.orders import Model, Order
from demucs_infer.batch.results import Fault, Result
from demucs_infer.batch.run import Job, Skip
from demucs_infer.batch.targets import Target
from demucs_infer.batch.workplace import PARTIAL
from demucs_infer.distributed import places
from demucs_infer.distributed.places import is_remote, joined
from demucs_infer.distributed.rows import Row
from demucs_infer.errors import DemucsError
from demucs_infer.metrics import evaluate


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Visit:
    """A row on its way: with a job for the batch, or over before it began."""

    row: Row
    job: Job | None = None
    result: Result | None = None
    scratch: Path | None = None
    is_suspect: bool = False
    """Its worker died before; nothing was done about it yet."""

    def leave(self) -> None:
        """Nothing is needed of it any more."""
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Courier:
    """Between the manifest's world and the batch's."""

    model: Model
    order: Order
    weights: tuple[str, ...]
    out: str
    skip: Skip = "same"
    max_deaths: int = 2
    is_far: bool = field(init=False)
    """Whether stems go where only fsspec can write."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_far", is_remote(self.out))

    def bring(self, row: Row, *, is_alone: bool = False) -> Visit:
        """The row as a job; never an exception."""
        scratch: Path | None = None
        try:
            if self.is_far and not is_alone and self._deaths(row):
                return Visit(row=row, is_suspect=True)
            known = self._known(row)
            if known:
                return Visit(row=row, result=known)
            if self.is_far or is_remote(row.source):
                scratch = Path(tempfile.mkdtemp(prefix="demucs-infer-"))
            job = Job(
                source=self._source(row, scratch),
                target=self._target(row, scratch),
                track=row.path,
            )
            if self.is_far:
                found = self._done_far(row, sha256_file(job.source)) or self._begun(row)
                if found:
                    return Visit(row=row, result=found, scratch=scratch)
            return Visit(row=row, job=job, scratch=scratch)
        except Exception as error:  # noqa: BLE001 (a row is never an exception)
            is_input = isinstance(error, OSError) and is_remote(row.source)
            result = failed(
                row, self.model, f"cannot be fetched: {error}", "input" if is_input else "other"
            )
            return Visit(row=row, result=result, scratch=scratch)

    def _source(self, row: Row, scratch: Path | None) -> Path:
        if not is_remote(row.source) or scratch is None:
            return places.local(row.source)
        path = scratch / "input" / Path(row.name).name
        path.parent.mkdir()
        places.fetch(row.source, path)
        return path

    def _target(self, row: Row, scratch: Path | None = None) -> Target:
        """Where the stems go; with no scratch folder, seen from a far output folder."""
        top = Path() if self.is_far else places.local(self.out)
        if self.is_far and scratch:
            top = scratch / "stems"
        return Target(
            folder=top / self.model.folder / row.folder,
            track=row.name,
            extension=self.order.extension,
            template=self.order.template,
        )

    # ── what was done before ──

    def _known(self, row: Row) -> Result | None:
        """The result of a track whose digest the manifest tells: it need not be read."""
        if self.skip != "same" or row.sha256 is None:
            return None
        if self.is_far:
            return self._done_far(row, row.sha256)
        where = self._target(row).manifest
        found = matches(where, self.order.recipe(row.sha256, self.model, self.weights))
        return Result.skipped(row.path, where, found) if found else None

    def _done_far(self, row: Row, sha256: str) -> Result | None:
        """As `manifest.matches`, at a URI."""
        target = self._target(row)
        text = places.read(self._far(target.manifest)) if self.skip == "same" else None
        found = json.loads(text) if text else {}
        key = self.order.recipe(sha256, self.model, self.weights).key
        if found.get("schema") != SCHEMA or found.get("key") != key:
            return None
        folder = target.manifest.parent
        for stem in found["stems"].values():
            if places.size(self._far(folder / stem["file"])) != stem["bytes"]:
                return None
        return Result.skipped(row.path, target.manifest, found)

    # ── the journal, where a machine that died cannot take it along ──

    def _journal(self, row: Row) -> str:
        path = self._target(row).manifest.as_posix()
        name = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]
        return joined(self.out, f"{self.model.folder}/{PARTIAL}/{name}")

    def _deaths(self, row: Row) -> int:
        text = places.read(self._journal(row))
        return int(text) if text and text.isdigit() else 0

    def _begun(self, row: Row) -> Result | None:
        """Enter an attempt, unless there were too many."""
        deaths = self._deaths(row)
        if deaths >= self.max_deaths:
            result = failed(row, self.model, f"its process died {deaths} times", "other")
            return replace(result, status="quarantined")
        places.write(self._journal(row), str(deaths + 1))
        return None

    # ── afterwards ──

    def scores(self, visit: Visit) -> Mapping[str, float]:
        """SDR in decibels of every stem whose truth is known: `vocals` -> 7.1."""
        row, job = visit.row, visit.job
        if not row.references or job is None:
            return {}
        truth = places.local(row.references)
        try:
            if is_remote(row.references):
                truth = Path(tempfile.mkdtemp(prefix="references-", dir=visit.scratch))
                places.fetch(row.references, truth)
            found = evaluate(truth, job.target.manifest.parent)
            rows = [score.rounded() for score in found.scores]
        except (DemucsError, OSError) as error:
            raise DemucsError(f"cannot be scored: {error}") from error
        return {str(one["stem"]): float(one["sdr"]) for one in rows if one["sdr"] is not None}

    def deliver(self, visit: Visit, result: Result) -> Result:
        """Put the stems where they belong, the manifest last; says where that is."""
        if not self.is_far or visit.job is None or visit.scratch is None:
            return result
        top = visit.scratch / "stems"
        if result.is_good and result.manifest:
            manifest = result.manifest.relative_to(top)
            stems = {stem: path.relative_to(top) for stem, path in result.stems.items()}
            places.remove(self._far(manifest))
            for path in stems.values():
                places.put(top / path, self._far(path))
            places.put(top / manifest, self._far(manifest))
            result = replace(result, stems=stems, manifest=manifest)
        places.remove(self._journal(visit.row))
        return result

    def named(self, result: Result) -> Mapping[str, object]:
        """Where stems and manifest are, as people outside know it."""
        if not self.is_far:
            return {}
        return {
            "stems": {stem: self._far(path) for stem, path in result.stems.items()},
            "manifest": self._far(result.manifest) if result.manifest else None,
        }

    def _far(self, path: Path) -> str:
        return joined(self.out, path.as_posix())


def failed(row: Row, model: Model, error: str, fault: Fault) -> Result:
    """The result of a row that came to nothing."""
    return Result(track=row.path, status="failed", model=model.name, error=error, fault=fault)
