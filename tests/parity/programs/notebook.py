"""Cells that are run again with other settings."""

import random

import demucs.api

separator = demucs.api.Separator(model="bag", repo=REPO, segment=1)
random.seed(0)
_, once = separator.separate_tensor(WAV)
separator.update_parameter(shifts=0, overlap=0.5, split=True)
_, again = separator.separate_tensor(WAV)
separator.update_parameter(overlap=0.1, segment=None)
_, last = separator.separate_tensor(WAV)
result = {
    f"{name} {stem}": wav
    for name, stems in (("once", once), ("again", again), ("last", last))
    for stem, wav in stems.items()
}
facts = {kind: sorted(names) for kind, names in demucs.api.list_models(REPO).items()}
