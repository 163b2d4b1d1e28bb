"""Train the small bundled model on the songs of the studio.

    python -m tools.studio songs --first 4 --songs 150
    python -m tools.studio validation --first 0 --songs 4
    python tools/train_tiny.py songs validation run --minutes 60
    torchrun --nproc-per-node 2 tools/train_tiny.py ...  (two workers of a thread each)

A run stops after its minutes; started again with more, it resumes from its last checkpoint.
Shapes: B batch, S = 4 stems, C = 2 channels, T samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from demucs_infer.hdemucs import HDemucs

SOURCES = ["drums", "bass", "other", "vocals"]
SAMPLE_RATE = 44100
ARCHITECTURE: dict[str, Any] = {
    "sources": SOURCES,
    "hybrid": False,
    "cac": False,
    "wiener_iters": -1,
    "end_iters": -1,
    "depth": 5,
    "channels": 16,
    "dconv_init": 0.1,
    "segment": 8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the network is trained."""

    minutes: float
    seed: int = 1
    learning_rate: float = 2e-3
    warm_up_steps: int = 60
    batch: int = 2
    """Examples per worker and step; the workers' gradients are averaged."""
    seconds: float = 3.0
    average: float = 0.995
    """Share of the averaged weights that a step keeps."""
    same_song: float = 0.3
    """Probability that all stems of an example come from one moment of one song."""
    precision: torch.dtype = torch.bfloat16


class Songs:
    """Random excerpts of the songs in a folder, which may still be growing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.songs: list[np.memmap[Any, Any]] = []
        self.refresh()

    def refresh(self) -> None:
        """Look for new songs."""
        paths = sorted(self.folder.glob("*.npy"), key=lambda path: int(path.stem))
        self.songs = [np.load(path, mmap_mode="r") for path in paths]

    def draw_position(self, rng: Generator, length: int) -> tuple[int, int]:
        """Draw a song and a start position in it."""
        song = int(rng.integers(len(self.songs)))
        return song, int(rng.integers(self.songs[song].shape[-1] - length))

    def example(self, rng: Generator, length: int, same_song: float) -> np.ndarray[Any, Any]:
        """Draw stems with random levels, channel orders and signs: (S C T)."""
        together = rng.random() < same_song
        song, start = self.draw_position(rng, length)
        stems = np.empty((len(SOURCES), 2, length), np.float32)
        for index in range(len(SOURCES)):
            if not together:
                song, start = self.draw_position(rng, length)
            stem = self.songs[song][index, :, start : start + length].astype(np.float32)
            gain = 10 ** (rng.uniform(-6, 6) * (0.4 if together else 1) / 20)
            gain *= float(rng.choice([-1, 1])) * (rng.random() > 0.06)
            stems[index] = gain * (stem[::-1] if rng.random() < 0.5 else stem)
        return stems

    def batch(self, rng: Generator, recipe: Recipe) -> Tensor:
        """Draw a batch of examples whose mixes have unit power: (B S C T)."""
        length = int(recipe.seconds * SAMPLE_RATE)
        examples = [self.example(rng, length, recipe.same_song) for _ in range(recipe.batch)]
        stems = torch.from_numpy(np.stack(examples))
        power = stems.sum(1).square().mean((1, 2)).clamp_min(1e-8)
        return stems / power.sqrt()[:, None, None, None]


@dataclass(slots=True)
class Run:
    """The state of a training, as in its checkpoint."""

    network: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    minutes: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        state = {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
        }
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        partial.rename(path)

    def load(self, path: Path) -> None:
        """Read the checkpoint."""
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.minutes = state["step"], state["minutes"]


def start_run(recipe: Recipe, architecture: dict[str, Any]) -> Run:
    """Initialize a training."""
    torch.manual_seed(recipe.seed)
    network = HDemucs(**architecture)
    optimizer = torch.optim.Adam(network.parameters(), recipe.learning_rate, betas=(0.9, 0.99))
    averaged = copy.deepcopy(network).eval().requires_grad_(False)
    return Run(network, averaged, optimizer)


def average_gradients(network: nn.Module) -> None:
    """Average the gradients over all workers."""
    if not distributed.is_initialized():
        return
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= distributed.get_world_size()
    parts = together.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def broadcast(value: float) -> float:
    """Broadcast the first worker's `value` to all workers."""
    if distributed.is_initialized():
        tensor = torch.tensor(value, dtype=torch.float64)
        distributed.broadcast(tensor, 0)
        return float(tensor)
    return value


def take_step(run: Run, stems: Tensor, recipe: Recipe) -> float:
    """Take one step and return its loss, the mean absolute error of the waveform."""
    progress = min(run.minutes / recipe.minutes, 1.0)
    rate = recipe.learning_rate * min(1.0, (run.step + 1) / recipe.warm_up_steps)
    rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", recipe.precision, enabled=recipe.precision != torch.float32):
        estimate = run.network(stems.sum(1))
    loss = F.l1_loss(estimate.float(), stems)
    run.optimizer.zero_grad()
    loss.backward()
    average_gradients(run.network)
    nn.utils.clip_grad_norm_(run.network.parameters(), 5.0)
    run.optimizer.step()
    run.step += 1
    keep = min(recipe.average, 1 - 1 / (1 + run.step / 4))
    with torch.no_grad():
        for mean, now in zip(run.averaged.parameters(), run.network.parameters(), strict=True):
            mean.lerp_(now, 1 - keep)
    return float(loss.detach())


@torch.inference_mode()
def compute_improvements(network: nn.Module, songs: Songs, seconds: float = 12.0) -> list[float]:
    """Return each stem's SDR above the mixture's in decibels, averaged over excerpts."""
    gains = []
    for song in songs.songs:
        first = 8 * SAMPLE_RATE
        part = song[..., first : first + int(seconds * SAMPLE_RATE)]
        stems = torch.from_numpy(part.astype(np.float32))
        mix = stems.sum(0)
        estimate = network(mix[None] / mix.std())[0] * mix.std()
        error = (stems - estimate).square().sum((1, 2)) + 1e-7
        unmixed = (stems - mix).square().sum((1, 2)) + 1e-7
        gain = 10 * torch.log10(unmixed / error)
        gain[stems.square().sum((1, 2)) < 1e-3] = torch.nan  # silent
        gains.append(gain)
    return [round(float(gain), 2) for gain in torch.stack(gains).nanmean(0)]


def train(run: Run, recipe: Recipe, songs: Songs, validation: Songs, folder: Path) -> None:
    """Train until the minutes are over, with a checkpoint and a log line every three."""
    worker = distributed.get_rank() if distributed.is_initialized() else 0
    rng = np.random.default_rng([recipe.seed, run.step, worker])
    before, saved = run.minutes, time.monotonic()
    began, losses = saved, []
    while run.minutes < recipe.minutes:
        losses.append(take_step(run, songs.batch(rng, recipe), recipe))
        run.minutes = broadcast(before + (time.monotonic() - began) / 60)
        if worker == 0 and (time.monotonic() - saved > 180 or run.minutes >= recipe.minutes):
            saved = time.monotonic()
            run.save(folder / "checkpoint.pt")
            row = {
                "step": run.step,
                "minutes": round(run.minutes, 1),
                "loss": round(float(np.mean(losses)), 4),
                "songs": len(songs.songs),
                "improvement": compute_improvements(run.averaged, validation),
            }
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
            losses.clear()
        if run.step % 50 == 0:
            songs.refresh()


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("songs", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("run", type=Path, help="folder of the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", default="{}", help="JSON: other arguments of the network")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo", timeout=timedelta(hours=1))
    args.run.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(minutes=args.minutes, seed=args.seed)
    architecture = ARCHITECTURE | json.loads(args.set)
    (args.run / "architecture.json").write_text(json.dumps(architecture))
    run = start_run(recipe, architecture)
    checkpoint = args.run / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    train(run, recipe, Songs(args.songs), Songs(args.validation), args.run)


if __name__ == "__main__":
    main()
