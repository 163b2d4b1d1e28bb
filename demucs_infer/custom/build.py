"""Build a custom network from a configuration, and load its weights from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from demucs_infer.checkpoints.reader import read_package
from demucs_infer.custom.adapter import WaveformModel, str_to_torch_dtype
from demucs_infer.custom.community import adapt_to_weights, find_community_metadata
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata, Traits
from demucs_infer.custom.registry import find_metadata
from demucs_infer.errors import CheckpointError, ConfigError
from demucs_infer.states import AllocationLimit, load_weights

_MAX_TABLES = 2**24
"""Limit for the numbers in tables that a network computes, and that are not in its checkpoint."""


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
    return _wrap(model, config, traits).eval()


def _wrap(model: nn.Module, config: Config, traits: Traits) -> WaveformModel:
    network = WaveformModel(
        model,
        traits,
        sample_rate=config.audio.sample_rate,
        channels=config.audio.channels,
        chunk_size=config.chunk_size,
        stft=config.stft,
    )
    network.preferences = dict(config.preferences)
    network.own_settings = {**config.preferences, "overlap": config.overlap, "segment": None}
    return network


def wrap_network(model: nn.Module, metadata: object) -> tuple[WaveformModel, Config | None]:
    """Wrap a network for the engine; also return the configuration, if `metadata` is one.

    `metadata` is a `Config`, its JSON data, an object with the parameters of the network, or a
    `ModelMetadata` whose parameters all have defaults. Raises `ConfigError` for anything else.
    """
    if isinstance(metadata, Mapping):
        metadata = Config.from_dict(metadata)
    if isinstance(metadata, Config):
        config = metadata
        params = SimpleNamespace(
            **{
                **config.model.rest,
                "chunk_size": config.model.chunk_size,
                "output_stem_names": config.model.output_stem_names,
            }
        )
        network = _wrap(model, config, Traits.from_params(params))
        return network, config
    if isinstance(metadata, ModelMetadata):
        kind: ModelMetadata[Any] = metadata
        try:
            metadata = kind.params()
        except TypeError as error:
            raise ConfigError(
                f"metadata: the parameters of this {kind.model_type!r} are unknown ({error}): "
                f"pass them, metadata={kind.params.__name__}(...)"
            ) from error
    traits = Traits.from_params(metadata)
    return WaveformModel(model, traits, sample_rate=traits.sample_rate or 44100), None


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
        # Each weight takes at least one byte of the file.
        with AllocationLimit(package.size + _MAX_TABLES):
            network = build_network(config)
        _release_initial_weights(network.model)
    else:
        network = build_network(config, metadata)
    try:
        load_weights(network.model, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; is it the file for this configuration?") from error
    if config.inference.weights_dtype is not None:
        network.model.to(str_to_torch_dtype(config.inference.weights_dtype))
    return network


def _release_initial_weights(model: nn.Module) -> None:
    """Release the weights of a new network, so that it adopts those of a file without a copy."""
    released: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may occur twice
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
                module._parameters[name] = released.setdefault(weight, empty)
