"""Memory does not depend on the length of a track."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Runs a generated track through an identity network, and prints the peak resident memory of the
# process in kB, the number of samples and the largest error.
PROGRAM = """
import resource, sys
import torch
from demucs_infer.options import SeparationOptions
from demucs_infer.engine.pipeline import Block
from demucs_infer.engine.pipeline import separate
from tests.helpers.networks import ScaleModel

torch.set_num_threads(1)
seconds, rate = int(sys.argv[1]), 16000
piece = 0.1 * torch.randn(2, 10 * rate, generator=torch.Generator().manual_seed(0))

class Long:
    channels = 2

    def blocks(self):
        for _ in range(seconds // 10):
            yield piece

network = ScaleModel(["mix"], [1.0], samplerate=rate, segment=10.0)
at, error = 0, 0.0
for item in separate(Long(), network, options=SeparationOptions(shifts=int(sys.argv[2]))):
    if isinstance(item, Block):
        assert item.start == at
        first = at % (10 * rate)
        count = min(item.stems.shape[-1], 10 * rate - first)
        here = item.stems[0, :, :count] - piece[:, first : first + count]
        error = max(error, float(here.abs().max()))
        at += item.stems.shape[-1]
print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]), at, error)
"""


def measure_peaks(*seconds: int, shifts: int) -> list[tuple[int, int, float]]:
    """Return the results of `measure_peak` for tracks of several lengths."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(partial(measure_peak, shifts=shifts), seconds)]


def measure_peak(seconds: int, shifts: int) -> tuple[int, int, float]:
    """Return (peak memory in kB, samples returned, largest error)."""
    command = [sys.executable, "-c", PROGRAM, str(seconds), str(shifts)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    kilobytes, samples, error = done.stdout.split()
    return int(kilobytes), int(samples), float(error)


def test_memory_does_not_depend_on_track_length() -> None:
    (short, num_short, _), (long, num_long, error) = measure_peaks(300, 3 * 3600, shifts=1)
    assert (num_short, num_long) == (300 * 16_000, 3 * 3600 * 16_000)
    assert error <= 1e-6  # weights and level divided out again
    # Three hours of one stem alone would be 1.4 GB more; 5 % is what the allocator varies by.
    assert long <= 1.05 * short, f"{short} kB for five minutes, {long} kB for three hours"


def test_memory_of_several_passes_does_not_depend_on_track_length() -> None:
    (short, _, _), (long, _, _) = measure_peaks(300, 1800, shifts=3)
    assert long <= 1.05 * short, f"{short} kB for five minutes, {long} kB for half an hour"
