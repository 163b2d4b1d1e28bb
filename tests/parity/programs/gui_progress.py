"""A window with a progress bar that is fed by the callback."""

from demucs.api import Separator

positions = []


def show(call):
    if call["state"] == "end":
        passes = call["model_idx_in_bag"] / call["models"]
        part = call["segment_offset"] / call["audio_length"] / call["models"]
        positions.append(round(passes + part, 6))


separator = Separator("bag", repo=REPO, shifts=0, callback=show, callback_arg={"window": "main"})
_, result = separator.separate_audio_file(TRACK)
facts = sorted(positions)
