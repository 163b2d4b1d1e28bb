"""A service: an upload becomes a temporary file, the stems a zip; errors become status codes."""

import io
import os
import tempfile
import zipfile

import soundfile
from demucs.api import LoadAudioError, LoadModelError, Separator, save_audio
from demucs.repo import ModelLoadingError

separators = {}


def handle(name, data, suffix=".wav"):
    try:
        if name not in separators:
            separators[name] = Separator(model=name, repo=REPO, shifts=0, segment=None)
        separator = separators[name]
    except (LoadModelError, ModelLoadingError):
        return 404, None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"upload{suffix}")
        with open(path, "wb") as file:
            file.write(data)
        try:
            _, stems = separator.separate_audio_file(path)
        except LoadAudioError:
            return 422, None
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as zipped:
            for stem, wav in stems.items():
                out = os.path.join(folder, f"{stem}.wav")
                save_audio(wav, out, samplerate=separator.samplerate, as_float=True, clip="clamp")
                zipped.write(out, f"{stem}.wav")
    return 200, archive.getvalue()


status, body = handle("bag", TRACK.read_bytes())
result = {}
with zipfile.ZipFile(io.BytesIO(body)) as zipped:
    for name in zipped.namelist():
        result[name] = soundfile.read(io.BytesIO(zipped.read(name)))[0]
facts = status, handle("absent", b"")[0], handle("bag", b"this is no audio file")[0]
