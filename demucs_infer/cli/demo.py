"""`demucs-infer --demo`: separate a synthesized song, and score the stems against the true ones."""

import shutil
import sys
from pathlib import Path

from demucs_infer.batch.result import TrackResult


def write_song(folder: Path) -> Path:
    """Synthesize the demo song into a file of that folder."""
    from demucs_infer.audio.writer import save_audio
    from demucs_infer.demo import song

    demo = song()
    path = folder / "demo.wav"
    save_audio(demo.mix, path, demo.sample_rate)
    return path


def save_and_score(result: TrackResult, source: Path) -> None:
    """Copy the song beside its stems, and print the scores of the stems on standard error."""
    from demucs_infer.audio.reader import load_track
    from demucs_infer.demo import STEMS, song
    from demucs_infer.metrics import Evaluation, score

    first = next(iter(result.stems.values()))
    shutil.copyfile(source, first.with_name("mixture.wav"))
    demo = song()
    references = dict(zip(STEMS, demo.stems, strict=True))
    estimates = {
        name: load_track(path, 2, demo.sample_rate)
        for name, path in result.stems.items()
        if name in references
    }
    # Stems of a part of the song (--start, --duration) have no score.
    names = [name for name, stem in estimates.items() if stem.shape == references[name].shape]
    if names:
        rows = score(
            "demo",
            {name: references[name] for name in names},
            {name: estimates[name] for name in names},
        )
        sys.stderr.write(f"{Evaluation(tuple(rows)).table()}\n")
