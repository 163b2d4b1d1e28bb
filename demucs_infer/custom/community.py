"""Build the networks of the community, RoFormers and others, from the package pymss-core.

It is the extra `community`. Only its public functions are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.errors import ConfigError, DemucsError, ModelLoadingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from demucs_infer.custom.config import Config

PREFIX = "msst."
"""Prefix of the `model_type` of these networks."""

TYPES = {
    "bs_roformer": "BS-RoFormer",
    "bs_roformer_hyperace": "BS-RoFormer HyperACE",
    "bs_conformer": "BS-Conformer",
    "mel_band_roformer": "Mel-Band RoFormer",
    "mel_band_conformer": "Mel-Band Conformer",
    "scnet": "SCNet",
    "mdx23c": "MDX23C (TFC-TDF v3)",
    "htdemucs": "HTDemucs",
    "bandit": "Bandit",
    "bandit_v2": "Bandit v2",
    "apollo": "Apollo",
}
"""Display names of the supported types."""

_PACKABLE = (
    "layers",
    "mask_estimators",
    "separation_net",
    "encoder",
    "decoder",
    "encoder_blocks",
    "bottleneck_block",
    "decoder_blocks",
)
"""Children whose linear layers are only called; the band splits of RoFormers read their weights."""

_ITEMWISE = ("Transformer", "Conformer", "ConvolutionModule")
"""Classes of modules whose items do not depend on each other: bands, or frames."""

_HIDDEN_LAYER = re.compile(r"(?:^|\.)mask_estimators\.0\.to_freqs\.0\.0\.\d+\.weight$")


@dataclass(frozen=True, slots=True)
class CommunityParams:
    """Parameters of a network: `sections` are those of its file that describe it."""

    chunk_size: int
    output_stem_names: tuple[str, ...]
    input_channels: int
    sections: Mapping[str, Any]


def choose_rules(
    rules: Iterable[str], sources: Collection[str], stems: Collection[str] | None
) -> tuple[str, ...]:
    """Return the rules to derive stems by, for the requested `stems` (None: all).

    The rest of the track is not derived if all requested stems are `sources` of the network.
    """
    return () if stems is not None and set(stems) <= set(sources) else tuple(rules)


def import_library() -> Any:
    """Import pymss-core; raise `ModelLoadingError` if it is not installed."""
    try:
        import pymss_core
    except ImportError as error:
        raise ModelLoadingError(
            "this network is built by the package pymss-core, which is not installed: "
            "pip install 'pymss-core>=0.1.14,<0.2'"
        ) from error
    return pymss_core


def detect_type(data: Mapping[str, object]) -> str:
    """Return the type of the network that a configuration describes.

    This is its `model_type`, or else detected from the keys of its section `model`. Raises
    `ConfigError` if the type cannot be detected or is not supported.
    """
    declared = data.get("model_type")
    if declared is not None and declared not in TYPES:
        raise ConfigError(
            f"model_type: expected one of {', '.join(TYPES)}, got {declared!r}: choose the type of "
            "the network"
        )
    library = import_library()
    try:
        model_type: str = library.detect_model_type(data)
    except library.ModelTypeDetectionError as error:
        raise ConfigError(
            "model_type: cannot detect the type of the network from the file: set it to one of "
            f"{', '.join(TYPES)}"
        ) from error
    if model_type not in TYPES:
        raise ConfigError(f"model_type: {model_type!r} is not supported")
    return model_type


def find_community_metadata(model_type: str) -> ModelMetadata[CommunityParams] | None:
    """Return the metadata of a type with the prefix of these networks; None for other types."""
    name = model_type.removeprefix(PREFIX)
    if name == model_type or name not in TYPES:
        return None
    return ModelMetadata(model_type, CommunityParams, partial(_build, name))


def _build(model_type: str, params: CommunityParams) -> nn.Module:
    """Build a network with its initial weights."""
    from torch import nn

    from demucs_infer.optimized.pieces import supports

    library = import_library()
    sections = dict(params.sections)
    if model_type.startswith("mel_band") and isinstance(sections.get("model"), Mapping):
        # The published networks of this type keep the lowest bin; the library's default drops it.
        sections["model"] = {"zero_dc": False, **sections["model"]}
    model = sections.get("model")
    if isinstance(model, Mapping) and model.get("flash_attn") is False:
        sections["model"] = {**model, "flash_attn": True}  # the same sums, in less memory
    with TemporaryDirectory() as folder:
        # JSON is YAML; only plain values are in it, whatever the user's file had.
        path = Path(folder, "config.yaml")
        path.write_text(json.dumps(sections), "utf-8")
        try:
            network, _ = library.get_model_from_config(model_type, path)
        except DemucsError:
            raise
        except Exception as error:
            kind = "missing key " if isinstance(error, AttributeError | KeyError) else ""
            raise ConfigError(
                f"model: {TYPES[model_type]} cannot be built from these values: {kind}{error}"
            ) from error
    if model_type == "mdx23c":
        hop, scale = sections["audio"]["hop_length"], sections["model"]["scale"][0]
        # (hop, unit): the length of a window is a multiple of `unit`, minus `hop`.
        network.length_grid = hop, hop * scale ** sections["model"]["num_scales"]
    if "window" not in getattr(network, "stft_config", {"window": None}):
        network.register_forward_pre_hook(_set_stft_window)
    network.register_forward_hook(_fit_output)
    if model_type == "bandit":
        # As in its first implementation; the library's would apply one mask to both channels.
        network.register_forward_pre_hook(_split_channels)
        network.register_forward_hook(partial(_join_channels, channels=params.input_channels))
    for estimator in getattr(network, "mask_estimators", ()):
        # Grouped, its weights would be in memory twice.
        estimator.use_grouped_forward = False
    classes = {type(module) for module in network.modules()}
    itemwise = tuple(cls for cls in classes if cls.__name__ in _ITEMWISE)
    network.itemwise_classes = itemwise
    network.piecewise_classes = piecewise = tuple({*map(type, filter(supports, network.modules()))})
    network.packable_children = tuple(
        name
        for name, child in network.named_children()
        if name in _PACKABLE
        and any(type(module) in (nn.Linear, *itemwise, *piecewise) for module in child.modules())
    )
    built: nn.Module = network
    return built


def _set_stft_window(network: Any, inputs: tuple[Tensor, ...]) -> None:
    """Set the rectangular window that an SCNet takes by default: torch warns of a missing one."""
    length = network.stft_config["win_length"]
    network.stft_config["window"] = inputs[0].new_ones(length)


def _split_channels(_network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return (B, C, W) as (B C, 1, W)."""
    (mix,) = inputs
    return (mix.reshape(-1, 1, mix.shape[-1]),)


def _join_channels(
    _network: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor, *, channels: int
) -> Tensor:
    """Return (B C, S, 1, W) as (B, S, C, W)."""
    return output.reshape(-1, channels, output.shape[1], output.shape[-1]).transpose(1, 2)


def _fit_output(_network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the output as (B, S, C, W): add an axis for a single stem, and fill up the window."""
    from torch.nn import functional as F

    (mix,) = inputs
    output = output.unsqueeze(1) if output.ndim == mix.ndim else output
    return F.pad(output, (0, mix.shape[-1] - output.shape[-1]))


def adapt_to_weights(config: Config, names: Collection[str]) -> Config:
    """Complete a configuration with what only the names of the weights show.

    That is the depth of the mask estimators of a Mel-Band network, and whether a BS-RoFormer has
    the segmentation network of HyperACE.
    """
    model_type = config.model_type.removeprefix(PREFIX)
    if model_type == "bs_roformer" and any(".segm." in name for name in names):
        return replace(config, model_type=f"{PREFIX}bs_roformer_hyperace")
    layers = {name for name in names if _HIDDEN_LAYER.search(name)}
    if not model_type.startswith("mel_band") or not layers:
        return config
    sections: Any = config.model.rest["sections"]
    model = {**sections["model"], "mlp_hidden_layers": len(layers) - 1}
    rest = {**config.model.rest, "sections": {**sections, "model": model}}
    return replace(config, model=replace(config.model, rest=rest))
