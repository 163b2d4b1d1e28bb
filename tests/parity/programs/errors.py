"""A program that tells its users what is wrong."""

from demucs.api import LoadAudioError, Separator
from demucs.pretrained import ModelLoadingError, get_model

caught = []
try:
    get_model("nosuch", REPO)
except ModelLoadingError as error:
    caught.append(isinstance(error, RuntimeError))
separator = Separator("time", repo=REPO)
(OUT / "text.wav").write_text("no sound")
for path in (OUT / "text.wav", OUT / "absent.wav"):
    try:
        separator.separate_audio_file(path)
    except LoadAudioError as error:
        caught.append(bool(str(error)))
facts = caught
