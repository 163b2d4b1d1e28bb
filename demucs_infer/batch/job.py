"""Describe a track of a run, and find its stems of an earlier run; without importing torch."""

from dataclasses import dataclass
from pathlib import Path

from demucs_infer.batch.manifest import Recipe, find_match, read_manifest
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.workdir import WorkDir
from demucs_infer.system.checksum import sha256_file


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackJob:
    """A track and its output files."""

    source: Path
    target: OutputPaths
    track: str
    """Its name in results."""

    result: TrackResult | None = None
    """The result, if it is known already; then the track is not separated."""

    sha256: str | None = None
    """Expected digest of the file, if given."""

    is_temporary: bool = False
    """Whether the source is a copy: of standard input, a pipe or a download, or the demo."""


def find_done(job: TrackJob, recipe: Recipe, *, verify: bool = False) -> TrackResult | None:
    """Return the result of an earlier run that made the same stems, or None.

    The manifest of the track must have the same recipe, and all files that it lists must exist with
    the recorded sizes; with `verify`, also with the recorded digests. Temporary files that such a
    run left behind are removed.
    """
    manifest = find_match(job.target.manifest, recipe, verify=verify)
    if manifest is None:
        return None
    WorkDir(job.target.folder, job.target.manifest).remove_stale()
    return TrackResult.skipped(job.track, job.target.manifest, manifest)


def hash_input(job: TrackJob) -> str | None:
    """Return the digest of the input to compare with earlier runs; None if there are none."""
    if read_manifest(job.target.manifest) is None or not job.source.is_file():
        return None
    return sha256_file(job.source)
