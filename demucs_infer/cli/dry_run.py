"""`--dry-run`: what would be done, and what it would take; nothing is fetched or written."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from demucs_infer.audio.formats import FORMATS
from demucs_infer.batch.job import TrackJob, find_done_before
from demucs_infer.batch.request import ModelSpec
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.errors import DemucsError
from demucs_infer.options import Request
from demucs_infer.pretrained import model_info
from demucs_infer.system.malloc import peak_memory

if TYPE_CHECKING:
    from demucs_infer.api import Separator

_FLOAT = 4
_LOSSLESS = 0.6
"""How much of its samples a file without loss takes; of music it is rarely more."""


def forecast(
    args: argparse.Namespace,
    model: ModelSpec,
    request: Request,
    tasks: Sequence[TrackJob],
) -> int:
    """Say what would be done; that no two tracks get in each other's way is known by now."""
    tracks = [_track(task, model, request, force=args.force) for task in tasks]
    todo = [track["seconds"] for track in tracks if track["state"] == "to do"]
    found: dict[str, Any] = {"model": model.name, **_files(model), "tracks": tracks}
    found["audio_seconds"] = round(sum(todo), 3)
    if not found["to_download"] and todo:
        from demucs_infer.batch.runner import open_separator

        separator = open_separator(model, request)
        found["stems"] = list(separator.stems)
        found |= _cost(separator, request, todo)
    found["disk_free_bytes"] = shutil.disk_usage(_existing(args.out)).free
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else _text(found))
    return 0


def _track(task: TrackJob, model: ModelSpec, request: Request, *, force: bool) -> dict[str, Any]:
    from demucs_infer.audio.reader import probe

    where = task.target.manifest
    row: dict[str, Any] = {"track": task.track, "seconds": 0.0, "to": str(where.parent)}
    try:
        seconds = probe(task.source).duration_seconds or 0.0
    except DemucsError as error:
        return {**row, "state": "cannot be read", "error": str(error)}
    seconds = max(seconds - request.input.start, 0.0)
    row["seconds"] = round(min(seconds, request.input.duration or seconds), 3)
    if not force and find_done_before(task, request, model, model.weights() or ()):
        return {**row, "state": "done before"}
    return {**row, "state": "to do"}


def _files(model: ModelSpec) -> dict[str, Any]:
    """The model's files, and which of them are not here yet."""
    if model.repo is not None or model.name not in {
        *load_catalog().bags,
        *load_catalog().checkpoints,
    }:
        return {"to_download": []}
    info = model_info(model.name, cache_dir=model.cache_dir)
    missing = [file for file in info.files if not file.is_cached]
    return {"to_download": [{"file": file.file, "bytes": file.size} for file in missing]}


def _cost(separator: "Separator", request: Request, todo: Sequence[float]) -> dict[str, Any]:
    """Time and memory as one window takes them here and now, and what the disk has to hold."""
    import torch

    from demucs_infer.engine.pipeline import TensorTrack

    seconds = min(4 * _segment(separator), sum(todo))
    generator = torch.Generator().manual_seed(0)
    shape = separator.audio_channels, max(1, int(seconds * separator.samplerate))
    track = TensorTrack(0.1 * torch.randn(shape, generator=generator))
    begun = perf_counter()
    for _ in separator.stream_blocks(track):
        pass
    per_second = (perf_counter() - begun) / seconds
    stems = len(separator.stems)
    rate = request.output.rate if isinstance(request.output.rate, int) else separator.samplerate
    channels = (
        request.output.channels
        if isinstance(request.output.channels, int)
        else separator.audio_channels
    )
    encoding = request.output.encoding(16)
    bits = encoding.bitrate_for(channels) or rate * channels * (encoding.depth or 16)
    size = bits / 8 * (_LOSSLESS if FORMATS[request.output.format].name in ("flac", "alac") else 1)
    second = separator.samplerate * separator.audio_channels * _FLOAT
    # Of the track that is separated and the one that is read meanwhile, all samples are on disk.
    decoded, spool = second * sum(sorted(todo)[-2:]), second * max(todo)
    return {
        "run_seconds": round(per_second * sum(todo), 1),
        "memory_bytes": peak_memory(),
        "disk_bytes": int(decoded + stems * (size * sum(todo) + spool)),
    }


def _segment(separator: "Separator") -> float:
    return float(getattr(separator.model, "segment", 10.0))


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _text(found: dict[str, Any]) -> str:
    lines = [f"model {found['model']}"]
    for file in found["to_download"]:
        size = f" ({file['bytes'] / 1e6:.0f} MB)" if file["bytes"] else ""
        lines.append(f"  to download: {file['file']}{size}")
    for track in found["tracks"]:
        state = track.get("error") or f"{track['seconds']:.0f} s, {track['state']}"
        lines.append(f"{track['track']}: {state} -> {track['to']}{os.sep}")
    lines.append(f"{found['audio_seconds']:.0f} s of sound to separate")
    if "run_seconds" in found:
        lines.append(f"stems: {', '.join(found['stems'])}")
        lines.append(f"time: about {found['run_seconds']:.0f} s, as a short piece was timed here")
        if found["memory_bytes"]:
            lines.append(f"memory: about {found['memory_bytes'] / 1e9:.1f} GB")
        lines.append(f"disk: up to {found['disk_bytes'] / 1e6:.0f} MB")
    lines.append(f"disk free: {found['disk_free_bytes'] / 1e9:.1f} GB")
    return "\n".join(lines) + "\n"
