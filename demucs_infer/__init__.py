"""Music source separation with the Demucs networks, inference only.

Separate a song, and write its stems:

    >>> from demucs_infer import Separator
    >>> output = Separator("htdemucs").run("song.mp3")
    >>> vocals = output["vocals"]  # a tensor (channels, samples) at output.sample_rate
    >>> output.save("stems", "flac")

File to files, in constant memory: `Separator("htdemucs").separate_to("song.mp3", "stems")`. With
progress: `for event in separator.stream("song.mp3")`. The command line: `demucs-infer --help`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from demucs_infer.system.lazy import make_getattr

if TYPE_CHECKING:
    from demucs_infer.api import Separator as Separator
    from demucs_infer.apply import BagOfModels as BagOfModels
    from demucs_infer.apply import apply_model as apply_model
    from demucs_infer.audio.formats import Encoding as Encoding
    from demucs_infer.audio.reader import AudioReader as AudioReader
    from demucs_infer.audio.writer import save_audio as save_audio
    from demucs_infer.custom.config import Config as Config
    from demucs_infer.custom.metadata import ModelMetadata as ModelMetadata
    from demucs_infer.custom.metadata import ModelParamsLike as ModelParamsLike
    from demucs_infer.custom.registry import register_model as register_model
    from demucs_infer.engine.chunking import ChunkPlan as ChunkPlan
    from demucs_infer.engine.chunking import NormalizationStats as NormalizationStats
    from demucs_infer.engine.chunking import NormalizedAudio as NormalizedAudio
    from demucs_infer.engine.chunking import StreamingStitcher as StreamingStitcher
    from demucs_infer.engine.chunking import denormalize_audio as denormalize_audio
    from demucs_infer.engine.chunking import generate_chunks as generate_chunks
    from demucs_infer.engine.chunking import normalize_audio as normalize_audio
    from demucs_infer.engine.chunking import overlap_add as overlap_add
    from demucs_infer.engine.chunking import stitch_chunks as stitch_chunks
    from demucs_infer.engine.network import SupportsStemSelection as SupportsStemSelection
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
    from demucs_infer.events import DeviceChosen as DeviceChosen
    from demucs_infer.events import Stage as Stage
    from demucs_infer.events import WarningEvent as WarningEvent
    from demucs_infer.options import InputOptions as InputOptions
    from demucs_infer.options import OutputOptions as OutputOptions
    from demucs_infer.options import SeparationOptions as SeparationOptions
    from demucs_infer.options import StemOptions as StemOptions
    from demucs_infer.pretrained import get_model as get_model
    from demucs_infer.pretrained import list_models as list_models
    from demucs_infer.pretrained import model_info as model_info
    from demucs_infer.results import InferenceOutput as InferenceOutput
    from demucs_infer.results import SeparatedFiles as SeparatedFiles
    from demucs_infer.sources import Audio as Audio
    from demucs_infer.states import load_weights as load_weights

__version__ = "5.0.0"

_LAZY_IMPORTS = {
    "Audio": "demucs_infer.sources",
    "AudioError": "demucs_infer.errors",
    "AudioInputError": "demucs_infer.errors",
    "AudioReadError": "demucs_infer.errors",
    "AudioReader": "demucs_infer.audio.reader",
    "AudioWriteError": "demucs_infer.errors",
    "BagOfModels": "demucs_infer.apply",
    "BatchSizeReduced": "demucs_infer.events",
    "CheckpointError": "demucs_infer.errors",
    "ChunkPlan": "demucs_infer.engine.chunking",
    "ChunkProcessed": "demucs_infer.events",
    "Config": "demucs_infer.custom.config",
    "ConfigError": "demucs_infer.errors",
    "DemucsError": "demucs_infer.errors",
    "DeviceChosen": "demucs_infer.events",
    "DownloadError": "demucs_infer.errors",
    "Encoding": "demucs_infer.audio.formats",
    "InferenceOutput": "demucs_infer.results",
    "InputOptions": "demucs_infer.options",
    "ModelLoadingError": "demucs_infer.errors",
    "ModelMetadata": "demucs_infer.custom.metadata",
    "ModelNotFound": "demucs_infer.errors",
    "ModelParamsLike": "demucs_infer.custom.metadata",
    "NormalizationStats": "demucs_infer.engine.chunking",
    "NormalizedAudio": "demucs_infer.engine.chunking",
    "OutputOptions": "demucs_infer.options",
    "SeparatedFiles": "demucs_infer.results",
    "SeparationError": "demucs_infer.errors",
    "SeparationOptions": "demucs_infer.options",
    "Separator": "demucs_infer.api",
    "Stage": "demucs_infer.events",
    "StemOptions": "demucs_infer.options",
    "StreamingStitcher": "demucs_infer.engine.chunking",
    "SupportsStemSelection": "demucs_infer.engine.network",
    "WarningEvent": "demucs_infer.events",
    "apply_model": "demucs_infer.apply",
    "denormalize_audio": "demucs_infer.engine.chunking",
    "derive_stems": "demucs_infer.engine.stems",
    "generate_chunks": "demucs_infer.engine.chunking",
    "get_model": "demucs_infer.pretrained",
    "list_models": "demucs_infer.pretrained",
    "load_weights": "demucs_infer.states",
    "model_info": "demucs_infer.pretrained",
    "normalize_audio": "demucs_infer.engine.chunking",
    "overlap_add": "demucs_infer.engine.chunking",
    "parse_stem_rule": "demucs_infer.engine.stems",
    "register_model": "demucs_infer.custom.registry",
    "save_audio": "demucs_infer.audio.writer",
    "stitch_chunks": "demucs_infer.engine.chunking",
}
__all__ = [
    "Audio",
    "AudioError",
    "AudioInputError",
    "AudioReadError",
    "AudioReader",
    "AudioWriteError",
    "BagOfModels",
    "BatchSizeReduced",
    "CheckpointError",
    "ChunkPlan",
    "ChunkProcessed",
    "Config",
    "ConfigError",
    "DemucsError",
    "DeviceChosen",
    "DownloadError",
    "Encoding",
    "InferenceOutput",
    "InputOptions",
    "ModelLoadingError",
    "ModelMetadata",
    "ModelNotFound",
    "ModelParamsLike",
    "NormalizationStats",
    "NormalizedAudio",
    "OutputOptions",
    "SeparatedFiles",
    "SeparationError",
    "SeparationOptions",
    "Separator",
    "Stage",
    "StemOptions",
    "StreamingStitcher",
    "SupportsStemSelection",
    "WarningEvent",
    "__version__",
    "apply_model",
    "denormalize_audio",
    "derive_stems",
    "generate_chunks",
    "get_model",
    "list_models",
    "load_weights",
    "model_info",
    "normalize_audio",
    "overlap_add",
    "parse_stem_rule",
    "register_model",
    "save_audio",
    "stitch_chunks",
]

_TRAINING = "train with demucs, and load the checkpoint here by its path"
_LEFT_OUT = {
    **dict.fromkeys(("distrib", "ema", "solver", "svd", "train", "wav"), _TRAINING),
    **dict.fromkeys(("augment", "repitch"), "it augments data for training; use demucs for that"),
    "evaluate": "demucs_infer.metrics, and the command `demucs-infer eval`, measure stems",
    "grids": "it lists trainings with dora; use demucs for that",
}
"""Modules of upstream that are not here, and why."""

__path__.append(str(Path(__file__).with_name("left_out")))  # found last; each raises the reason

__getattr__ = make_getattr(__name__, _LAZY_IMPORTS, _LEFT_OUT)


def refuse_import(name: str) -> NoReturn:
    """Raise an `ImportError` that says why a module of upstream is left out, and what to use."""
    reason = _LEFT_OUT[name.rpartition(".")[2]]
    raise ImportError(f"{name} is left out: {reason}", name=name)


def __dir__() -> list[str]:
    return __all__
