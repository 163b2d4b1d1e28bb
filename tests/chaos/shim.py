"""Build `shim.c`, and run a subject below it."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("open", "write", "fsync", "rename", "mkdir", "lock", "close", "read", "unlink", "truncate")
_MARK = "CHAOS_SHIM"


def restart_with_shim() -> None:
    """Build the library and start this process anew with it, unless that was done before."""
    if _MARK in os.environ:
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("no C compiler: install gcc")
    library = Path(tempfile.mkdtemp(prefix="chaos-shim-"), "shim.so")
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    variables = {**os.environ, _MARK: str(library), "LD_PRELOAD": str(library)}
    words = [sys.executable, "-m", "tests.chaos", *sys.argv[1:]]
    os.execve(sys.executable, words, {**variables, "OMP_NUM_THREADS": "1"})


class Shim:
    """The functions of the library, which is loaded already."""

    def __init__(self) -> None:
        self.path = Path(os.environ[_MARK])
        self._library = ctypes.CDLL(str(self.path))
        self._library.chaos_count.restype = ctypes.c_long
        os.environ.pop("LD_PRELOAD", None)  # not for the processes that this one starts

    def arm(
        self, folder: Path, kind: str | None = None, at: int = 0, error: int = 0, log: int = -1
    ) -> None:
        """Count the calls below a folder, log them, and fail the one number `at` of a kind."""
        number = KINDS.index(kind) if kind else -1
        name = str(folder).encode()
        self._library.chaos_arm(name, number, ctypes.c_long(at), error, log)

    def disarm(self) -> dict[str, int]:
        """Stop that, and return how many calls of each kind there were."""
        self._library.chaos_disarm()
        return {kind: self._library.chaos_count(n) for n, kind in enumerate(KINDS)}

    def remove(self) -> None:
        """Remove the library from the disk."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
