"""`--dry-run`: print what a run would do, and estimate its cost; download and write nothing."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from demucs_infer.audio.formats import FORMATS
from demucs_infer.batch.custom_model import CustomModelSpec
from demucs_infer.batch.job import TrackJob, find_done, hash_input
from demucs_infer.batch.replaced_input import describe_refusal, find_replaced_input
from demucs_infer.batch.request import ModelSpec, make_recipe
from demucs_infer.checkpoints.catalog import load_catalog, split_bag
from demucs_infer.cli.doctor import free_disk_bytes
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.separate import REFUSAL_ADVICE
from demucs_infer.errors import DemucsError
from demucs_infer.options import Request
from demucs_infer.pretrained import model_info
from demucs_infer.system.malloc import peak_memory

if TYPE_CHECKING:
    from demucs_infer.api import Separator

_BYTES_PER_FLOAT = 4
_LOSSLESS_RATIO = 0.6
"""Size of a losslessly compressed file relative to its samples; music rarely takes more."""


def print_dry_run(
    args: argparse.Namespace, model: ModelSpec, request: Request, jobs: Sequence[TrackJob]
) -> int:
    """Print what a run would do with these jobs, whose outputs do not collide."""
    tracks = [_describe_track(job, model, request, args) for job in jobs]
    durations = [track["seconds"] for track in tracks if track["state"] == "to do"]
    report: dict[str, Any] = {
        "model": model.name,
        "to_download": _list_downloads(model),
        "tracks": tracks,
        "audio_seconds": round(sum(durations), 3),
    }
    if not report["to_download"] and durations:
        from demucs_infer.batch.runner import open_separator

        separator = open_separator(model, request)
        report["stems"] = list(separator.stems)
        report |= _describe_processing(separator, request)
        report |= _estimate_cost(separator, request, durations)
    report["disk_free_bytes"] = free_disk_bytes(args.out)
    text = json.dumps(report, indent=2) if args.json else _format_report(report)
    sys.stdout.write(f"{text}\n")
    return ExitCode.OK


def _describe_track(
    job: TrackJob, model: ModelSpec, request: Request, args: argparse.Namespace
) -> dict[str, Any]:
    from demucs_infer.audio.reader import probe

    row: dict[str, Any] = {
        "track": job.track,
        "seconds": 0.0,
        "to": str(job.target.manifest.parent),
    }
    try:
        seconds = probe(job.source).duration_seconds or 0.0
    except DemucsError as error:
        return {**row, "state": "cannot be read", "error": str(error)}
    seconds = max(seconds - request.input.start, 0.0)
    row["seconds"] = round(min(seconds, request.input.duration or seconds), 3)
    digest = None if args.force else hash_input(job)
    if digest is not None:
        recipe = make_recipe(request, digest, model, model.weights() or ())
        if find_done(job, recipe, verify=args.verify):
            return {**row, "state": "done before"}
        replaced = find_replaced_input(job, digest)
        if replaced is not None and replaced.relation == "other":
            refusal = describe_refusal(job, replaced, REFUSAL_ADVICE)
            return {**row, "state": "refused", "error": refusal}
    return {**row, "state": "to do"}


def _list_downloads(model: ModelSpec) -> list[dict[str, Any]]:
    """Return the files of a model of the catalog that are not in the cache."""
    names, catalog = [part for part, _ in split_bag(model.name)], load_catalog()
    is_listed = all(catalog.has(name) or name in catalog.networks for name in names)
    if model.repo is not None or isinstance(model, CustomModelSpec) or not is_listed:
        return []
    files = model_info(model.name, cache_dir=model.cache_dir).files
    return [{"file": file.file, "bytes": file.size} for file in files if not file.is_cached]


def _estimate_cost(
    separator: "Separator", request: Request, durations: Sequence[float]
) -> dict[str, Any]:
    """Estimate time and memory from a few windows of noise, and the disk space from the formats."""
    import torch

    from demucs_infer.engine.pipeline import TensorTrack

    segment_seconds = float(getattr(separator.model, "segment", 10.0))
    seconds = min(4 * segment_seconds, sum(durations))
    generator = torch.Generator().manual_seed(0)
    shape = separator.audio_channels, max(1, int(seconds * separator.samplerate))
    track = TensorTrack(0.1 * torch.randn(shape, generator=generator))
    begin = perf_counter()
    for _ in separator.stream_blocks(track):
        pass
    run_seconds = (perf_counter() - begin) / seconds * sum(durations)
    return {
        "run_seconds": round(run_seconds, 1),
        "memory_bytes": peak_memory(),
        "disk_bytes": _estimate_disk_bytes(separator, request, durations),
    }


def _estimate_disk_bytes(
    separator: "Separator", request: Request, durations: Sequence[float]
) -> int:
    """Return the size of all stems, and of the largest temporary files beside them."""
    output = request.output
    rate = output.rate if isinstance(output.rate, int) else separator.samplerate
    channels = output.channels if isinstance(output.channels, int) else separator.audio_channels
    file_rate = output.encoding(16).bytes_per_second(rate, channels)
    ratio = _LOSSLESS_RATIO if FORMATS[output.format].name in ("flac", "alac") else 1
    samples_per_second = separator.samplerate * separator.audio_channels * _BYTES_PER_FLOAT
    # The samples of two tracks are on disk: one is separated while the next one is decoded.
    decoded = samples_per_second * sum(sorted(durations)[-2:])
    spool = samples_per_second * max(durations)
    return int(decoded + len(separator.stems) * (file_rate * ratio * sum(durations) + spool))


def _describe_processing(separator: "Separator", request: Request) -> dict[str, Any]:
    """Return the precision and how many windows run at a time, each with the reason."""
    from demucs_infer.engine.network import Ensemble
    from demucs_infer.engine.parallel import choose_parallelism, estimate_window_bytes
    from demucs_infer.optimized.optimize import explain_precision

    members = Ensemble.from_model(separator.model).members
    options, devices = request.separation, separator.devices
    is_cpu = devices[0].type == "cpu"
    return {
        "precision": explain_precision(options.precision, devices[0]),
        "parallelism": str(choose_parallelism(members, options, devices[0], len(devices))),
        "window_bytes": estimate_window_bytes(members, options.segment, is_cpu=is_cpu),
    }


def _format_report(report: dict[str, Any]) -> str:
    lines = [f"model {report['model']}"]
    for file in report["to_download"]:
        size = f" ({file['bytes'] / 1e6:.0f} MB)" if file["bytes"] else ""
        lines.append(f"  to download: {file['file']}{size}")
    for track in report["tracks"]:
        state = track.get("error") or f"{track['seconds']:.0f} s, {track['state']}"
        lines.append(f"{track['track']}: {state} -> {track['to']}{os.sep}")
    lines.append(f"{report['audio_seconds']:.0f} s of audio to separate")
    if "run_seconds" in report:
        lines.append(f"stems: {', '.join(report['stems'])}")
        lines.append(f"precision: {report['precision']}")
        lines.append(f"runs: {report['parallelism']}")
        lines.append(f"time: about {report['run_seconds']:.0f} s, estimated from a few windows")
        if report["memory_bytes"]:
            lines.append(
                f"memory: about {report['memory_bytes'] / 1e9:.1f} GB; each window that runs at a "
                f"time takes about {report['window_bytes'] / 1e9:.2f} GB of it"
            )
        lines.append(f"disk: up to {report['disk_bytes'] / 1e6:.0f} MB")
    lines.append(f"disk free: {report['disk_free_bytes'] / 1e9:.1f} GB")
    return "\n".join(lines)
