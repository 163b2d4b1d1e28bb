"""Lock a path between processes, as far as possible also on file systems without locks."""

import errno
import threading
from pathlib import Path

from filelock import FileLock, Timeout

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems without locks (NFS, sometimes)."""

_TRIES = 100  # to lock a file that other processes remove at the same time

_held_in_process: set[str] = set()
_guard = threading.Lock()


class ProcessLock:
    """A lock file that one process, and one thread of it, holds at a time.

    The system releases the lock when the process ends, however it ends. On a file system without
    locks, only threads of this process exclude each other, and `is_supported` is false after
    `acquire`: the caller must then not write to paths that other processes may use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_supported = True
        self._lock: FileLock | None = None
        self._is_held_in_process = False

    def acquire(self) -> bool:
        """Try to lock without waiting; return whether the lock is held now."""
        # One thread may release what another has acquired, so the lock must not be thread-local.
        lock = FileLock(self.path, thread_local=False)
        for _ in range(_TRIES):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                if self.path.exists():
                    return False
                # The file was removed together with its lock: the next try creates another one.
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self.is_supported = False
                return self._acquire_in_process()
            else:
                self._lock = lock
                return True
        return False

    def _acquire_in_process(self) -> bool:
        key = str(self.path.absolute())
        with _guard:
            if key in _held_in_process:
                return False
            _held_in_process.add(key)
        self._is_held_in_process = True
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._lock:
            self._lock.release()
            self._lock = None
        if self._is_held_in_process:
            self._is_held_in_process = False
            _held_in_process.discard(str(self.path.absolute()))
