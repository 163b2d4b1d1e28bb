"""Test locks between processes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demucs_infer.system.process_lock import ProcessLock


def test_lock_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    first, second = (ProcessLock(tmp_path / "lock") for _ in range(2))
    assert first.acquire() and first.is_supported
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_lock_is_released_when_its_process_crashes(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from demucs_infer.system.process_lock import ProcessLock\n"
        "assert ProcessLock(Path(sys.argv[1])).acquire(); os._exit(9)"
    )
    path = tmp_path / "lock"
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 9
    assert path.exists()
    lock = ProcessLock(path)
    assert lock.acquire()
    lock.release()


def test_lock_excludes_threads_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    first, second = (ProcessLock(tmp_path / "lock") for _ in range(2))
    assert first.acquire() and not first.is_supported
    assert not second.acquire()
    second.release()
    assert not second.acquire(), "released by a lock that was not held"
    first.release()
    assert second.acquire()
    second.release()


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        ProcessLock(tmp_path / "lock").acquire()
