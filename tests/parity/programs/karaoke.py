"""A karaoke maker: everything but the vocals, as a file."""

from pathlib import Path

from demucs.api import Separator, save_audio

separator = Separator(model="bag", repo=REPO, shifts=0)
origin, stems = separator.separate_audio_file(Path(TRACK))
karaoke = sum(stem for name, stem in stems.items() if name != "vocals")
save_audio(karaoke, OUT / "karaoke.wav", samplerate=separator.samplerate, as_float=True)
result = {"karaoke": karaoke, "vocals": origin - karaoke}
files = [OUT / "karaoke.wav"]
