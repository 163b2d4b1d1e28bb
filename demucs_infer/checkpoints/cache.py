"""The folder of downloaded files: what is in it, and whether it is what it should be.

Each file has a stamp beside it (its sha256, size and time), written when its digest was taken. A
file that still matches its stamp is believed; one that does not, or has none because somebody put
it there, has its digest taken again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from demucs_infer.checkpoints.catalog import Checkpoint, load_catalog
from demucs_infer.checkpoints.download import (
    MAX_BYTES,
    DownloadRequest,
    Progress,
    fetch,
    locked,
    sha256_of,
)
from demucs_infer.errors import CheckpointError, DownloadError

_YES = frozenset({"1", "true", "yes", "on"})


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads go: the argument, `DEMUCS_INFER_CACHE`, or where this system keeps caches."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if named := os.environ.get("DEMUCS_INFER_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "demucs-infer"


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The cache, and whether it may reach the network."""

    folder: Path
    offline: bool = False
    progress: Progress | None = None

    @classmethod
    def of(
        cls,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        progress: Progress | None = None,
    ) -> CheckpointStore:
        """The store that arguments, and where they say nothing the environment, ask for."""
        if offline is None:
            offline = os.environ.get("DEMUCS_INFER_OFFLINE", "").strip().lower() in _YES
        return cls(cache_folder(cache_dir), offline, progress)

    def path(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint is, or will be."""
        return checkpoint.path if checkpoint.ships else self.folder / "models" / checkpoint.file

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether it is there, by its stamp; an unstamped file of its name counts."""
        path = self.path(checkpoint)
        return path.is_file() and _stamped(path) in (checkpoint.sha256, None)

    def obtain(self, checkpoint: Checkpoint) -> Path:
        """The file of a checkpoint, downloaded if need be, with the digest it should have."""
        path = self.path(checkpoint)
        if checkpoint.ships:
            return path
        if path.is_file():
            self._check(path, checkpoint.sha256)
            return path
        if self.offline:
            raise DownloadError(_missing(path, checkpoint.urls, checkpoint.sha256))
        urls = (*_mirrored(checkpoint.file), *checkpoint.urls)
        limit = checkpoint.size or MAX_BYTES
        digest = fetch(DownloadRequest(urls, path, checkpoint.sha256, limit), self.progress)
        if digest != checkpoint.sha256:  # another process put it there
            raise CheckpointError(_wrong(path, digest, checkpoint.sha256))
        _stamp(path, digest)
        return path

    def obtain_unlisted(self, url: str, path: Path, max_bytes: int) -> Path:
        """A file that no catalogue knows: its digest is recorded, and has to stay the same."""
        if path.is_file():
            recorded = _recorded(path)
            if recorded is not None:
                self._check(path, recorded)
            return path
        if self.offline:
            raise DownloadError(_missing(path, (url,), None))
        _stamp(path, fetch(DownloadRequest((url,), path, None, max_bytes), self.progress))
        return path

    def verify(self, checkpoint: Checkpoint) -> None:
        """Take the digest of a file that is there, whatever its stamp says."""
        path = self.path(checkpoint)
        if not path.is_file():
            raise DownloadError(_missing(path, checkpoint.urls, checkpoint.sha256))
        digest = sha256_of(path)
        if digest != checkpoint.sha256:
            raise CheckpointError(_wrong(path, digest, checkpoint.sha256))
        _stamp(path, digest)

    def remove(self, checkpoint: Checkpoint) -> bool:
        """Delete a downloaded file; false if there was none (or it ships with the package)."""
        path = self.path(checkpoint)
        if checkpoint.ships or not path.exists():
            return False
        path.unlink()
        _stamp_file(path).unlink(missing_ok=True)
        return True

    def add_file(self, source: Path, checkpoint: Checkpoint) -> Path:
        """Copy a file whose digest is known to be right into the cache."""
        path = self.path(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock")):
            part = path.with_name(path.name + ".import")
            shutil.copyfile(source, part)
            part.replace(path)
        _stamp(path, checkpoint.sha256)
        return path

    def _check(self, path: Path, sha256: str) -> None:
        if _stamped(path) == sha256:
            return
        digest = sha256_of(path)
        if digest != sha256:
            raise CheckpointError(_wrong(path, digest, sha256))
        _stamp(path, digest)


def _mirrored(file: str) -> tuple[str, ...]:
    """The address at a mirror of one's own; what it sends has to have the same digest."""
    mirror = os.environ.get("DEMUCS_INFER_MIRROR")
    return (f"{mirror.rstrip('/')}/{file}",) if mirror else ()


def _missing(path: Path, urls: tuple[str, ...], sha256: str | None) -> str:
    ships = [name for name, checkpoint in load_catalog().checkpoints.items() if checkpoint.ships]
    instead = f", or take a model that ships with the package: -n {ships[0]}" if ships else ""
    return (
        f"{path.name}{f' (sha256 {sha256})' if sha256 else ''} is not in the cache and downloads "
        f"are off; fetch it elsewhere from {urls[0] if urls else 'its author'} and put it to "
        f"{path}{instead}."
    )


def _wrong(path: Path, digest: str, sha256: str) -> str:
    return (
        f"{path} is damaged or another file: its sha256 is {digest} and should be {sha256}; "
        "delete it and it will be downloaded again"
    )


# ── stamps ──


def _stamp_file(path: Path) -> Path:
    return path.with_name(path.name + ".stamp")


def _stamp(path: Path, sha256: str) -> None:
    """Record a digest that was just taken; a cache that cannot be written to does without."""
    about = path.stat()
    stamp = {"sha256": sha256, "size": about.st_size, "mtime_ns": about.st_mtime_ns}
    with suppress(OSError):
        part = _stamp_file(path).with_name(f"{path.name}.stamp.{os.getpid()}")
        part.write_text(json.dumps(stamp), "utf-8")
        part.replace(_stamp_file(path))


def _stamped(path: Path) -> str | None:
    """The digest that was taken of this very file, if it has not been touched since."""
    stamp, about = _read_stamp(path), path.stat()
    same = (stamp.get("size"), stamp.get("mtime_ns")) == (about.st_size, about.st_mtime_ns)
    return str(stamp["sha256"]) if same and "sha256" in stamp else None


def _recorded(path: Path) -> str | None:
    """The digest that the file had when it came."""
    found = _read_stamp(path).get("sha256")
    return found if isinstance(found, str) else None


def _read_stamp(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        found = json.loads(_stamp_file(path).read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}
