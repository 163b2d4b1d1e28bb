"""From a configuration and a file of weights to a network that is ready to run."""

from __future__ import annotations

import os
from typing import Any

import torch

from demucs_infer.custom.adapter import WaveformModel, str_to_torch_dtype
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata, Traits
from demucs_infer.custom.registry import find_metadata
from demucs_infer.errors import ConfigError
from demucs_infer.states import load_weights


def build_network(config: Config, metadata: ModelMetadata[Any] | None = None) -> WaveformModel:
    """The network that a configuration describes, with the weights that it begins with.

    `metadata` says what it is; without, whatever is known under the configuration's `model_type`.
    """
    if metadata is None:
        metadata = find_metadata(config.model_type)
    elif metadata.model_type != config.model_type:
        raise ConfigError(
            f"model_type: the configuration is for {config.model_type!r}, "
            f"and the network is a {metadata.model_type!r}"
        )
    params = config.model.to_concrete(metadata.params)
    traits = Traits.of(params)
    with torch.random.fork_rng(devices=[]):  # what it begins with is nobody else's business
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
    """The same with the weights of a file, which must be just those of the network."""
    network = build_network(config, metadata)
    load_weights(network.model, checkpoint)
    if config.inference.weights_dtype is not None:
        network.model.to(str_to_torch_dtype(config.inference.weights_dtype))
    return network
