"""Play parts with FluidSynth and the FluidR3 soundfont.

Shapes: C = 2 channels, T samples.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.studio.midi import Part, write_midi

SAMPLE_RATE = 44100
SOUNDFONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")

Audio = NDArray[np.float32]


def _command(midi: Path, raw: Path, limit: int) -> list[str]:
    settings = ["synth.dynamic-sample-loading=1", "synth.polyphony=128"]
    options = [word for setting in settings for word in ("-o", setting)]
    dry = ["-R", "0", "-C", "0", "-g", "0.5"]
    file = ["-r", str(SAMPLE_RATE), "-T", "raw", "-O", "float", "-E", "little", "-F", str(raw)]
    # If FluidSynth missed the end of the song, it would fill the disk.
    bounded = ["prlimit", f"--fsize={limit}", "timeout", "60"]
    return [
        *bounded,
        "fluidsynth",
        "-q",
        "-n",
        "-i",
        *options,
        *dry,
        *file,
        str(SOUNDFONT),
        str(midi),
    ]


def play(parts: list[Part], seconds: float) -> Audio:
    """Render the parts without effects: (C T)."""
    length = round(seconds * SAMPLE_RATE)
    if not any(part.notes for part in parts):
        return np.zeros((2, length), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        midi, raw = Path(folder, "song.mid"), Path(folder, "song.raw")
        write_midi(midi, parts, seconds)
        limit = 2**28 + 4 * 8 * length  # FluidSynth's sound drivers map 64 MB when it starts
        subprocess.run(_command(midi, raw, limit), check=True, capture_output=True)
        samples = np.fromfile(raw, np.float32).reshape(-1, 2).T
    out = np.zeros((2, length), np.float32)
    available = min(length, samples.shape[1])
    out[:, :available] = samples[:, :available]
    return out
