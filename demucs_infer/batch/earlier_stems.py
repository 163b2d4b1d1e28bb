"""Reuse the stems of an earlier run, if the new run differs only in the format of its files.

Shapes: S stems, C channels, t samples of a block.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demucs_infer.audio.formats import FORMATS
from demucs_infer.audio.gain import is_reversible
from demucs_infer.audio.reader import AudioReader
from demucs_infer.batch.manifest import Recipe, read_manifest
from demucs_infer.errors import AudioReadError
from demucs_infer.options import OutputOptions
from demucs_infer.system.checksum import sha256_file

_OUTPUT_SETTINGS = {field.name for field in fields(OutputOptions)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierStems:
    """Files of an earlier run, used in place of running the network again."""

    files: tuple[Path, ...]
    gains: tuple[float, ...]
    bits: int
    is_exact: bool
    """Whether the files contain exactly what the network returned."""

    def blocks(self) -> Iterator[Tensor]:
        """Yield the stems (S C t), without the gains that prevented clipping."""
        gains = torch.tensor(self.gains)[:, None, None]
        streams = [AudioReader(file).blocks() for file in self.files]
        for parts in zip(*streams, strict=True):
            block = torch.stack(parts)
            yield block if self.is_exact else block / gains


def find_earlier_stems(
    path: Path, recipe: Recipe, stems: Sequence[str], sample_rate: int, channels: int
) -> EarlierStems | None:
    """Return the stems that the manifest at `path` lists, or None if they cannot be reused.

    Input, model, versions, and all settings except those of the files must be the same. The files
    must be complete and lossless, with the sample rate and the channels of the model.
    """
    manifest = read_manifest(path)
    if manifest is None or _without_output(manifest["recipe"]) != _without_output(asdict(recipe)):
        return None
    try:
        return _open_stems(path.parent, manifest, stems, sample_rate, channels)
    except (AudioReadError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _without_output(recipe: Mapping[str, Any]) -> Any:
    settings = {
        name: value for name, value in recipe["settings"].items() if name not in _OUTPUT_SETTINGS
    }
    return json.loads(json.dumps({**recipe, "settings": settings}, default=str))


def _open_stems(
    folder: Path,
    manifest: Mapping[str, Any],
    stems: Sequence[str],
    sample_rate: int,
    channels: int,
) -> EarlierStems | None:
    settings, entries = manifest["recipe"]["settings"], manifest["stems"]
    kind = FORMATS[settings["format"]]
    is_usable = (
        not kind.is_lossy
        and not kind.holds_all_stems
        and is_reversible(settings["clip"])  # the manifest has the gains
        and (manifest["sample_rate"], manifest["channels"]) == (sample_rate, channels)
        and list(entries) == list(stems)
    )
    if not is_usable:
        return None
    files = tuple(folder / entry["file"] for entry in entries.values())
    infos = [AudioReader(file).info for file in files]
    frames = round(manifest["duration_seconds"] * sample_rate)
    if any(info.frames != frames for info in infos):
        return None
    if any(
        sha256_file(file) != entry["sha256"]
        for file, entry in zip(files, entries.values(), strict=True)
    ):
        return None
    gains = tuple(float(entry["gain"]) for entry in entries.values())
    is_float = all(info.is_float and info.bits == 32 for info in infos)
    return EarlierStems(
        files=files,
        gains=gains,
        bits=min(info.bits or 0 for info in infos),
        is_exact=is_float and all(gain == 1 for gain in gains),
    )
