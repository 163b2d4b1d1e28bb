"""What each step to the fast form buys: `python -m tests.bench.steps` takes one away at a time.

One window of the released htdemucs shape. The least of several interleaved runs, in CPU seconds of
all threads, which a busy machine disturbs less than it does the clock.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from unittest import mock

import torch
from torch import Tensor, nn

from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized import istft as spectra
from demucs_infer.optimized import kernels
from demucs_infer.optimized import layout as memory
from demucs_infer.optimized import winograd as pairs
from demucs_infer.optimized.optimize import optimize
from tests.bench.music import song
from tests.bench.pairs import decibels

FOUR = ["drums", "bass", "other", "vocals"]


def released() -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"bottom_channels": 512, "t_layers": 5, "dconv_mode": 3, "segment": Fraction(39, 5)}
    network = HTDemucs(FOUR, **kwargs).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("scale"):  # they start at 1e-4 and would hide what is behind them
            parameter.data.fill_(0.3)
    return network


@contextmanager
def without(what: str) -> Iterator[None]:
    """One step taken away."""
    taken = {
        "packed kernels": lambda: mock.patch.object(kernels, "packs", lambda: False),
        "scores in the cache": lambda: mock.patch.object(kernels, "halves_products", lambda: False),
        "PyTorch's attention": lambda: mock.patch.object(kernels, "halves_products", lambda: True),
        "tiles in the cache": lambda: mock.patch.object(memory, "_TILE_BYTES", 1 << 40),
        "one copy to the spectrum": lambda: mock.patch.object(spectra, "fits", lambda _: False),
        "rows of bins in pairs": lambda: mock.patch.object(pairs, "fits", lambda *_: False),
        "nothing": lambda: mock.patch.object(memory, "_TILE_BYTES", memory._TILE_BYTES),
    }
    with taken[what]():
        yield


def cpu_seconds(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.process_time()
    answer = run()
    return time.process_time() - started, answer


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench.steps", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network, mix = released(), song(7.8)[None]
    attention = "scores in the cache" if kernels.halves_products() else "PyTorch's attention"
    names = ["nothing", "packed kernels", attention]
    names += ["tiles in the cache", "one copy to the spectrum", "rows of bins in pairs"]
    best: dict[str, float] = {}
    answers: dict[str, Tensor] = {}

    def note(name: str, run: Callable[[], Tensor]) -> None:
        seconds, answers[name] = cpu_seconds(run)
        best[name] = min(seconds, best.get(name, seconds))

    fast = {}
    for name in names:
        with without(name):
            fast[name] = optimize(network)
    half = optimize(network, "bf16")
    with torch.inference_mode():
        for _ in range(args.runs):
            note("the network as written", lambda: network(mix))
            for name in names:
                with without(name):
                    note(name, lambda name=name: fast[name](mix))
            note("bf16", lambda: half(mix))
    print("| one window, htdemucs | CPU s | error against the network as written |\n|---|---|---|")
    reference = answers["the network as written"]
    for name, seconds in best.items():
        label = {"nothing": "the fast form", "the network as written": name}.get(name)
        label = label or ("the fast form in bf16" if name == "bf16" else f"without {name}")
        error = "" if answers[name] is reference else f"{decibels(reference, answers[name]):.0f} dB"
        print(f"| {label} | {seconds:.2f} | {error} |")


if __name__ == "__main__":
    main()
