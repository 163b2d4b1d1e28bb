"""Find out whether a run would replace the stems of another input."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.manifest import list_files, read_manifest
from demucs_infer.batch.output_paths import fold_case

FileRelation = Literal["same", "other", "unclear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacedInput:
    """The input of existing stems that a run would replace; its content is not that of the run."""

    name: str
    """Its path, as `stems.json` has it."""

    relation: FileRelation
    """Whether it was the same file before a change, or another file."""


def find_replaced_input(job: TrackJob, sha256: str) -> ReplacedInput | None:
    """Return the input of the stems that `job` would replace; None if the content is the same.

    `sha256` is the digest of the input of the job.
    """
    manifest = read_manifest(job.target.manifest)
    if manifest is None:
        return None
    try:
        name, digest = str(manifest["input"]), manifest["recipe"]["input_sha256"]
        files = list_files(job.target.manifest, manifest)
    except (KeyError, TypeError, AttributeError):  # an invalid manifest
        return None
    if not any(file.is_file() for file in files) or digest == sha256:
        return None
    relation = "unclear" if job.is_temporary else _compare_paths(Path(name), job.source)
    return ReplacedInput(name=name, relation=relation)


def describe_refusal(
    job: TrackJob,
    replaced: ReplacedInput,
    advice: str = "choose another output folder or file name, or force the replacement",
) -> str:
    """Return the error for a track that would replace the stems of another file."""
    return f"{job.target.manifest.parent} has the stems of {replaced.name}: {advice}"


def _compare_paths(earlier: Path, source: Path) -> FileRelation:
    """Compare paths of two runs; a relative one may have been relative to another folder."""
    is_equal = _path_key(earlier.resolve()) == _path_key(source.resolve())
    if earlier.is_absolute():
        return "same" if is_equal else "other"
    tail = [part for part in Path(_path_key(earlier)).parts if part != ".."]
    has_tail = list(Path(_path_key(source.absolute())).parts[-len(tail) :]) == tail
    return "unclear" if is_equal or has_tail else "other"


def _path_key(path: Path) -> str:
    """Return a key that is equal for two names of the same path on this system."""
    return fold_case(os.path.normcase(os.path.normpath(path)))
