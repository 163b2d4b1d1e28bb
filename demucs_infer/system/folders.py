"""Remove folders that are not needed any more."""

import shutil
from contextlib import suppress
from pathlib import Path


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it; what cannot be removed stays.

    `shutil.rmtree` with `ignore_errors` still raises if a folder cannot be closed, as on a full
    network drive.
    """
    with suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)
