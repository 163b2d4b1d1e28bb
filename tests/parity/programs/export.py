"""An exporter: the spectrogram outside of the network, and the trace of a layer."""

import warnings

from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs
from demucs.pretrained import get_model

model = get_model("aaaa0000", repo=REPO)
mix = WAV[None, :, : int(model.segment * model.samplerate)]
spectrum = model._spec(mix)
parts = model._magnitude(spectrum)
back = model._ispec(spectrum, mix.shape[-1])
layer = model.encoder[0]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the tracer is deprecated, but exporters use it
    traced = torch.jit.trace(layer, parts)
result = {
    "spectrum": torch.view_as_real(spectrum),
    "parts": parts,
    "back": back,
    "masked": torch.view_as_real(model._mask(spectrum, parts[:, None])),
    "traced": traced(parts).detach(),
}
facts = (
    isinstance(model, HTDemucs),
    issubclass(HTDemucs, HDemucs),
    sum(parameter.numel() for parameter in model.parameters()),
    model.nfft,
    model.hop_length,
    model.depth,
    model.cac,
)
