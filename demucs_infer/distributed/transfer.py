"""Download remote inputs and upload stems.

Local and mounted files are used in place. A remote track is downloaded to a scratch folder. The
number of its crashes is stored in the output folder, where every machine can read it.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from demucs_infer.batch.attempts import AttemptRecord, complete, register, withdraw
from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.manifest import find_match, parse_manifest
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec, make_recipe
from demucs_infer.batch.result import Fault, TrackResult, fault_of
from demucs_infer.batch.workdir import PARTIAL
from demucs_infer.checkpoints.cache import cache_folder
from demucs_infer.distributed.config import WorkerConfig
from demucs_infer.distributed.conflicts import OutputConflicts
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.errors import AudioReadError, DemucsError
from demucs_infer.metrics import evaluate
from demucs_infer.system import storage
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.folders import remove_folder
from demucs_infer.system.storage import is_remote, join

logger = logging.getLogger(__name__)

_UNREADABLE_JSON = (ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StagedTrack:
    """A manifest row whose input is local, with its job for the batch."""

    row: TrackRow
    job: TrackJob | None = None
    """None if this track has crashed a worker before, and is to be processed after the others."""

    scratch: Path | None = None

    def remove_scratch(self) -> None:
        """Remove the downloaded and the uploaded files."""
        if self.scratch:
            remove_folder(self.scratch)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Turns manifest rows into jobs with local files, and uploads their results."""

    config: WorkerConfig
    weights: tuple[str, ...]
    """The digests from `ModelSpec.weights`."""

    @cached_property
    def is_remote_output(self) -> bool:
        """Whether stems are uploaded."""
        return is_remote(self.config.out)

    @cached_property
    def _outputs(self) -> OutputConflicts:
        outputs = OutputConflicts.from_request(self.config.model, self.config.request)
        return replace(outputs, shared_path_digests=self.config.shared_path_digests)

    def download(self, row: TrackRow, *, is_alone: bool = False) -> StagedTrack:
        """Download a track, and return it with its job; errors become the result of the job.

        A track that has crashed a worker before gets a job only with `is_alone`.
        """
        source, scratch, result = Path(row.name), None, None
        try:
            if not row.is_valid_path:
                raise AudioReadError("the path is not valid on this file system")
            if self.is_remote_output and not is_alone and storage.read_text(self._journal(row)):
                return StagedTrack(row=row)
            result = self._find_done(row)
            if result is None:
                if self.is_remote_output or is_remote(row.source):
                    scratch = Path(tempfile.mkdtemp(prefix="demucs-infer-"))
                source = self._download_source(row, scratch)
                if self.is_remote_output:
                    result = self._find_done_remote(row, _hash_file(source))
                    result = result or self._register_attempt(row)
        except Exception as error:
            logger.debug("%s could not be staged", row.path, exc_info=error)
            result = failure(row, self.config.model, str(error), fault_of(error))
        outputs = self._output_paths(row, scratch)
        job = TrackJob(
            source=source,
            target=outputs,
            track=row.path,
            result=result,
            sha256=row.sha256,
            is_temporary=is_remote(row.source),
        )
        return StagedTrack(row=row, job=job, scratch=scratch)

    def _download_source(self, row: TrackRow, scratch: Path | None) -> Path:
        if not is_remote(row.source) or scratch is None:
            return storage.local_path(row.source)
        path = scratch / "input" / Path(row.name).name
        path.parent.mkdir()
        try:
            storage.download(row.source, path)
        except OSError as error:
            raise AudioReadError(f"cannot be downloaded: {error}") from error
        return path

    def _output_paths(self, row: TrackRow, scratch: Path | None = None) -> OutputPaths:
        """Return local output paths; of remote output without `scratch`, relative paths."""
        if not self.is_remote_output:
            return self._outputs.output_paths(row, storage.local_path(self.config.out))
        return self._outputs.output_paths(row, scratch / "stems" if scratch else Path())

    def _location(self, path: Path) -> str:
        """Return the path or URI of an output file, as in the results table."""
        return join(self.config.out, path.as_posix()) if self.is_remote_output else str(path)

    # ── finished tracks ──

    def _find_done(self, row: TrackRow) -> TrackResult | None:
        """Return the result of a finished track without reading it, if its digest is given."""
        if self.config.skip != "same" or row.sha256 is None:
            return None
        if self.is_remote_output:
            return self._find_done_remote(row, row.sha256)
        path = self._output_paths(row).manifest
        recipe = make_recipe(self.config.request, row.sha256, self.config.model, self.weights)
        manifest = find_match(path, recipe, verify=self.config.verify)
        return TrackResult.skipped(row.path, path, manifest) if manifest else None

    def _find_done_remote(self, row: TrackRow, sha256: str) -> TrackResult | None:
        """Find the result of a finished track in remote output."""
        if self.config.skip != "same":
            return None
        path = self._output_paths(row).manifest
        key = make_recipe(self.config.request, sha256, self.config.model, self.weights).key
        with suppress(*_UNREADABLE_JSON):
            manifest = parse_manifest(json.loads(storage.read_text(self._location(path)) or "{}"))
            if not manifest or manifest["key"] != key:
                return None
            for stem in manifest["stems"].values():
                location = self._location(path.parent / stem["file"])
                if storage.file_size(location) != stem["bytes"]:
                    return None
                if self.config.verify and storage.sha256(location) != stem["sha256"]:
                    return None
            return TrackResult.skipped(row.path, path, manifest)
        return None

    # ── the journal of attempts of remote output, which survives the machine ──

    def _journal(self, row: TrackRow) -> str:
        path = self._output_paths(row).manifest.as_posix()
        name = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]
        return join(self.config.out, f"{self.config.model.folder}/{PARTIAL}/{name}")

    def _fault_log(self, row: TrackRow, run_id: str) -> Path:
        """Return the file of this machine for the trace of a crash, in the run with that id."""
        name = hashlib.sha256(f"{self._journal(row)} {run_id}".encode(errors="replace"))
        return cache_folder(self.config.model.cache_dir) / "faults" / name.hexdigest()[:16]

    def _register_attempt(self, row: TrackRow) -> TrackResult | None:
        """Record an attempt until it is over; return a result if too many have crashed."""
        journal = self._journal(row)
        earlier = AttemptRecord.from_text(storage.read_text(journal) or "")
        earlier_log = self._fault_log(row, earlier.run_id)
        record = earlier.close(earlier_log).enter(self.config.run, 0)
        if record.crashes >= self.config.max_crashes:
            times = f"{record.crashes} times" if record.crashes > 1 else "once"
            error = f"its process crashed {times}; to try it again, remove {journal}"
            return replace(failure(row, self.config.model, error, "other"), status="quarantined")
        record.warn_of_kills(row.path)
        storage.write_text(journal, replace(record, is_open=True).to_text())
        log = self._fault_log(row, self.config.run.id)
        with suppress(OSError):
            earlier_log.unlink(missing_ok=True)
            log.parent.mkdir(parents=True, exist_ok=True)

        def undo() -> None:
            log.unlink(missing_ok=True)
            if record.faults or record.kills:
                storage.write_text(journal, record.to_text())
            else:
                storage.remove(journal)

        register((self.config.out, row.path), undo, log if self.config.run.id else None)
        return None

    def withdraw(self, track: StagedTrack) -> None:
        """Give up a track, without counting the attempt as a crash."""
        withdraw((self.config.out, track.row.path))
        track.remove_scratch()

    # ── results ──

    def score(self, track: StagedTrack, result: TrackResult) -> Mapping[str, float]:
        """Return the SDR in dB of each stem that has a reference: `vocals` -> 7.1.

        Scores are cached beside the stems, for the same stems and references.

        Raises:
            DemucsError: if stems and references cannot be compared.
        """
        row = track.row
        if not row.references or not result.ok:
            return {}
        cache = self._location(self._output_paths(row).scores)
        key = {"key": result.key, "references": storage.fingerprint(row.references)}
        with suppress(OSError, *_UNREADABLE_JSON):
            cached = json.loads(storage.read_text(cache) or "{}")
            if cached.get("of") == key:
                return {str(stem): float(score) for stem, score in cached["scores"].items()}
        try:
            scores = self._evaluate(row.references, track, result)
        except (DemucsError, OSError, ValueError) as error:
            raise DemucsError(f"cannot be scored: {error}") from error
        storage.write_text(cache, json.dumps({"of": key, "scores": scores}, indent=1) + "\n")
        return scores

    def _evaluate(
        self, references: str, track: StagedTrack, result: TrackResult
    ) -> Mapping[str, float]:
        assert track.job
        with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
            truth, stems = storage.local_path(references), Path(folder, "stems")
            stems.mkdir()
            if is_remote(references):
                truth = Path(folder, "references")
                storage.download(references, truth)
            # Only the stems of this result: other files may lie beside them.
            for stem, path in result.stems.items():
                copy = stems / f"{stem}{path.suffix}"
                if self.is_remote_output and track.job.result:  # an earlier run uploaded them
                    storage.download(self._location(path), copy)
                else:
                    _link_or_copy(path.absolute(), copy)
            scores = [score.to_row() for score in evaluate(truth, stems).scores]
        return {str(row["stem"]): float(row["sdr"]) for row in scores if row["sdr"] is not None}

    def upload(self, track: StagedTrack, result: TrackResult) -> TrackResult:
        """Upload the stems to a remote output, the manifest last; return their final paths."""
        if not self.is_remote_output or not track.job or track.job.result or not track.scratch:
            return result
        top = track.scratch / "stems"
        if result.ok and result.manifest:
            manifest = result.manifest.relative_to(top)
            stems = {stem: path.relative_to(top) for stem, path in result.stems.items()}
            storage.remove(self._location(manifest))
            for path in (*stems.values(), manifest):
                storage.upload(top / path, self._location(path))
            result = replace(result, stems=stems, manifest=manifest)
        complete((self.config.out, track.row.path))
        with suppress(OSError):
            self._fault_log(track.row, self.config.run.id).unlink(missing_ok=True)
        storage.remove(self._journal(track.row))
        return result

    def locations(self, result: TrackResult) -> Mapping[str, object]:
        """Return the fields of a result row that are URIs if the output is remote."""
        if not self.is_remote_output:
            return {}
        return {
            "stems": {stem: self._location(path) for stem, path in result.stems.items()},
            "manifest": self._location(result.manifest) if result.manifest else None,
        }


def _link_or_copy(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path)
    except OSError:  # Windows requires a privilege
        shutil.copyfile(path, link)


def _hash_file(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise AudioReadError(f"cannot be read: {error.strerror or error}") from error


def failure(row: TrackRow, model: ModelSpec, error: str, fault: Fault) -> TrackResult:
    """Return the result of a row that failed before it had a job."""
    return TrackResult(track=row.path, status="failed", model=model.name, error=error, fault=fault)
