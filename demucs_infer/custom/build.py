"""Build a custom network from a configuration, and load its weights from a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from demucs_infer.checkpoints.reader import read_package
from demucs_infer.custom.adapter import WaveformModel, str_to_torch_dtype
from demucs_infer.custom.community import adapt_to_weights, find_community_metadata
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata, Traits
from demucs_infer.custom.registry import find_metadata
from demucs_infer.errors import ConfigError
from demucs_infer.states import AllocationLimit, load_weights

_MAX_TABLES = 2**24
"""Numbers in tables of a network that are computed and not saved."""


def build_network(config: Config, metadata: ModelMetadata[Any] | None = None) -> WaveformModel:
    """Build the network of a configuration, with its initial weights.

    `metadata` defaults to what is registered under the configuration's `model_type`.
    """
    if metadata is None:
        metadata = find_metadata(config.model_type)
    elif metadata.model_type != config.model_type:
        raise ConfigError(
            f"model_type: the configuration has {config.model_type!r}, but the metadata "
            f"{metadata.model_type!r}: use the same name in both"
        )
    params = config.model.to_concrete(metadata.params)
    traits = Traits.from_params(params)
    with torch.random.fork_rng(devices=[]):  # keep the global random state
        model = metadata.model(params)
    network = WaveformModel(
        model,
        traits,
        sample_rate=config.audio.sample_rate,
        channels=config.audio.channels,
        chunk_size=config.chunk_size,
        stft=config.stft,
    )
    network.preferences = dict(config.preferences)
    return network.eval()


def load_network(
    config: Config,
    checkpoint: str | os.PathLike[str],
    metadata: ModelMetadata[Any] | None = None,
) -> WaveformModel:
    """Build the network of a configuration and load its weights from `checkpoint`.

    Raises `CheckpointError` unless names and shapes of the weights match the network.
    """
    if metadata is None and find_community_metadata(config.model_type) is not None:
        package = read_package(Path(checkpoint))
        config = adapt_to_weights(config, package.state)
        # A weight takes a byte of the file at least; tables that are not saved come on top.
        with AllocationLimit(package.size + _MAX_TABLES):
            network = build_network(config)
    else:
        network = build_network(config, metadata)
    load_weights(network.model, checkpoint)
    if config.inference.weights_dtype is not None:
        network.model.to(str_to_torch_dtype(config.inference.weights_dtype))
    return network
