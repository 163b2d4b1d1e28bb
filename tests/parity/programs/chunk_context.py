"""A player that separates the part on screen, with what is around it as context."""

from demucs.apply import TensorChunk, apply_model
from demucs.pretrained import get_model

model = get_model("bag", repo=REPO)
track = WAV[None]
part = TensorChunk(track, 5000, 6000)
late = TensorChunk(TensorChunk(track, 500), 14000, 9000)
one_piece = {"split": False, "shifts": 0}
result = {
    "middle": apply_model(model, part, shifts=0),
    "end": apply_model(model, late, shifts=0, overlap=0.5),
    "piece": apply_model(get_model("time", repo=REPO), part, **one_piece),
    "whole": apply_model(model, TensorChunk(track), shifts=0, segment=0.5),
}
