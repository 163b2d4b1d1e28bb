"""A program that decides by what a model is."""

from demucs.apply import BagOfModels
from demucs.htdemucs import HTDemucs
from demucs.pretrained import get_model


def describe(model):
    is_bag = isinstance(model, BagOfModels)
    members = list(model.models) if is_bag else [model]
    return {
        "bag": is_bag,
        "sources": list(model.sources),
        "rate": model.samplerate,
        "channels": model.audio_channels,
        "weights": [list(row) for row in model.weights] if is_bag else None,
        "segments": [float(member.segment) for member in members],
        "longest": float(model.max_allowed_segment) if is_bag else None,
        "transformers": [isinstance(member, HTDemucs) for member in members],
        "training": [member.training for member in members],
        "parameters": [sum(p.numel() for p in member.parameters()) for member in members],
        "names": [sorted(member.state_dict()) for member in members],
        "window": members[0].valid_length(5000),
    }


facts = [describe(get_model(name, REPO)) for name in ("bag", "htdemucs", "aaaa0000", "time")]
