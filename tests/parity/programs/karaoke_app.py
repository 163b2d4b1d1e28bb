"""A karaoke window: models to choose from, a bar that the callback moves, a second try."""

import demucs.api

names = sorted(demucs.api.list_models(REPO)["bag"])
moves = []


def move_bar(state):
    if state["state"] == "end":
        done = state["segment_offset"] / state["audio_length"]
        part = (state["model_idx_in_bag"] + state["shift_idx"] / 2 + done / 2) / state["models"]
        moves.append((state["window"], round(part, 6)))


separator = demucs.api.Separator(
    names[0], REPO, device="cpu", shifts=0, callback=move_bar, callback_arg={"window": "main"}
)
original, stems = separator.separate_audio_file(TRACK)
backing = sum(wav for name, wav in stems.items() if name != "vocals")
first = list(moves)
moves.clear()
separator.update_parameter(overlap=0.1, segment=0.5, callback_arg={"window": "retry"})
_, again = separator.separate_tensor(original, separator.samplerate)
separator.update_parameter(callback=None)
separator.separate_tensor(original[:, :8000], separator.samplerate)
demucs.api.save_audio(backing, OUT / "backing.wav", RATE, clip="clamp", as_float=True)
result = {"original": original, "vocals": again["vocals"], "backing": backing}
files = [OUT / "backing.wav"]
facts = names, sorted(first), sorted(moves), separator.samplerate, separator.audio_channels
