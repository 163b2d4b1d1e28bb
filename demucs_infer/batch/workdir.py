"""A hidden folder near the stems of a track: they are made there, and appear when complete."""

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
_TRIES = 100  # to enter a folder that others remove meanwhile


class WorkDir:
    """Belongs to one process at a time, and to one recipe.

    What a process that was interrupted left behind is found by the next one that makes the same.
    """

    def __init__(
        self, top: Path, manifest: Path, made: set[Path] | None = None, run_id: str = ""
    ) -> None:
        """`made` are folders on the way to `top` that were not there before this run.

        With a `run_id`, only crashes in the run of that id count.
        """
        self._run_id = run_id
        self._made = set() if made is None else made
        name = hashlib.sha256(os.fsencode(manifest.absolute())).hexdigest()[:16]
        self.folder = top / PARTIAL / name
        self._lock: BinaryIO | None = None

    def acquire(self, key: str) -> bool:
        """Take the folder for the recipe of that key; false if another process has it."""
        for left in reversed(range(_TRIES)):
            above = self.folder.parents[1:]
            self._made.update(takewhile(lambda folder: not folder.exists(), above))
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self._has_lock():
                    return False
            except FileNotFoundError:  # who was here removes the folder as we open it
                if not left:
                    raise  # nobody: it cannot be made
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
        """How often a process ended here in the middle of its work, without getting further.

        `frames` is how far they came.
        """
        try:
            crash_count, before, *run_id = self._attempts.read_text("ascii").split()
            is_further = frames > int(before)
            is_other_run = bool(self._run_id) and run_id != [self._run_id]
            return 0 if is_further or is_other_run else int(crash_count)
        except (OSError, ValueError):
            return 0

    def begin(self, frames: int) -> None:
        """Enter an attempt in the journal."""
        crash_count = self.crash_count(frames)
        self._write_attempts(crash_count + 1, frames)
        register(self, partial(self._take_back, crash_count, frames))

    def _take_back(self, crash_count: int, frames: int) -> None:
        if crash_count:
            self._write_attempts(crash_count, frames)
        else:
            self._attempts.unlink(missing_ok=True)

    def _write_attempts(self, crash_count: int, frames: int) -> None:
        self._attempts.write_text(f"{crash_count} {frames} {self._run_id}".rstrip(), "ascii")

    @property
    def has_stale_attempt(self) -> bool:
        """Whether a process died here, unless one is at work here now."""
        return self._attempts.exists()

    @property
    def _attempts(self) -> Path:
        return self.folder / "attempts"

    def release(self) -> None:
        """Go in peace, everything stays: this attempt was no death."""
        withdraw(self)
        self._unlock()

    def abandon(self) -> None:
        """Go without a word; the journal stays as it is."""
        self._unlock()

    def remove(self) -> None:
        """Nothing is needed any more."""
        complete(self)
        if sys.platform == "win32":  # where open files cannot be removed
            self._unlock()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()
        with suppress(OSError):  # other tracks are at work in it
            self.folder.parent.rmdir()
            self._remove_made()

    def _remove_made(self) -> None:
        """What was made for stems that never came; `OSError` as soon as something lies there."""
        top, *above = self.folder.parents[1:]
        if top in self._made:
            self._made.discard(top)  # nobody is at work in it: either it goes now, or it stays
            top.rmdir()
            for folder in above:
                if folder in self._made:
                    folder.rmdir()
                    self._made.discard(folder)

    def commit(self, name_files: Callable[[], None], manifest: Manifest | None, path: Path) -> None:
        """Give the files their names, then write the manifest to `path`, and remove the folder.

        The manifest comes last, so that stems with one are complete; an old one goes first.
        """
        path.unlink(missing_ok=True)
        name_files()
        if manifest:
            path.parent.mkdir(parents=True, exist_ok=True)
            manifest.write(path)
        self.remove()

    def remove_stale(self) -> None:
        """What a process left that died between its last rename and here; the track is done."""
        with suppress(FileNotFoundError):  # the usual: nothing was left
            if self._has_lock():  # or somebody makes it again
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
