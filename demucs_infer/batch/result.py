"""What became of a track, as a value and as a row of a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from demucs_infer.batch.manifest import Manifest
from demucs_infer.errors import AudioReadError, ModelLoadingError, is_disk_full

Status = Literal["done", "skipped", "failed", "quarantined"]
Fault = Literal["", "input", "model", "disk", "other"]


def fault_of(error: Exception) -> Fault:
    """Where an error lies; what does not fit on a disk is no fault of the track that was read."""
    if is_disk_full(error):
        return "disk"
    if isinstance(error, AudioReadError):
        return "input"
    return "model" if isinstance(error, ModelLoadingError) else "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackResult:
    """The end of a track: every track has one, and none of them is an exception."""

    track: str
    """The input, as it was asked for."""

    status: Status
    model: str
    stems: Mapping[str, Path] = field(default_factory=dict)
    manifest: Path | None = None
    key: str = ""
    """Of the recipe: equal keys mean equal stems."""

    seconds: float = 0.0
    """How long it took."""

    duration_seconds: float = 0.0
    """How long the track is."""

    gain: float = 1.0
    """The smallest that a stem was multiplied by; 1.0 if nothing would have clipped."""

    resumed_seconds: float = 0.0
    """How much of the track an interrupted run had done already."""

    warnings: tuple[str, ...] = ()
    error: str = ""
    fault: Fault = ""
    """Where the error lies: in the input, the model, a disk that is full, or elsewhere."""

    @classmethod
    def done(cls, track: str, where: Path, manifest: Manifest, is_written: bool) -> "TrackResult":
        """A track that was separated now."""
        return cls(
            track=track,
            status="done",
            model=manifest.recipe.model,
            stems={name: where.parent / stem.file for name, stem in manifest.stems.items()},
            manifest=where if is_written else None,
            key=manifest.recipe.key,
            seconds=manifest.seconds,
            duration_seconds=manifest.duration_seconds,
            gain=manifest.gain,
            resumed_seconds=manifest.resumed_seconds,
            warnings=manifest.warnings,
        )

    @classmethod
    def skipped(cls, track: str, where: Path, found: Mapping[str, Any]) -> "TrackResult":
        """A track whose manifest was found to match: all is as it was when it was done."""
        return cls(
            track=track,
            status="skipped",
            model=found["recipe"]["model"],
            stems={name: where.parent / one["file"] for name, one in found["stems"].items()},
            manifest=where,
            key=found["key"],
            seconds=found["seconds"],
            duration_seconds=found["duration_seconds"],
            resumed_seconds=found["resumed_seconds"],
            gain=found["gain"],
            warnings=tuple(found["warnings"]),
        )

    @property
    def ok(self) -> bool:
        """Whether the stems are there."""
        return self.status in ("done", "skipped")

    def row(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "track": self.track,
            "model": self.model,
            "status": self.status,
            "stems": {name: str(path) for name, path in self.stems.items()},
            "manifest": str(self.manifest) if self.manifest else None,
            "key": self.key,
            "seconds": round(self.seconds, 3),
            "duration_seconds": round(self.duration_seconds, 6),
            "resumed_seconds": round(self.resumed_seconds, 6),
            "gain": self.gain,
            "warnings": list(self.warnings),
            "error": self.error or None,
        }
