"""A bag of networks with weights of one's own."""

from demucs.apply import BagOfModels, apply_model
from demucs.pretrained import get_model

members = [get_model(name, repo=REPO) for name in ("aaaa0000", "bbbb1111")]
weights = [[2.0, 0.0, 1.0, 0.5], [1.0, 1.0, 3.0, 0.5]]
bag = BagOfModels(members, weights=weights, segment=0.8)
result = dict(zip(bag.sources, apply_model(bag, WAV[None], shifts=0, overlap=0.1)[0]))
facts = [float(member.segment) for member in bag.models]
