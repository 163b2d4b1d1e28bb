"""One model for several threads."""

from concurrent.futures import ThreadPoolExecutor

from demucs.api import Separator

separator = Separator("htdemucs", repo=REPO, shifts=0)


def separate(start):
    return separator.separate_tensor(WAV[:, start:], separator.samplerate)[1]["bass"]


with ThreadPoolExecutor(3) as pool:
    result = {
        str(start): stem for start, stem in zip((0, 500, 900), pool.map(separate, (0, 500, 900)))
    }
