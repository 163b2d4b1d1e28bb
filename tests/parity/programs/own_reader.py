"""A separator that reads files in its own way, with a limit and fades."""

import soundfile
from demucs.api import Separator
from demucs.audio import convert_audio


class OwnReader(Separator):
    def __init__(self, *args, seconds=2.0, **kwargs):
        self.seconds = seconds
        self.calls = []
        super().__init__(*args, **kwargs)

    def _load_audio(self, track):
        self.calls.append(track.name)
        samples, rate = soundfile.read(track, dtype="float32", always_2d=True)
        wav = convert_audio(
            torch.from_numpy(samples.T.copy()), rate, self._samplerate, self._audio_channels
        )
        return wav[:, : int(self.seconds * self._samplerate)]

    def separate_tensor(self, wav, sr=None):
        mixture, stems = super().separate_tensor(wav, sr)
        return mixture, {name: 0.5 * stem for name, stem in stems.items()}


separator = OwnReader("htdemucs", repo=REPO, shifts=0, seconds=1.5)
mixture, stems = separator.separate_audio_file(TRACK)
result = {"mixture": mixture, **stems}
facts = separator.calls
