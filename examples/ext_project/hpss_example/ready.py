"""Create the network with its weights, for `demucs-infer -n hpss-plain`."""

from importlib.resources import files

import torch
from torch import Tensor, nn

from demucs_infer import Config
from demucs_infer.custom.build import build_network
from hpss_example.network import METADATA


def weights(num_taps: int) -> dict[str, Tensor]:
    """Return weights for smooth means and a soft decision; these need no training."""
    bell = torch.hann_window(num_taps + 2, periodic=False)[1:-1]
    taps = bell / bell.sum()
    return {"along_time": taps, "along_bins": taps.clone(), "sharpness": torch.tensor(4.0)}


def plain(*overrides: str) -> nn.Module:
    """Build the network of `config.json`, changed by `overrides`."""
    config = Config.from_file(str(files("hpss_example") / "config.json"), overrides)
    network = build_network(config, METADATA)
    network.model.load_state_dict(weights(len(network.model.along_time)))
    return network
