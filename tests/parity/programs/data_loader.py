"""A folder of tracks that workers read and the main process separates."""

from demucs.apply import apply_model
from demucs.audio import AudioFile
from demucs.pretrained import get_model
from demucs.utils import random_subset
from torch.utils.data import DataLoader, Dataset

model = get_model("time", repo=REPO)
rate, channels = model.samplerate, model.audio_channels


class Tracks(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return AudioFile(TRACK).read(
            seek_time=0.5 * index, duration=1, streams=0, samplerate=rate, channels=channels
        )


loader = DataLoader(random_subset(Tracks(), 2), batch_size=2, num_workers=2)
result = {str(index): apply_model(model, batch, shifts=0) for index, batch in enumerate(loader)}
