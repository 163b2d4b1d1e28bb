"""A track of a run, and whether its stems are there already; without importing torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demucs_infer.batch.manifest import Recipe, find_match, read_manifest
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec, make_recipe
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.workdir import WorkDir
from demucs_infer.options import Request
from demucs_infer.system.checksum import sha256_file


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackJob:
    """A track, and where its stems go."""

    source: Path
    target: OutputPaths
    track: str
    """What results call it: the words that named it."""

    known: TrackResult | None = None
    """Its result, if it is known already: then it is only reported, in its turn."""

    sha256: str | None = None
    """Digest that the file must have, where a list says so."""


def find_done(job: TrackJob, recipe: Recipe) -> TrackResult | None:
    """Return the result of an earlier run that made the same stems; None: there is none.

    This is the one place that decides it: the manifest beside the stems has the same recipe, and
    every file that it lists is there with its size. What a run left that died between its last
    rename and the end is removed.
    """
    manifest = find_match(job.target.manifest, recipe)
    if manifest is None:
        return None
    WorkDir(job.target.folder, job.target.manifest).remove_stale()
    return TrackResult.skipped(job.track, job.target.manifest, manifest)


def find_done_before(
    job: TrackJob,
    request: Request,
    model: ModelSpec,
    weights: tuple[str, ...],
    check: Callable[[], None] = lambda: None,
) -> TrackResult | None:
    """Do as `find_done`, for a request; the input is read only where there is a manifest."""
    if read_manifest(job.target.manifest) is None or not job.source.is_file():
        return None
    return find_done(job, make_recipe(request, sha256_file(job.source, check), model, weights))
