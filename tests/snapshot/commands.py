"""What commands end with, and what they write beside the stems."""

import contextlib
import io
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demucs_infer.cli.main import main
from tests.helpers.cli_process import write_song

_RUN = "-n tiny -d cpu --offline -q -o out"
LINES = (
    "--help",
    "--version",
    "--list-models",
    f"song.wav {_RUN}",
    f"song.wav {_RUN} --dry-run",
    f"song.wav broken.wav {_RUN}",
    f"broken.wav {_RUN}",
    f"absent.wav {_RUN}",
    f"song.wav absent.wav {_RUN}",
    "",
    "--nonsense",
    "song.wav --shifts -1",
    "song.wav --overlap 1",
    f"song.wav {_RUN} --stems piano",
    f"song.wav {_RUN} --two-stems piano",
    f"song.wav {_RUN} --segment 5 --no-split",
    f"song.wav {_RUN} --config absent.json",
    f"song.wav {_RUN} --config absent.json --checkpoint absent.th",
    "song.wav -n nosuch -q -o out",
    "song.wav -n htdemucs --offline -q -o out",
    "song.wav --repo absent -q -o out",
    "models ls",
    "models info tiny",
    "models info nosuch",
    "models pull htdemucs --offline",
    "models import absent.th",
    "models nonsense",
    "models",
    "doctor",
    "doctor --nonsense",
    "eval absent absent",
    "eval",
    "serve --port nonsense",
    "serve --config absent.toml",
    f"batch good.txt {_RUN}",
    f"batch mixed.txt {_RUN}",
    f"batch absent.txt {_RUN}",
    "batch good.txt -n nosuch -q -o out",
    f"batch good.txt {_RUN} --shard 3/3",
    "batch",
)
"""Command lines, each in a folder with a song and with a file that is none."""


def collect_exit_codes(folder: Path) -> dict[str, int]:
    """Run every line, and say what it ended with."""
    write_song(folder / "song.wav", 0.5)
    (folder / "broken.wav").write_bytes(b"RIFF0000WAVE")
    (folder / "good.txt").write_text("song.wav\n")
    (folder / "mixed.txt").write_text("song.wav\nbroken.wav\n")
    with _inside(folder):
        return {f"demucs-infer {line}".strip(): _exit_code(line) for line in LINES}


def _exit_code(line: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return main(shlex.split(line))
        except SystemExit as left:
            assert isinstance(left.code, int)
            return left.code


def collect_manifest(folder: Path) -> dict[str, Any]:
    """Describe the `stems.json` of a run with nothing asked for: its keys and its settings."""
    write_song(folder / "song.wav", 0.5)
    with _inside(folder):
        assert _exit_code(f"song.wav {_RUN}") == 0
    found = json.loads((folder / "out/tiny/song/stems.json").read_text("utf-8"))
    return {
        "schema": found["schema"],
        "keys": sorted(set(_keys(found))),
        "settings": found["recipe"]["settings"],
        "stems": {name: one["file"] for name, one in found["stems"].items()},
    }


def _keys(found: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every value with its type; stems are all alike."""
    if isinstance(found, dict):
        for name, value in found.items():
            step = "*" if path == "stems" else name
            yield from _keys(value, f"{path}.{step}".lstrip("."))
    elif isinstance(found, list):
        yield f"{path}: list"
        for value in found:
            yield from _keys(value, f"{path}[]")
    else:
        yield f"{path}: {type(found).__name__}"


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Run in a folder; `contextlib.chdir` is younger than the oldest Python we know."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
