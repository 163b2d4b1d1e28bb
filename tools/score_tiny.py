"""Score the bundled model on held-out studio songs, next to its lower and upper bounds.

    python -m tools.studio held_out --first 9000 --songs 20 --seconds 30
    python tools/score_tiny.py held_out demucs_infer/tiny.safetensors

Rows: silence, the untrained network, the model, and the ideal ratio mask, which uses the true
magnitudes. Values: SDR above the mixture's, in decibels, over the songs in which the stem is
audible.
Shapes: S = 4 stems, C = 2 channels, T samples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from demucs_infer.apply import apply_model
from demucs_infer.metrics import sdr
from demucs_infer.states import load_model

STEMS = ("drums", "bass", "other", "vocals")
SAMPLE_RATE = 44100
AUDIBLE = 1e-4  # mean power relative to the mix; a stem below -40 dB counts as silent


def separate(network: nn.Module, mix: Tensor) -> Tensor:
    """Separate at the level of the training, and undo it: (C T) -> (S C T)."""
    mean, std = mix.mean(), mix.mean(0).std()
    stems = apply_model(network, (mix - mean)[None] / std, overlap=0.25, shifts=0)
    return stems[0] * std + mean


def ideal_ratio_mask(stems: Tensor, window: int = 4096) -> Tensor:
    """Apply masks made of the true magnitudes to the mix: (S C T) -> (S C T)."""
    hann = torch.hann_window(window)
    length = stems.shape[-1]
    flat = torch.stft(stems.flatten(0, 1), window, window // 4, window=hann, return_complex=True)
    spectra = flat.unflatten(0, stems.shape[:2])
    power = spectra.abs().square()
    masked = spectra.sum(0) * power / (power.sum(0) + 1e-10)
    out = torch.istft(masked.flatten(0, 1), window, window // 4, window=hann, length=length)
    return out.unflatten(0, stems.shape[:2])


def compute_improvement(stems: Tensor, estimate: Tensor) -> list[float]:
    """Return the SDR of each stem above the mixture's; NaN where the stem is silent."""
    mix = stems.sum(0)
    floor = AUDIBLE * mix.square().mean()
    gains = []
    for stem, guess in zip(stems, estimate, strict=True):
        reached, unmixed = sdr(stem, guess), sdr(stem, mix)
        audible = reached is not None and unmixed is not None and stem.square().mean() > floor
        gains.append(reached - unmixed if audible else float("nan"))
    return gains


def main() -> None:
    """Parse the arguments, score every song, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("songs", type=Path)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    network = load_model(args.model)
    torch.manual_seed(0)
    untrained = load_model(args.model)
    for module in untrained.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "silence": torch.zeros_like,
        "untrained": lambda stems: separate(untrained, stems.sum(0)),
        "tiny": lambda stems: separate(network, stems.sum(0)),
        "ideal ratio mask": ideal_ratio_mask,
    }
    gains: dict[str, list[list[float]]] = {name: [] for name in rows}
    busy = audio = 0.0
    for path in sorted(args.songs.glob("*.npy")):
        stems = torch.from_numpy(np.load(path).astype(np.float32))
        for name, estimator in rows.items():
            began = time.process_time()
            estimate = estimator(stems)
            if name == "tiny":
                busy += time.process_time() - began
                audio += stems.shape[-1] / SAMPLE_RATE
            gains[name].append(compute_improvement(stems, estimate))
        print(path.name, [round(value, 2) for value in gains["tiny"][-1]], flush=True)
    for name, values in gains.items():
        for kind, average in (("mean", np.nanmean), ("median", np.nanmedian)):
            row = dict(zip(STEMS, average(values, 0).round(2).tolist(), strict=True))
            print(json.dumps({"row": name, kind: row, "songs": len(values)}))
    print(f"{audio / busy:.1f} seconds of audio for one of a core")


if __name__ == "__main__":
    main()
