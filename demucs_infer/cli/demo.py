"""`demucs-infer --demo`: a song with nothing to download, and how well it came apart."""

import shutil
import sys
from pathlib import Path

from demucs_infer.batch.result import TrackResult


def compose(folder: Path) -> Path:
    """A file with a song of our own making."""
    from demucs_infer.audio.writer import save_audio
    from demucs_infer.demo import song

    made = song()
    path = folder / "demo.wav"
    save_audio(made.mix, path, made.sample_rate)
    return path


def save_and_score(result: TrackResult, source: Path) -> None:
    """The song beside its stems; what they score goes to the error stream."""
    from demucs_infer.audio.reader import load_track
    from demucs_infer.demo import STEMS, song
    from demucs_infer.metrics import Evaluation, score

    first = next(iter(result.stems.values()))
    shutil.copyfile(source, first.with_name("mixture.wav"))
    made = song()
    truth = dict(zip(STEMS, made.stems, strict=True))
    known = {name: path for name, path in result.stems.items() if name in truth}
    guess = {name: load_track(path, 2, made.sample_rate) for name, path in known.items()}
    same = {name: stem for name, stem in guess.items() if stem.shape == truth[name].shape}
    if same:
        report = Evaluation(tuple(score("demo", {name: truth[name] for name in same}, same)))
        sys.stderr.write(f"{report.table()}\n")
