"""Store downloaded checkpoints on disk, and verify them against their sha256.

When a file has been hashed, its sha256, size and modification time are recorded in a `.stamp` file
beside it. The file is hashed again only if its size or time has changed, or if it has no stamp.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from demucs_infer.checkpoints.catalog import Checkpoint
from demucs_infer.checkpoints.download import (
    MAX_BYTES,
    DownloadRequest,
    Progress,
    fetch,
    hold_lock,
    partial_path,
)
from demucs_infer.errors import CheckpointError, DownloadError
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.durability import make_folder, rename_file, sync_file

_TRUE_WORDS = frozenset({"1", "true", "yes", "on"})


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return `cache_dir`, else `DEMUCS_INFER_CACHE`, else the platform's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if folder := os.environ.get("DEMUCS_INFER_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "demucs-infer"


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoint cache; `offline` forbids downloads."""

    folder: Path
    offline: bool = False
    progress: Progress | None = None

    @classmethod
    def from_environment(
        cls,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        progress: Progress | None = None,
    ) -> CheckpointStore:
        """Create a store; arguments that are `None` are taken from environment variables."""
        if offline is None:
            offline = os.environ.get("DEMUCS_INFER_OFFLINE", "").strip().lower() in _TRUE_WORDS
        return cls(cache_folder(cache_dir), offline, progress)

    def path(self, checkpoint: Checkpoint) -> Path:
        """Return the path of a checkpoint, whether or not it has been downloaded."""
        return (
            checkpoint.path if checkpoint.is_bundled else self.folder / "models" / checkpoint.file
        )

    def has(self, checkpoint: Checkpoint) -> bool:
        """Return whether the file exists, unless a different sha256 is recorded for it."""
        path = self.path(checkpoint)
        if not checkpoint.sha256:
            return path.is_file()
        return path.is_file() and _read_valid_stamp(path) in (checkpoint.sha256, None)

    def digest(self, checkpoint: Checkpoint) -> str:
        """Return the published sha256, or else that of the first download; "" before it."""
        return checkpoint.sha256 or _recorded_digest(self.path(checkpoint)) or ""

    def obtain(self, checkpoint: Checkpoint) -> Path:
        """Return the verified file of a checkpoint, downloading it if necessary.

        Raises `DownloadError` if it cannot be downloaded, and `CheckpointError` if its sha256 is
        not the expected one.
        """
        path = self.path(checkpoint)
        if checkpoint.is_bundled:
            return path
        if not checkpoint.sha256:
            return self.obtain_unlisted(checkpoint.urls[0], path, checkpoint.size or MAX_BYTES)
        if path.is_file():
            self._verify_unless_stamped(path, checkpoint.sha256)
            return path
        if self.offline:
            raise DownloadError(_describe_missing(path, checkpoint.urls, checkpoint.sha256))
        urls = (*_mirror_urls(checkpoint.file), *checkpoint.urls)
        limit = checkpoint.size or MAX_BYTES
        digest = fetch(DownloadRequest(urls, path, checkpoint.sha256, limit), self.progress)
        if digest != checkpoint.sha256:  # another process put a file there in the meantime
            raise CheckpointError(_describe_mismatch(path, digest, checkpoint.sha256))
        _write_stamp(path, digest)
        return path

    def obtain_unlisted(self, url: str, path: Path, max_bytes: int) -> Path:
        """Return a file that is not in the catalog, downloading it if necessary.

        Its sha256 is recorded after the first download. Later, raises `CheckpointError` if the file
        differs, and `DownloadError` if a new download does.
        """
        digest = _recorded_digest(path)
        if path.is_file():
            if digest is not None:
                self._verify_unless_stamped(path, digest)
            return path
        if self.offline:
            raise DownloadError(_describe_missing(path, (url,), digest))
        advice = (
            f", and not the file of the first download; to accept it, delete {_stamp_path(path)}"
        )
        request = DownloadRequest((url,), path, digest, max_bytes, advice)
        _write_stamp(path, fetch(request, self.progress))
        return path

    def verify(self, checkpoint: Checkpoint) -> None:
        """Rehash the checkpoint's file, even if it is recorded as verified.

        Raises `CheckpointError` if the hash is not the expected one, and `DownloadError` if there
        is no file.
        """
        path = self.path(checkpoint)
        if not path.is_file():
            raise DownloadError(_describe_missing(path, checkpoint.urls, checkpoint.sha256))
        if digest := self.digest(checkpoint):
            self._verify(path, digest)

    def remove(self, checkpoint: Checkpoint) -> bool:
        """Delete a downloaded file, but never a bundled one; return whether a file was deleted.

        If no sha256 is published, that of the first download is kept, for the next one.
        """
        path = self.path(checkpoint)
        if checkpoint.is_bundled or not path.exists():
            return False
        path.unlink()
        if checkpoint.sha256:
            _stamp_path(path).unlink(missing_ok=True)
        return True

    def add_file(self, source: Path, checkpoint: Checkpoint) -> Path:
        """Copy a file, whose sha256 the caller has verified, into the cache."""
        path = self.path(checkpoint)
        make_folder(path.parent)
        with hold_lock(path.with_name(path.name + ".lock")) as is_locked:
            part = partial_path(path, "import", is_locked=is_locked)
            try:
                shutil.copyfile(source, part)
                with part.open("r+b") as file:
                    sync_file(file)
                rename_file(part, path)
            finally:
                part.unlink(missing_ok=True)
        _write_stamp(path, checkpoint.sha256)
        return path

    def _verify_unless_stamped(self, path: Path, sha256: str) -> None:
        if _read_valid_stamp(path) != sha256:
            self._verify(path, sha256)

    def _verify(self, path: Path, sha256: str) -> None:
        digest = sha256_file(path)
        if digest != sha256:
            raise CheckpointError(_describe_mismatch(path, digest, sha256))
        _write_stamp(path, digest)


def _mirror_urls(file: str) -> tuple[str, ...]:
    """Return the URL of a file on the mirror that `DEMUCS_INFER_MIRROR` names, if it is set."""
    mirror = os.environ.get("DEMUCS_INFER_MIRROR")
    return (f"{mirror.rstrip('/')}/{file}",) if mirror else ()


def _describe_missing(path: Path, urls: tuple[str, ...], sha256: str | None) -> str:
    return (
        f"{path.name}{f' (sha256 {sha256})' if sha256 else ''} is not in the cache, and downloads "
        f"are disabled: download it from {urls[0] if urls else 'its author'} on another machine "
        f"and copy it to {path}"
    )


def _describe_mismatch(path: Path, digest: str, sha256: str) -> str:
    return (
        f"{path} is damaged or a different file: expected sha256 {sha256}, got {digest}; "
        "delete it to download it again"
    )


# ── stamps ──


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".stamp")


def _write_stamp(path: Path, sha256: str) -> None:
    """Record a digest that was just computed; do nothing if the cache is read-only."""
    status = path.stat()
    stamp = {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    with suppress(OSError):
        part = _stamp_path(path).with_name(f"{path.name}.stamp.{os.getpid()}")
        part.write_text(json.dumps(stamp), "utf-8")
        part.replace(_stamp_path(path))


def _read_valid_stamp(path: Path) -> str | None:
    """Return the recorded digest of a file, if its size and modification time are unchanged."""
    stamp, status = _read_stamp(path), path.stat()
    matches = (stamp.get("size"), stamp.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
    return str(stamp["sha256"]) if matches and "sha256" in stamp else None


def _recorded_digest(path: Path) -> str | None:
    """Return the digest that a file had when it was downloaded."""
    digest = _read_stamp(path).get("sha256")
    return digest if isinstance(digest, str) else None


def _read_stamp(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        stamp = json.loads(_stamp_path(path).read_text("utf-8"))
        if isinstance(stamp, dict):
            return stamp
    return {}
