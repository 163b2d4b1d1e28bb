"""A program that cuts and trims by itself."""

from demucs.apply import TensorChunk, tensor_chunk
from demucs.pretrained import get_model
from demucs.spec import ispectro, spectro
from demucs.utils import center_trim, unfold

model = get_model("time", repo=REPO)
chunk = TensorChunk(tensor_chunk(WAV[None]), 3000, 4000)
length = model.valid_length(chunk.length)
with torch.no_grad():
    stems = center_trim(model(chunk.padded(length)), chunk.length)
z = spectro(WAV, 512, pad=1)
result = {
    "stems": stems,
    "real": z.real,
    "back": ispectro(z, 128, WAV.shape[-1], pad=1),
    "frames": unfold(WAV, 100, 50),
}
facts = chunk.shape
