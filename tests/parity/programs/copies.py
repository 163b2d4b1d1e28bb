"""A program that copies its separator for every worker, and sends it to other processes."""

import copy
import pickle

from demucs.api import Separator

separator = Separator("bag", repo=REPO, device="cpu", shifts=0, overlap=0.1)
deep, sent = copy.deepcopy(separator), pickle.loads(pickle.dumps(separator))
deep.update_parameter(overlap=0.5)
result = {}
for name, each in (("original", separator), ("deep", deep), ("sent", sent)):
    _, stems = each.separate_tensor(WAV, RATE)
    result |= {f"{name}-{stem}": wav for stem, wav in stems.items()}
facts = separator.model is not deep.model, sent.samplerate, sent.audio_channels
