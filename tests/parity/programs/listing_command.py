"""A wrapper of the command: its list of models, its version of a bag, its exit codes."""

import subprocess
import sys


def call(*words):
    command = [sys.executable, "-m", "demucs", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=OUT)


listed = call("--list-models", "--repo", REPO)
made = call(
    *("-n", "bag", "--repo", REPO, "-d", "cpu", "--shifts", 0, "--float32", "--clip-mode", "clamp"),
    *("-o", OUT / "stems", "--filename", "{stem}-of-{track}.{ext}", TRACK),
)
files = sorted((OUT / "stems").rglob("*.wav"))
bad = call("-n", "absent", "--repo", REPO, TRACK)
facts = (
    listed.returncode,
    [name in listed.stdout for name in ("bag", "htdemucs", "aaaa0000", "time")],
    made.returncode,
    [str(file.relative_to(OUT)) for file in files],
    bad.returncode != 0,
    call("--help").returncode,
    call("--no-such-flag").returncode,
)
