"""A web app whose audio component gives and takes (sample rate, int16 samples by time)."""

import numpy as np
from demucs.apply import apply_model
from demucs.audio import convert_audio
from demucs.pretrained import get_model

model = get_model(name="htdemucs", repo=REPO)
model.cpu()
model.eval()


def separate(audio, stem):
    rate, samples = audio
    wav = torch.from_numpy(samples.astype(np.float32) / 32768.0)
    wav = wav[None] if wav.ndim == 1 else wav.t()
    wav = convert_audio(wav, rate, model.samplerate, model.audio_channels)
    ref = wav.mean(0)
    wav = (wav - ref.mean()) / ref.std()
    with torch.no_grad():
        sources = apply_model(model, wav[None], device="cpu", shifts=0, progress=False)[0]
    sources = sources * ref.std() + ref.mean()
    picked = sources[model.sources.index(stem)]
    return model.samplerate, picked.t().numpy()


rng = np.random.default_rng(0)
mono = (rng.standard_normal(12000) * 4000).astype(np.int16)
stereo = (rng.standard_normal((9000, 2)) * 4000).astype(np.int16)
result = {
    "mono": separate((16000, mono), "vocals")[1],
    "stereo": separate((RATE, stereo), "drums")[1],
}
