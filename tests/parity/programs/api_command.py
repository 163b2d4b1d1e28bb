"""The module of the library as a command."""

import subprocess
import sys

command = [sys.executable, "-m", "demucs.api", "-n", "time", "--repo", str(REPO), "-d", "cpu"]
command += ["--shifts", "0", "--float32", "-o", str(OUT), str(TRACK)]
facts = subprocess.run(command, capture_output=True, env=ENVIRONMENT).returncode
files = [OUT / "time" / TRACK.stem / f"{name}.wav" for name in ("drums", "vocals")]
