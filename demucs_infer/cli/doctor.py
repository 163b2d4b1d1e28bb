"""`demucs-infer doctor`: what this machine has, in one look or as JSON; nothing is downloaded."""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from demucs_infer import __version__
from demucs_infer.audio.formats import FORMATS
from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.pretrained import list_models, model_info

_PACKAGES = ("torch", "numpy", "av", "lameenc", "pyyaml", "tqdm", "fsspec")
_OPTIONAL = ("soxr", "soundfile", "fastapi", "ray")


def run(words: Sequence[str]) -> int:
    """Look around, and say what was found."""
    top = argparse.ArgumentParser("demucs-infer doctor", description=__doc__)
    top.add_argument("--json", action="store_true", help="as JSON on standard output")
    top.add_argument("--cache-dir", type=Path, help="folder for downloaded models")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = top.parse_args(words)
    found = examine(args.cache_dir)
    text = json.dumps(found, indent=2, default=str) if args.json else _table(found)
    sys.stdout.write(f"{text}\n")
    return 0


def examine(cache_dir: Path | None = None) -> dict[str, Any]:
    """Everything that a report of a problem should tell."""
    store = CheckpointStore.from_environment(cache_dir)
    names = list_models()["bag"]
    return {
        "demucs_infer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in (*_PACKAGES, *_OPTIONAL)},
        **_devices(),
        "cpus": os.cpu_count(),
        "formats": sorted(FORMATS),
        **_codecs(),
        # Not needed: every codec comes with av. People ask, though.
        "ffmpeg": shutil.which("ffmpeg"),
        "cache_dir": str(store.folder),
        "offline": store.offline,
        "models": [name for name in names if model_info(name, cache_dir=cache_dir).is_cached],
        "disk_free_gb": round(shutil.disk_usage(_existing(store.folder)).free / 1e9, 1),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _codecs() -> dict[str, Any]:
    import av

    needed = {codec.encoder for kind in FORMATS.values() for codec in kind.codecs.values()}
    missing = [name for name in sorted(needed - {"libsndfile"}) if not _has_encoder(name)]
    if "libsndfile" in needed and _version("soundfile") is None:
        missing.append("libsndfile (pip install 'demucs-infer[vorbis]')")
    return {"libavcodec": av.library_versions.get("libavcodec"), "missing_encoders": missing}


def _has_encoder(name: str) -> bool:
    import av

    try:
        av.Codec(name, "w")
    except ValueError:  # what av raises for a codec that it does not have
        return False
    return True


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _table(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value)) or "none"
        lines.append(f"{name:18} {'not installed' if value is None else value}")
    return "\n".join(lines)
