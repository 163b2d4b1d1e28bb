"""A program that keeps its model in half precision while it is not in use."""

from demucs.apply import apply_model
from demucs.pretrained import get_model

model = get_model("htdemucs", repo=REPO).to(torch.device("cpu")).eval().half()
kinds = {str(parameter.dtype) for parameter in model.parameters()}
model = model.float()
with torch.no_grad():
    result = {"sources": apply_model(model, WAV[None], shifts=0, segment=0.9)}
facts = kinds
