"""Music source separation with the Demucs networks, inference only."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demucs_infer.api import Separator as Separator
    from demucs_infer.apply import BagOfModels as BagOfModels
    from demucs_infer.apply import apply_model as apply_model
    from demucs_infer.audio.formats import Encoding as Encoding
    from demucs_infer.audio.writer import save_audio as save_audio
    from demucs_infer.custom.config import Config as Config
    from demucs_infer.custom.metadata import ModelMetadata as ModelMetadata
    from demucs_infer.custom.metadata import ModelParamsLike as ModelParamsLike
    from demucs_infer.custom.registry import register_model as register_model
    from demucs_infer.engine.stems import derive_stems as derive_stems
    from demucs_infer.engine.stems import parse_stem_rule as parse_stem_rule
    from demucs_infer.errors import AudioError as AudioError
    from demucs_infer.errors import AudioInputError as AudioInputError
    from demucs_infer.errors import AudioReadError as AudioReadError
    from demucs_infer.errors import AudioWriteError as AudioWriteError
    from demucs_infer.errors import CheckpointError as CheckpointError
    from demucs_infer.errors import ConfigError as ConfigError
    from demucs_infer.errors import DemucsError as DemucsError
    from demucs_infer.errors import DownloadError as DownloadError
    from demucs_infer.errors import ModelLoadingError as ModelLoadingError
    from demucs_infer.errors import ModelNotFound as ModelNotFound
    from demucs_infer.errors import SeparationError as SeparationError
    from demucs_infer.events import BatchSizeReduced as BatchSizeReduced
    from demucs_infer.events import ChunkProcessed as ChunkProcessed
    from demucs_infer.events import Stage as Stage
    from demucs_infer.events import WarningEvent as WarningEvent
    from demucs_infer.options import OutputOptions as OutputOptions
    from demucs_infer.pretrained import get_model as get_model
    from demucs_infer.pretrained import list_models as list_models
    from demucs_infer.pretrained import model_info as model_info
    from demucs_infer.results import InferenceOutput as InferenceOutput
    from demucs_infer.results import SeparatedFiles as SeparatedFiles
    from demucs_infer.sources import Audio as Audio
    from demucs_infer.states import load_weights as load_weights

__version__ = "5.0.0"

_HOME = {
    "Audio": "demucs_infer.sources",
    "AudioError": "demucs_infer.errors",
    "AudioInputError": "demucs_infer.errors",
    "AudioReadError": "demucs_infer.errors",
    "AudioWriteError": "demucs_infer.errors",
    "BagOfModels": "demucs_infer.apply",
    "BatchSizeReduced": "demucs_infer.events",
    "CheckpointError": "demucs_infer.errors",
    "ChunkProcessed": "demucs_infer.events",
    "Config": "demucs_infer.custom.config",
    "ConfigError": "demucs_infer.errors",
    "DemucsError": "demucs_infer.errors",
    "DownloadError": "demucs_infer.errors",
    "Encoding": "demucs_infer.audio.formats",
    "InferenceOutput": "demucs_infer.results",
    "ModelLoadingError": "demucs_infer.errors",
    "ModelMetadata": "demucs_infer.custom.metadata",
    "ModelNotFound": "demucs_infer.errors",
    "ModelParamsLike": "demucs_infer.custom.metadata",
    "OutputOptions": "demucs_infer.options",
    "SeparatedFiles": "demucs_infer.results",
    "SeparationError": "demucs_infer.errors",
    "Separator": "demucs_infer.api",
    "Stage": "demucs_infer.events",
    "WarningEvent": "demucs_infer.events",
    "apply_model": "demucs_infer.apply",
    "derive_stems": "demucs_infer.engine.stems",
    "get_model": "demucs_infer.pretrained",
    "list_models": "demucs_infer.pretrained",
    "load_weights": "demucs_infer.states",
    "model_info": "demucs_infer.pretrained",
    "parse_stem_rule": "demucs_infer.engine.stems",
    "register_model": "demucs_infer.custom.registry",
    "save_audio": "demucs_infer.audio.writer",
}
__all__ = [
    "Audio",
    "AudioError",
    "AudioInputError",
    "AudioReadError",
    "AudioWriteError",
    "BagOfModels",
    "BatchSizeReduced",
    "CheckpointError",
    "ChunkProcessed",
    "Config",
    "ConfigError",
    "DemucsError",
    "DownloadError",
    "Encoding",
    "InferenceOutput",
    "ModelLoadingError",
    "ModelMetadata",
    "ModelNotFound",
    "ModelParamsLike",
    "OutputOptions",
    "SeparatedFiles",
    "SeparationError",
    "Separator",
    "Stage",
    "WarningEvent",
    "__version__",
    "apply_model",
    "derive_stems",
    "get_model",
    "list_models",
    "load_weights",
    "model_info",
    "parse_stem_rule",
    "register_model",
    "save_audio",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import demucs_infer` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
