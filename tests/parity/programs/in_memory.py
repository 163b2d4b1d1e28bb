"""An upload that never touches the disk."""

from io import BytesIO

import soundfile
from demucs.api import Separator

upload = BytesIO(TRACK.read_bytes())
data, rate = soundfile.read(upload, dtype="float32", always_2d=True)
separator = Separator(model="time", repo=REPO, device="cpu", shifts=0)
_, stems = separator.separate_tensor(torch.from_numpy(data.T.copy()), rate)
result = {}
for name, stem in stems.items():
    answer = BytesIO()
    soundfile.write(answer, stem.T.numpy(), separator.samplerate, format="WAV", subtype="FLOAT")
    answer.seek(0)
    result[name] = soundfile.read(answer, dtype="float32", always_2d=True)[0].T
