"""A drum pipeline that runs the command in a process of its own and reads its bar."""

import re
import subprocess
import sys

command = [sys.executable, "-m", "demucs.separate", "--two-stems=drums", "-n", "htdemucs"]
command += ["--repo", str(REPO), "-d", "cpu", "--shifts", "0", "--float32", "-o", str(OUT)]
done = subprocess.run([*command, str(TRACK)], capture_output=True, text=True, env=ENVIRONMENT)
facts = (
    done.returncode,
    (
        re.findall(r"(\d+)%\|", done.stderr)[-1:],
        bool(re.search(r"([\d.]+)/([\d.]+) \[", done.stderr)),
        re.findall(
            r"(?m)^(?:Separated tracks will be stored in|Separating track) .*$",
            done.stdout.replace(str(OUT), "out"),
        ),
    ),
)
files = [OUT / "htdemucs" / TRACK.stem / f"{name}.wav" for name in ("drums", "no_drums")]
