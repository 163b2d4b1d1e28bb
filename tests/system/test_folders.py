"""A folder that cannot be closed, as on a full network drive, does not stop the work."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from demucs_infer.batch.workdir import WorkDir
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.distributed.transfer import StagedTrack
from demucs_infer.system.process_lock import ProcessLock


def remove_scratch(folder: Path) -> None:
    StagedTrack(row=TrackRow(path="song.wav", source="song.wav"), scratch=folder).remove_scratch()


def clear_workdir(folder: Path) -> None:
    work = WorkDir(folder.parent, folder.parent / "stems.json")
    work.folder = folder.parent
    work._clear()


def remove_misnamed_folder(folder: Path) -> None:
    work = WorkDir(folder.parent, folder.parent / "stems.json")
    work.folder = folder.parent
    folder.rename(folder.with_name("journal"))
    work._remove_folders()


def unlock_without_locks(folder: Path) -> None:
    work = WorkDir(folder.parent, folder.parent / "stems.json")
    work.data_folder = folder
    work._lock = ProcessLock(folder.with_name("lock"))
    work._lock.is_supported = False
    work._unlock()


@pytest.mark.parametrize(
    "remove",
    [
        remove_scratch,
        clear_workdir,
        remove_misnamed_folder,
        unlock_without_locks,
    ],
)
def test_folder_that_cannot_be_closed_does_not_stop_the_work(
    remove: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "top/entry"
    folder.mkdir(parents=True)
    (folder / "drums.wav").write_bytes(b"x")
    close = os.close
    failures = []

    def fail(number: int) -> None:
        close(number)
        failures.append(number)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "close", fail)
    remove(folder)
    monkeypatch.undo()
    assert failures or os.name == "nt", "the test fails to fail"
