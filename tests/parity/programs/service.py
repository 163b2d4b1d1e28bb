"""A service that normalizes by itself and shows a bar."""

import random

from demucs.apply import apply_model
from demucs.audio import AudioFile
from demucs.pretrained import get_model

random.seed(0)
model = get_model(name="bag", repo=REPO)
model.cpu()
model.eval()
wav = AudioFile(TRACK).read(streams=0, samplerate=model.samplerate, channels=model.audio_channels)
ref = wav.mean(0)
wav = (wav - ref.mean()) / ref.std()
sources = apply_model(
    model,
    wav[None],
    device="cpu",
    shifts=2,
    split=True,
    overlap=0.25,
    progress=True,
    num_workers=2,
)[0]
sources = sources * ref.std() + ref.mean()
result = dict(zip(model.sources, sources))
