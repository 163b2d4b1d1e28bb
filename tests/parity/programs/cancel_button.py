"""A window whose cancel button ends the work, after which it works again."""

from demucs.api import Separator

calls = []


def stop(call):
    calls.append(call)
    if len(calls) == 3:
        raise KeyboardInterrupt


separator = Separator("htdemucs", repo=REPO, shifts=0, callback=stop)
try:
    separator.separate_audio_file(TRACK)
    cancelled = False
except KeyboardInterrupt:
    cancelled = True
separator.update_parameter(callback=None)
_, result = separator.separate_audio_file(TRACK)
facts = cancelled, len(calls)
