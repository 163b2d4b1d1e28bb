"""A wrapper of the command: its list of models, its version of a bag, its exit codes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def call(words):
    command = [sys.executable, "-m", "demucs", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=OUT)


writing = ("--float32", "--clip-mode", "clamp", "-o", OUT / "stems")
writing = (*writing, "--filename", "{stem}-of-{track}.{ext}")
lines = (
    ("--list-models", "--repo", REPO),
    ("-n", "bag", "--repo", REPO, "-d", "cpu", "--shifts", 0, *writing, TRACK),
    ("-n", "absent", "--repo", REPO, TRACK),
    ("--help",),
    ("--no-such-flag",),
)
with ThreadPoolExecutor() as pool:  # each takes seconds to start
    listed, made, bad, helped, refused = pool.map(call, lines)
files = sorted((OUT / "stems").rglob("*.wav"))
facts = (
    listed.returncode,
    [name in listed.stdout for name in ("bag", "htdemucs", "aaaa0000", "time")],
    made.returncode,
    [str(file.relative_to(OUT)) for file in files],
    bad.returncode != 0,
    helped.returncode,
    refused.returncode,
)
