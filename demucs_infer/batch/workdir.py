"""Manage the hidden folder in which the stems of a track are written until they are complete."""

import hashlib
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

from demucs_infer.batch.attempts import AttemptRecord, Run, complete, register, withdraw
from demucs_infer.batch.manifest import Manifest
from demucs_infer.system.durability import make_folder, sync_folder
from demucs_infer.system.folders import remove_folder
from demucs_infer.system.process_lock import ProcessLock

PARTIAL = ".partial"
_TRIES = 100  # to lock a folder that other processes remove at the same time


class WorkDir:
    """A working folder for one track and one recipe, which one process at a time may lock.

    An interrupted process leaves its files there, and the next process with the same recipe resumes
    from them. On a file system without locks, each process uses its own subfolder, which is removed
    at the end. Then several processes may separate the same track, and interrupted tracks start
    again, but files are never mixed.
    """

    def __init__(
        self, top: Path, manifest: Path, made: set[Path] | None = None, run: Run | None = None
    ) -> None:
        """Choose the folder below `top`, by the path of the manifest.

        `made` collects the folders that this run has created, including those above `top`. `run`
        decides which crashes count.
        """
        self._run = run or Run()
        self._made = set() if made is None else made
        name = hashlib.sha256(os.fsencode(manifest.absolute())).hexdigest()[:16]
        self.folder = top / PARTIAL / name
        self.data_folder = self.folder
        """The folder for the files of the track."""

        self._lock = ProcessLock(self.folder / "lock")

    def acquire(self, key: str) -> bool:
        """Lock the folder for the recipe with this key; return whether this succeeded."""
        for left in reversed(range(_TRIES)):
            above = self.folder.parents[1:]
            self._made.update(takewhile(lambda folder: not folder.exists(), above))
            try:
                make_folder(self.folder.parents[1])
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_folders()
                if not self._lock.acquire():
                    return False
                break
            except (FileNotFoundError, FileExistsError):  # another process is removing the folder
                if not left:
                    raise  # it cannot be made
        if not self._lock.is_supported:
            self.data_folder = self.folder / secrets.token_hex(8)
            self.data_folder.mkdir(parents=True)
            return True
        key_path = self.folder / "key"
        if not key_path.exists() or key_path.read_bytes() != key.encode():
            self._clear()
            key_path.write_text(key, "ascii")
        return True

    def _remove_folders(self) -> None:
        """Remove folders that have the names of files of this module."""
        for name in ("lock", "key", "attempts", "fault", "samples.f32", "journal", "decoded.f32"):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)

    def _clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.folder.iterdir():
            if path.is_dir():  # of a process without locks
                remove_folder(path)
            elif path.name != "lock":
                path.unlink(missing_ok=True)  # another process may remove its own temporary file

    @property
    def is_resumable(self) -> bool:
        """Whether a later run can resume from the files in this folder."""
        return self._lock.is_supported

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the file system, available after `acquire`."""
        if self._lock.is_supported:
            return ()
        return (
            "the file system of the output has no file locks: an interrupted track starts again, "
            "and other processes may separate it at the same time",
        )

    def read_attempts(self, frames: int) -> AttemptRecord:
        """Return the attempts that crashed since `frames` samples were separated."""
        try:
            text = self._attempts.read_text("ascii")
        except (OSError, ValueError):
            text = ""
        return AttemptRecord.from_text(text).close(self._fault_log).enter(self._run, frames)

    def begin(self, frames: int) -> None:
        """Record an attempt, which counts as a crash until it ends."""
        record = self.read_attempts(frames)
        self._fault_log.unlink(missing_ok=True)  # it was counted
        self._attempts.write_text(replace(record, is_open=True).to_text(), "ascii")
        register(
            self,
            partial(self._undo_attempt, record),
            # Without an id, all crashes count, whatever the process ended by.
            self._fault_log if self._run.id else None,
        )

    def _undo_attempt(self, record: AttemptRecord) -> None:
        self._fault_log.unlink(missing_ok=True)
        if record.faults or record.kills:
            self._attempts.write_text(record.to_text(), "ascii")
        else:
            self._attempts.unlink(missing_ok=True)

    @property
    def has_open_attempt(self) -> bool:
        """Whether an attempt is counted: a process has crashed, or is still working."""
        return self._attempts.exists()

    @property
    def _attempts(self) -> Path:
        return self.folder / "attempts"

    @property
    def _fault_log(self) -> Path:
        return self.folder / "fault"

    def release(self) -> None:
        """Release the lock and keep the files; the attempt is not counted as a crash."""
        withdraw(self)
        self._unlock()

    def abandon(self) -> None:
        """Release the lock, and leave the number of counted attempts as it is."""
        self._unlock()

    def remove(self) -> None:
        """Remove the folder, and empty folders above it that this run has created."""
        complete(self)
        with suppress(OSError):
            if self._lock.is_supported:
                # The lock last: once it is gone, another process may begin in the same folder.
                self._clear()
                if sys.platform == "win32":  # where open files cannot be removed
                    self._unlock()
                self._lock.path.unlink(missing_ok=True)
                self.folder.rmdir()
            else:
                self._attempts.unlink(missing_ok=True)
                self._fault_log.unlink(missing_ok=True)
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
        """Give the files their final names, write the manifest to `path`, and remove the folder.

        An old manifest is removed first, and the new one is written last, so that the stems in a
        manifest are always complete.
        """
        if path.exists():
            path.unlink()
            sync_folder(path.parent)  # after a power loss it must not list the new files
        name_files()
        if manifest:
            manifest.write(path, self.data_folder)
        self.remove()

    def remove_stale(self) -> None:
        """Remove the folder of a finished track, left by a process that crashed at the very end."""
        if not self.folder.is_dir() or not self._lock.acquire():
            return  # another process separates it again
        if self._lock.is_supported:
            self.remove()
        else:
            self._unlock()

    def _unlock(self) -> None:
        if not self._lock.is_supported:
            with suppress(OSError):  # another process works in the folder
                if self.data_folder != self.folder:
                    remove_folder(self.data_folder)
                self._lock.path.unlink(missing_ok=True)
                self.folder.rmdir()
        self._lock.release()
