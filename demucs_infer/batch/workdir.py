"""Make the stems of a track in a hidden folder, from which they are renamed when complete."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from demucs_infer.batch.attempts import complete, register, withdraw
from demucs_infer.batch.manifest import Manifest

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PARTIAL = ".partial"
_TRIES = 100  # to lock a folder that other processes remove at the same time


class WorkDir:
    """A folder that is locked by one process at a time, and that belongs to one recipe.

    The files of an interrupted process stay in it, and the next process with the same recipe
    continues from them.
    """

    def __init__(
        self, top: Path, manifest: Path, made: set[Path] | None = None, run_id: str = ""
    ) -> None:
        """Choose the folder below `top`, by the path of the manifest.

        `made` collects the folders above `top` that this run has made. With a `run_id`, only
        crashes in the run of that id count.
        """
        self._run_id = run_id
        self._made = set() if made is None else made
        name = hashlib.sha256(os.fsencode(manifest.absolute())).hexdigest()[:16]
        self.folder = top / PARTIAL / name
        self._lock: BinaryIO | None = None

    def acquire(self, key: str) -> bool:
        """Lock the folder for the recipe with that key; return whether it is locked now."""
        for left in reversed(range(_TRIES)):
            above = self.folder.parents[1:]
            self._made.update(takewhile(lambda folder: not folder.exists(), above))
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self._has_lock():
                    return False
            except FileNotFoundError:  # another process has just removed the folder
                if not left:
                    raise  # it cannot be made
                continue
            if self._is_there():  # or just after that
                break
            self._unlock()
        else:
            return False
        kept = self.folder / "key"
        if not kept.exists() or kept.read_text("ascii") != key:
            for file in self.folder.iterdir():
                if file.name != "lock":
                    file.unlink()
            kept.write_text(key, "ascii")
        return True

    def _has_lock(self) -> bool:
        """Open the lock, and keep it open if it is ours."""
        self._lock = (self.folder / "lock").open("a+b")
        if try_lock(self._lock):
            return True
        self._unlock()
        return False

    def _is_there(self) -> bool:
        """Whether the lock that is ours is still the one that others find."""
        return self._lock is not None and os.fstat(self._lock.fileno()).st_nlink > 0

    def crash_count(self, frames: int) -> int:
        """Return the number of crashes in this track since `frames` samples were separated."""
        try:
            crash_count, before, *run_id = self._attempts.read_text("ascii").split()
            is_further = frames > int(before)
            is_other_run = bool(self._run_id) and run_id != [self._run_id]
            return 0 if is_further or is_other_run else int(crash_count)
        except (OSError, ValueError):
            return 0

    def begin(self, frames: int) -> None:
        """Count an attempt as a crash until it ends."""
        crash_count = self.crash_count(frames)
        self._write_attempts(crash_count + 1, frames)
        register(self, partial(self._undo_attempt, crash_count, frames))

    def _undo_attempt(self, crash_count: int, frames: int) -> None:
        if crash_count:
            self._write_attempts(crash_count, frames)
        else:
            self._attempts.unlink(missing_ok=True)

    def _write_attempts(self, crash_count: int, frames: int) -> None:
        self._attempts.write_text(f"{crash_count} {frames} {self._run_id}".rstrip(), "ascii")

    @property
    def has_stale_attempt(self) -> bool:
        """Whether an attempt is counted: a process crashed, or is at work now."""
        return self._attempts.exists()

    @property
    def _attempts(self) -> Path:
        return self.folder / "attempts"

    def release(self) -> None:
        """Release the lock and keep the files; the attempt is not counted as a crash."""
        withdraw(self)
        self._unlock()

    def abandon(self) -> None:
        """Release the lock without touching the journal of attempts."""
        self._unlock()

    def remove(self) -> None:
        """Remove the folder, and those above it that this run made and that are empty."""
        complete(self)
        if sys.platform == "win32":  # where open files cannot be removed
            self._unlock()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()
        with suppress(OSError):  # it has folders of other tracks
            self.folder.parent.rmdir()
            self._remove_made()

    def _remove_made(self) -> None:
        """Remove empty folders that this run made; raise `OSError` at one that is not empty."""
        top, *above = self.folder.parents[1:]
        if top in self._made:
            self._made.discard(top)  # either it is empty now, or it stays
            top.rmdir()
            for folder in above:
                if folder in self._made:
                    folder.rmdir()
                    self._made.discard(folder)

    def commit(self, name_files: Callable[[], None], manifest: Manifest | None, path: Path) -> None:
        """Give the files their names, then write the manifest to `path`, and remove the folder.

        The manifest is written last, so that stems with one are complete; an old one is removed
        first.
        """
        path.unlink(missing_ok=True)
        name_files()
        if manifest:
            path.parent.mkdir(parents=True, exist_ok=True)
            manifest.write(path)
        self.remove()

    def remove_stale(self) -> None:
        """Remove what a process left that crashed after its last rename; the track is done."""
        with suppress(FileNotFoundError):  # as usual: there is no such folder
            if self._has_lock():  # otherwise another process separates it again
                self.remove()

    def _unlock(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None


def try_lock(file: BinaryIO) -> bool:
    """Hold the file against other processes; the system lets go of it whatever happens to us."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
