"""A researcher: hooks on layers, copies, and and weights that are saved and changed."""

import copy
import io

from demucs.apply import apply_model
from demucs.pretrained import get_model
from torch import nn

model = get_model("htdemucs", repo=REPO)
network = model.models[0]
seen = []
handles = [
    layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    for layer in (*network.encoder, *network.tencoder)
]
apply_model(model, WAV[None, :, :8000], shifts=0, device="cpu")
for handle in handles:
    handle.remove()
twin = copy.deepcopy(model)
buffer = io.BytesIO()
torch.save(network.state_dict(), buffer)
buffer.seek(0)
twin.models[0].load_state_dict(torch.load(buffer))
half = copy.deepcopy(network)
with torch.no_grad():
    for parameter in half.parameters():
        parameter.mul_(0.5)
result = {
    "twin": apply_model(twin, WAV[None], shifts=0)[0],
    "half": apply_model(half, WAV[None], shifts=0)[0],
}
convolutions = [module for module in network.modules() if isinstance(module, nn.Conv1d)]
facts = seen, len(list(network.encoder)), len(convolutions)
