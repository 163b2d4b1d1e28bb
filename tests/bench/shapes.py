"""Write networks of the released shapes with random weights as files that every side can read."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

FOUR = ["drums", "bass", "other", "vocals"]
TRANSFORMER = {
    "sources": FOUR,
    "bottom_channels": 512,
    "t_layers": 5,
    "dconv_mode": 3,
    "segment": Fraction(39, 5),
}
HYBRID = {"sources": FOUR, "segment": 44}
WAVEFORM = {"sources": FOUR, "segment": 44}

# Name of the bag -> (class, constructor arguments) of each member.
BAGS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "htdemucs": [("HTDemucs", TRANSFORMER)],
    "htdemucs_ft": [("HTDemucs", TRANSFORMER)] * 4,
    "hdemucs_mmi": [("HDemucs", HYBRID)],
    "mdx": [("Demucs", WAVEFORM)],
}
ONE_HOT = [[float(row == column) for column in range(4)] for row in range(4)]


def randomise(network: nn.Module, seed: int) -> None:
    """Draw the layer scales, whose initial 1e-4 would hide errors of the branches."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        if name.endswith("scale"):
            parameter.data = 0.2 + 0.2 * torch.rand(parameter.shape, generator=generator)


def write_repo(folder: Path, name: str) -> None:
    """Write a local repository with the bag `name`, in half precision as the released ones."""
    from demucs import demucs, hdemucs, htdemucs

    classes = {
        "HTDemucs": htdemucs.HTDemucs,
        "HDemucs": hdemucs.HDemucs,
        "Demucs": demucs.Demucs,
    }
    signatures = []
    for seed, (klass, kwargs) in enumerate(BAGS[name]):
        signature = f"{name}{seed}"
        torch.manual_seed(seed)
        network = classes[klass](**kwargs)
        randomise(network, seed)
        state = {key: value.half() for key, value in network.state_dict().items()}
        package = {"klass": classes[klass], "args": (), "kwargs": kwargs, "state": state}
        torch.save({**package, "training_args": {}}, folder / f"{signature}.th")
        signatures.append(signature)
    bag: dict[str, Any] = {"models": signatures}
    if len(signatures) > 1:
        bag["weights"] = ONE_HOT
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(bag))
