"""Public names for packages that provide custom networks."""

from demucs_infer.custom.adapter import WaveformModel, apply_mask, create_w2w_model
from demucs_infer.custom.build import build_network, load_network
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata, ModelParamsLike
from demucs_infer.custom.registry import find_metadata, register_model
from demucs_infer.engine.network import SupportsStemSelection

__all__ = [
    "Config",
    "ModelMetadata",
    "ModelParamsLike",
    "SupportsStemSelection",
    "WaveformModel",
    "apply_mask",
    "build_network",
    "create_w2w_model",
    "find_metadata",
    "load_network",
    "register_model",
]
