"""A front-end of a transcriber: long files part by part, vocals mixed down, silence cut."""

from demucs.apply import apply_model
from demucs.audio import AudioFile, convert_audio
from demucs.pretrained import get_model

model = get_model("htdemucs", repo=REPO)
file = AudioFile(TRACK)
vocals = model.sources.index("vocals")
parts, at, seconds = [], 0.0, 1.25
while at < file.duration:
    wav = file.read(
        seek_time=at,
        duration=seconds,
        streams=0,
        samplerate=model.samplerate,
        channels=model.audio_channels,
    )
    parts.append(apply_model(model, wav[None], shifts=0, split=True, overlap=0.1)[0, vocals])
    at += seconds
voice = torch.cat(parts, dim=-1)
mono = convert_audio(voice, model.samplerate, 16000, 1)
loud = (mono.abs() > 0.01).nonzero()[:, 1]
result = {"voice": voice, "mono": mono}
facts = round(file.duration, 3), file.channels(), file.samplerate(), len(file), len(loud) > 0
