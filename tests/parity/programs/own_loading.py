"""A separator that loads its model in its own way."""

from demucs.api import Separator
from demucs.pretrained import get_model


class OwnSeparator(Separator):
    def _load_model(self):
        self._model = get_model(self._name.removeprefix("our-"), REPO)
        self._audio_channels = self._model.audio_channels
        self._samplerate = self._model.samplerate

    def vocals(self, wav):
        return self.separate_tensor(wav, self._samplerate)[1]["vocals"]


result = {"vocals": OwnSeparator("our-htdemucs", shifts=0).vocals(WAV)}
