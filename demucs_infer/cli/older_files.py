"""List and remove files that an earlier run with other settings left beside the stems of a track.

Those that stay are recorded in `stems.json` as `older_files`, so that a later run knows them too.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.manifest import read_manifest
from demucs_infer.batch.result import TrackResult
from demucs_infer.system.durability import rename_file, sync_file

_KEY = "older_files"


def page_path(job: TrackJob) -> Path:
    """Return the path of the page with players for `job`."""
    return job.target.manifest.with_suffix(".html")


def list_older_files(job: TrackJob) -> list[Path]:
    """Return the stems and the page of the last run of `job`, and what earlier ones left."""
    manifest = read_manifest(job.target.manifest)
    if manifest is None:
        return []
    names = [stem.get("file", "") for stem in manifest["stems"].values()]
    return _find_files(job, [*names, *_recorded_names(manifest), page_path(job).name])


def clear_older_files(
    older: Iterable[Path], job: TrackJob, result: TrackResult, *, removes: bool, has_page: bool
) -> list[Path]:
    """Return those of the `older` files that the run has not replaced, and remove or record them.

    If the track was done before, only files that are recorded already are considered. `has_page`
    says whether the page with players belongs to this run.
    """
    manifest = read_manifest(job.target.manifest)
    recorded = [] if manifest is None else _recorded_names(manifest)
    if result.status == "skipped":
        older = _find_files(job, recorded)
    new = {path.resolve() for path in result.stems.values()}
    if has_page:
        new.add(page_path(job).resolve())
    left = [file for file in dict.fromkeys(older) if file.is_file() and file.resolve() not in new]
    if removes:
        for file in left:
            file.unlink(missing_ok=True)
    folder = job.target.manifest.parent
    kept = [] if removes else [Path(os.path.relpath(file, folder)).as_posix() for file in left]
    if manifest is not None and kept != recorded:
        _record(job.target.manifest, {**manifest, _KEY: kept} if kept else _without_key(manifest))
    return left


def _find_files(job: TrackJob, names: Iterable[object]) -> list[Path]:
    """Return the files beside the manifest with these names, if they are below the output."""
    top = job.target.folder.resolve()
    files = [job.target.manifest.parent / str(name) for name in names]
    return [file for file in files if file.is_file() and file.resolve().is_relative_to(top)]


def _recorded_names(manifest: dict[str, object]) -> list[str]:
    names = manifest.get(_KEY)
    return [str(name) for name in names] if isinstance(names, list) else []


def _without_key(manifest: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in manifest.items() if name != _KEY}


def _record(path: Path, manifest: dict[str, object]) -> None:
    """Replace the manifest; if that fails, as on a full disk, the old one stays."""
    temporary = path.with_name(f".{path.name}.new")
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    with suppress(OSError):
        try:
            with temporary.open("wb") as file:
                file.write(text.encode(errors="backslashreplace"))
                sync_file(file)
            rename_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
