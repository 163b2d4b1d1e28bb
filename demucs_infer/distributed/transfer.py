"""Brings tracks to where they can be read, and stems to where they belong.

On local and mounted paths there is nothing to carry. From and to URIs it works in a folder of its
own, and keeps beside the stems, where every machine sees it, how often a track killed its worker.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from demucs_infer.batch.attempts import complete, register, withdraw
from demucs_infer.batch.manifest import matches, parse_manifest, sha256_file
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec, SeparationRequest
from demucs_infer.batch.result import Fault, TrackResult, fault_of
from demucs_infer.batch.runner import Skip, TrackJob
from demucs_infer.batch.workdir import PARTIAL
from demucs_infer.distributed import storage
from demucs_infer.distributed.conflicts import OutputConflicts
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.distributed.storage import is_remote, join
from demucs_infer.errors import AudioReadError, DemucsError
from demucs_infer.metrics import evaluate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StagedTrack:
    """A row on its way, with a job for the batch."""

    row: TrackRow
    job: TrackJob | None = None
    """None: the row's worker died before, and nothing was done about it yet."""

    scratch: Path | None = None

    def leave(self) -> None:
        """Nothing is needed of it any more."""
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Between the manifest's world and the batch's."""

    model: ModelSpec
    order: SeparationRequest
    weights: tuple[str, ...]
    out: str
    skip: Skip = "same"
    max_crashes: int = 2
    run_id: str = ""
    """As `BatchRunner` takes it."""

    conflicting: frozenset[int] = frozenset()
    """As `OutputConflicts` has it."""

    is_far: bool = field(init=False)
    """Whether stems go where only fsspec can write."""

    claims: OutputConflicts = field(init=False)

    def __post_init__(self) -> None:
        claims = replace(OutputConflicts.of(self.model, self.order), conflicting=self.conflicting)
        object.__setattr__(self, "is_far", is_remote(self.out))
        object.__setattr__(self, "claims", claims)

    def bring(self, row: TrackRow, *, is_alone: bool = False) -> StagedTrack:
        """The row as a job, which may be over before it began; never an exception."""
        source, scratch, known = Path(row.name), None, None
        try:
            if not row.is_possible:
                raise AudioReadError("no file can be called that")
            if self.is_far and not is_alone and self._deaths(row):
                return StagedTrack(row=row)
            known = self._known(row)
            if known is None:
                if self.is_far or is_remote(row.source):
                    scratch = Path(tempfile.mkdtemp(prefix="demucs-infer-"))
                source = self._source(row, scratch)
                if self.is_far:
                    known = self._done_far(row, _digest(source)) or self._begun(row)
        except Exception as error:
            logger.debug("%s was not brought", row.path, exc_info=error)
            known = failed(row, self.model, str(error), fault_of(error))
        target = self._target(row, scratch)
        job = TrackJob(source=source, target=target, track=row.path, known=known, sha256=row.sha256)
        return StagedTrack(row=row, job=job, scratch=scratch)

    def _source(self, row: TrackRow, scratch: Path | None) -> Path:
        if not is_remote(row.source) or scratch is None:
            return storage.local_path(row.source)
        path = scratch / "input" / Path(row.name).name
        path.parent.mkdir()
        try:
            storage.download(row.source, path)
        except OSError as error:
            raise AudioReadError(f"cannot be fetched: {error}") from error
        return path

    def _target(self, row: TrackRow, scratch: Path | None = None) -> OutputPaths:
        """Where the stems go; with no scratch folder, seen from a far output folder."""
        top = Path() if self.is_far else storage.local_path(self.out)
        return self.claims.target(row, scratch / "stems" if self.is_far and scratch else top)

    def _place(self, path: Path) -> str:
        """Of a file below the output folder, as people outside know it."""
        return join(self.out, path.as_posix()) if self.is_far else str(path)

    # ── what was done before ──

    def _known(self, row: TrackRow) -> TrackResult | None:
        """The result of a track whose digest the manifest tells: it need not be read."""
        if self.skip != "same" or row.sha256 is None:
            return None
        if self.is_far:
            return self._done_far(row, row.sha256)
        where = self._target(row).manifest
        found = matches(where, self.order.recipe(row.sha256, self.model, self.weights))
        return TrackResult.skipped(row.path, where, found) if found else None

    def _done_far(self, row: TrackRow, sha256: str) -> TrackResult | None:
        """As `manifest.matches`, at a URI."""
        target = self._target(row)
        if self.skip != "same":
            return None
        recipe = self.order.recipe(sha256, self.model, self.weights)
        with suppress(
            ValueError, KeyError, TypeError, AttributeError
        ):  # none of ours, or half of it
            found = parse_manifest(
                json.loads(storage.read_text(self._place(target.manifest)) or "{}")
            )
            if not found or found["key"] != recipe.key:
                return None
            for stem in found["stems"].values():
                place = self._place(target.manifest.parent / stem["file"])
                if storage.file_size(place) != stem["bytes"]:
                    return None
            return TrackResult.skipped(row.path, target.manifest, found)
        return None

    # ── the journal, where a machine that died cannot take it along ──

    def _journal(self, row: TrackRow) -> str:
        path = self._target(row).manifest.as_posix()
        name = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]
        return join(self.out, f"{self.model.folder}/{PARTIAL}/{name}")

    def _deaths(self, row: TrackRow) -> int:
        """Return how many crashes count; those of other runs do not if this one has an id."""
        count, _, run_id = (storage.read_text(self._journal(row)) or "").partition(" ")
        is_other_run = bool(self.run_id) and run_id != self.run_id
        return int(count) if count.isdigit() and not is_other_run else 0

    def _begun(self, row: TrackRow) -> TrackResult | None:
        """Enter an attempt, unless there were too many."""
        journal, crash_count = self._journal(row), self._deaths(row)
        if crash_count >= self.max_crashes:
            times = f"{crash_count} times" if crash_count > 1 else "once"
            error = f"its process crashed {times}; to try it again, remove {journal}"
            return replace(failed(row, self.model, error, "other"), status="quarantined")
        storage.write_text(journal, f"{crash_count + 1} {self.run_id}".rstrip())
        take_back = partial(storage.write_text, journal, f"{crash_count} {self.run_id}".rstrip())
        register(
            (self.out, row.path), take_back if crash_count else partial(storage.remove, journal)
        )
        return None

    def interrupt(self, visit: StagedTrack) -> None:
        """Its separation was given up, and that is not its fault."""
        withdraw((self.out, visit.row.path))
        visit.leave()

    # ── afterwards ──

    def scores(self, visit: StagedTrack, result: TrackResult) -> Mapping[str, float]:
        """SDR in decibels of every stem whose truth is known: `vocals` -> 7.1.

        They are kept beside the stems: what is asked again of the same files is not measured again.
        """
        row = visit.row
        if not row.references or not result.ok:
            return {}
        kept = self._place(self._target(row).scores)
        asked = {"key": result.key, "references": storage.fingerprint(row.references)}
        # What cannot be understood is made anew.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(storage.read_text(kept) or "{}")
            if found.get("of") == asked:
                return {str(stem): float(score) for stem, score in found["scores"].items()}
        try:
            scores = self._measured(row.references, visit, result)
        except (DemucsError, OSError, ValueError) as error:
            raise DemucsError(f"cannot be scored: {error}") from error
        storage.write_text(kept, json.dumps({"of": asked, "scores": scores}, indent=1) + "\n")
        return scores

    def _measured(
        self, references: str, visit: StagedTrack, result: TrackResult
    ) -> Mapping[str, float]:
        assert visit.job
        with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
            truth, stems = storage.local_path(references), Path(folder, "stems")
            stems.mkdir()
            if is_remote(references):
                truth = Path(folder, "references")
                storage.download(references, truth)
            # Only what this track has now, whatever lies beside it.
            for stem, path in result.stems.items():
                copy = stems / f"{stem}{path.suffix}"
                if self.is_far and visit.job.known:  # they were made by an earlier run
                    storage.download(self._place(path), copy)
                else:
                    _link(path.absolute(), copy)
            rows = [score.rounded() for score in evaluate(truth, stems).scores]
        return {str(one["stem"]): float(one["sdr"]) for one in rows if one["sdr"] is not None}

    def deliver(self, visit: StagedTrack, result: TrackResult) -> TrackResult:
        """Put the stems where they belong, the manifest last; says where that is."""
        if not self.is_far or visit.job is None or visit.job.known or visit.scratch is None:
            return result
        top = visit.scratch / "stems"
        if result.ok and result.manifest:
            manifest = result.manifest.relative_to(top)
            stems = {stem: path.relative_to(top) for stem, path in result.stems.items()}
            storage.remove(self._place(manifest))
            for path in stems.values():
                storage.upload(top / path, self._place(path))
            storage.upload(top / manifest, self._place(manifest))
            result = replace(result, stems=stems, manifest=manifest)
        complete((self.out, visit.row.path))
        storage.remove(self._journal(visit.row))
        return result

    def named(self, result: TrackResult) -> Mapping[str, object]:
        """Where stems and manifest are, as people outside know it."""
        if not self.is_far:
            return {}
        return {
            "stems": {stem: self._place(path) for stem, path in result.stems.items()},
            "manifest": self._place(result.manifest) if result.manifest else None,
        }


def _link(path: Path, name: Path) -> None:
    try:
        name.symlink_to(path)
    except OSError:  # not everybody may
        shutil.copyfile(path, name)


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise AudioReadError(f"cannot be read: {error.strerror or error}") from error


def failed(row: TrackRow, model: ModelSpec, error: str, fault: Fault) -> TrackResult:
    """The result of a row that came to nothing."""
    return TrackResult(track=row.path, status="failed", model=model.name, error=error, fault=fault)
