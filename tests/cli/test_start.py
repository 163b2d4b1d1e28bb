"""Commands prepare their process before they import torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli_process import environment
from tests.helpers.server_process import song

# Importing torch ends the process, and tells what was prepared.
SCRIPT = """
import gc, sys
from demucs_infer.cli.main import main
from demucs_infer.system import malloc

options = []
malloc._mallopt = options.append

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("heaps are limited:", options != [], "collects garbage:", gc.isenabled())
            raise SystemExit

sys.meta_path.insert(0, Finder())
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is meant")
@pytest.mark.parametrize(
    "command",
    ["song.wav -n tiny -o out", "batch songs.txt -n tiny -o out", "serve --data-dir data"],
)
def test_heaps_and_garbage_are_settled_before_torch_is_imported(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later, threads would have heaps of their own, and torch's objects would have been visited."""
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (tmp_path / "song.wav").write_bytes(song(1, seed=1))
    (tmp_path / "songs.txt").write_text("song.wav\n")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command.split()],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.stdout == "heaps are limited: True collects garbage: False\n", process.stderr
