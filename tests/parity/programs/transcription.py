"""Vocals for a speech recognizer: mono, 16 kHz, in a temporary file."""

import tempfile
from pathlib import Path

import soundfile
from demucs.apply import apply_model
from demucs.audio import convert_audio, save_audio
from demucs.pretrained import get_model

model = get_model("htdemucs", repo=REPO)
data, rate = soundfile.read(TRACK, dtype="float32", always_2d=True)
wav = convert_audio(torch.from_numpy(data.T), rate, model.samplerate, model.audio_channels)
sources = apply_model(model, wav[None], shifts=0, device="cpu")[0]
vocals = sources[model.sources.index("vocals")]
speech = convert_audio(vocals, model.samplerate, 16000, 1)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "speech.wav"
    save_audio(speech, str(path), 16000, clip="clamp", as_float=True)
    heard, heard_rate = soundfile.read(path, dtype="float32", always_2d=True)
result = {"speech": heard.T}
facts = heard_rate
