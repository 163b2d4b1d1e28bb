"""A hosted service whose separator takes a model that was loaded at the start."""

from demucs.api import Separator
from demucs.pretrained import get_model


class LoadedSeparator(Separator):
    def __init__(self, model, shifts=0, overlap=0.25):
        self._model = model
        self._audio_channels = model.audio_channels
        self._samplerate = model.samplerate
        self.update_parameter(
            device="cpu",
            shifts=shifts,
            overlap=overlap,
            split=True,
            segment=None,
            jobs=0,
            progress=False,
            callback=None,
            callback_arg=None,
        )


model = get_model("bag", repo=REPO)
first, second = LoadedSeparator(model), LoadedSeparator(model, overlap=0.5)
result = first.separate_audio_file(TRACK)[1]
result["half"] = second.separate_tensor(WAV, RATE)[1]["drums"]
facts = first.samplerate, first.audio_channels, first.model is model
