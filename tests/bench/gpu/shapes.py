"""Networks of the released shapes with random weights, and tiny ones to try the bench itself."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.states import save_with_checksum, serialize_model
from tests.bench.shapes import FOUR, HYBRID, ONE_HOT, TRANSFORMER, WAVEFORM
from tests.helpers.networks import TINY, randomize


@dataclass(frozen=True)
class Shapes:
    """How to make the networks, and how long the audio is."""

    networks: dict[str, Callable[[], nn.Module]]
    window_seconds: dict[str, float]
    """Length of the window that is checked and timed; their own one may take minutes on a CPU."""
    windows: tuple[str, ...]
    """Windows that all networks but the first are checked on."""
    batches: tuple[int, ...]
    tracks: dict[str, float]
    """Name of a track and its length in seconds, the most important first."""
    short_tracks: tuple[int, float]
    """Number and length of the tracks that share batches."""
    rounds: int


SIX = [*FOUR, "guitar", "piano"]
V2 = {
    "sources": FOUR,
    "dconv_mode": 0,
    "lstm_layers": 2,
    "gelu": False,
    "norm_starts": 999,
    "segment": 44,
}

RELEASED = Shapes(
    networks={
        "htdemucs": partial(HTDemucs, **TRANSFORMER),
        "hdemucs_mmi": partial(HDemucs, **HYBRID),
        "mdx, waveform": partial(Demucs, **WAVEFORM),
        "mdx, hybrid": partial(HDemucs, **HYBRID, hybrid_old=True),
        "htdemucs_6s": partial(HTDemucs, **{**TRANSFORMER, "sources": SIX, "bottom_channels": 0}),
        "demucs v2": partial(Demucs, **V2),
    },
    window_seconds={"htdemucs": 7.8, "htdemucs_6s": 7.8},
    windows=("music", "burst of crest 60", "full scale", "silence"),
    batches=(16, 1, 8, 4, 2),
    tracks={"3 min": 180.0, "3 s": 3.0, "30 s": 30.0, "1 h": 3600.0},
    short_tracks=(200, 10.0),
    rounds=5,
)

SMALL = Shapes(
    networks={
        "htdemucs": partial(HTDemucs, **{**TINY["HTDemucs"], "samplerate": 44_100}),
        "hdemucs_mmi": partial(HDemucs, **TINY["HDemucs"]),
        "mdx, waveform": partial(Demucs, **{**TINY["Demucs"], "samplerate": 44_100}),
    },
    window_seconds={"htdemucs": 1.0},
    windows=("music", "burst of crest 60", "silence"),
    batches=(2, 1),
    tracks={"3 min": 2.0, "3 s": 1.0},
    short_tracks=(3, 1.0),
    rounds=1,
)


def make_network(shapes: Shapes, name: str) -> Any:
    """Make a network whose weights are exact in half precision, as all released ones are."""
    torch.manual_seed(0)
    network = randomize(shapes.networks[name]())
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    return network.requires_grad_(False)


def write_repository(folder: Path, shapes: Shapes, name: str) -> None:
    """Write a local repository with a model, and with `htdemucs_ft` beside `htdemucs`."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {"htdemucs_ft": 4}.get(name, 1)
    base = "htdemucs" if name == "htdemucs_ft" else name
    signatures = []
    for member in range(members):
        network = make_network(shapes, base)
        signature = f"{name.replace(', ', '_').replace(' ', '_')}{member}"
        save_with_checksum(serialize_model(network, {}), folder / f"{signature}.th")
        signatures.append(signature)
    bag: dict[str, Any] = {"models": signatures}
    if members > 1:
        bag["weights"] = ONE_HOT
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(bag))
