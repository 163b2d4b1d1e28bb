"""Load models from the Hugging Face Hub under the names of upstream's `demucs.hf`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from demucs_infer.pretrained import get_model
from demucs_infer.repo import DEFAULT_NAMESPACE as DEFAULT_NAMESPACE
from demucs_infer.repo import name_repository

if TYPE_CHECKING:
    from torch import nn

    from demucs_infer.apply import BagOfModels


def hf_repo_name(name: str) -> str:
    """Return the name of a model's repository: htdemucs_ft is in HTDemucs-ft."""
    return name_repository(name)


def load_safetensors_model(path: str | os.PathLike[str]) -> nn.Module:
    """Load a network from a `.safetensors` file with its class and arguments."""
    from demucs_infer.states import load_model

    return load_model(path)


def get_hf_model(name: str) -> BagOfModels:
    """Load a model of the Hub: `name`, or `namespace/name`."""
    return cast("BagOfModels", get_model(f"hf://{name}"))
