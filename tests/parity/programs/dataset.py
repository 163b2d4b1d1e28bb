"""A maker of training data: pseudo stems of every track of a folder, as MUSDB has them."""

import json
import shutil
from pathlib import Path

import soundfile
from demucs.api import Separator, save_audio

music = OUT / "music"
music.mkdir()
for name in ("a", "b"):
    shutil.copy(TRACK, music / f"{name}.wav")
(music / "notes.txt").write_text("no audio")
separator = Separator("bag", repo=Path(REPO), device="cpu", shifts=0, overlap=0.1)
files, index = [], {}
for path in sorted(music.iterdir()):
    if path.suffix not in {".wav", ".mp3", ".flac"}:
        continue
    mixture, stems = separator.separate_audio_file(path)
    folder = OUT / "train" / path.stem
    folder.mkdir(parents=True)
    save_audio(mixture, folder / "mixture.wav", separator.samplerate, clip="none", as_float=True)
    for stem, wav in stems.items():
        save_audio(
            wav, folder / f"{stem}.wav", separator.samplerate, clip="rescale", bits_per_sample=24
        )
    index[path.stem] = {
        file.name: [soundfile.info(file).frames, soundfile.info(file).subtype]
        for file in sorted(folder.iterdir())
    }
    files += sorted(folder.iterdir())
files = files[:5]
facts = json.dumps(index, sort_keys=True)
