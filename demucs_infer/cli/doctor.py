"""`demucs-infer doctor`: print versions, devices, codecs, cache and disk; download nothing."""

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
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.pretrained import list_models, model_info

_PACKAGES = ("torch", "numpy", "av", "lameenc", "pyyaml", "tqdm", "fsspec")
_OPTIONAL = ("soxr", "soundfile", "fastapi", "ray")


def run(words: Sequence[str]) -> int:
    """Print what a bug report needs to know about this machine."""
    args = make_parser().parse_args(words)
    report = inspect_machine(args.cache_dir)
    text = json.dumps(report, indent=2, default=str) if args.json else _format_table(report)
    sys.stdout.write(f"{text}\n")
    return ExitCode.OK


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer doctor`."""
    parser = argparse.ArgumentParser(
        "demucs-infer doctor",
        description="Print versions, devices, codecs, the cache and the disk of this machine. "
        "Nothing is downloaded.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--cache-dir", type=Path, help="folder for downloaded models")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def inspect_machine(cache_dir: Path | None = None) -> dict[str, Any]:
    """Return versions, devices, codecs, cached models and free disk space by name."""
    store = CheckpointStore.from_environment(cache_dir)
    names = list_models()["bag"]
    return {
        "demucs_infer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _find_version(name) for name in (*_PACKAGES, *_OPTIONAL)},
        **_list_devices(),
        "cpus": os.cpu_count(),
        **_list_codecs(),
        # Not needed, since every codec is bundled with av, but people look for it.
        "ffmpeg": shutil.which("ffmpeg"),
        "cache_dir": str(store.folder),
        "offline": store.offline,
        "models": [name for name in names if model_info(name, cache_dir=cache_dir).is_cached],
        "disk_free_gb": round(free_disk_bytes(store.folder) / 1e9, 1),
    }


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _list_devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **_describe_processor(),
    }


def _describe_processor() -> dict[str, Any]:
    """Return which of the ways to compute on a CPU are taken on this processor."""
    import torch

    from demucs_infer.optimized import kernels
    from demucs_infer.optimized.optimize import explain_precision

    packed = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        "packed_kernels": [
            name for name, dtype in packed.items() if kernels.has_packed_kernels(dtype)
        ],
        "attention_fp32": "in rows" if kernels.attends_in_rows(torch.float32) else "by PyTorch",
        "precision_auto": explain_precision("auto", torch.device("cpu")),
    }


def _list_codecs() -> dict[str, Any]:
    import av

    encoders = {codec.encoder for kind in FORMATS.values() for codec in kind.codecs.values()}
    missing = {name for name in encoders - {"libsndfile"} if not _has_encoder(name)}
    notes = sorted(missing)
    if _find_version("soundfile") is None:
        missing.add("libsndfile")
        notes.append("libsndfile, for ogg (pip install soundfile)")
    return {
        "formats": [
            name
            for name, kind in sorted(FORMATS.items())
            if not missing & {codec.encoder for codec in kind.codecs.values()}
        ],
        "libavcodec": av.library_versions.get("libavcodec"),
        "missing_encoders": notes,
    }


def _has_encoder(name: str) -> bool:
    import av

    try:
        av.Codec(name, "w")
    except ValueError:  # av raises it for an unknown codec
        return False
    return True


def free_disk_bytes(path: Path) -> int:
    """Return the free space of the disk that `path` is or will be on."""
    path = path.absolute()
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(folder).free


def _format_table(report: dict[str, Any]) -> str:
    lines = []
    for name, value in report.items():
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value)) or "none"
        lines.append(f"{name:18} {'not installed' if value is None else value}")
    return "\n".join(lines)
