"""Represent the result of a track, as a value and as a row of a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from demucs_infer.batch.manifest import Manifest
from demucs_infer.errors import AudioReadError, ModelLoadingError, is_disk_full

Status = Literal["done", "skipped", "failed", "quarantined"]
Fault = Literal["", "input", "model", "disk", "other"]


_IN_PROGRESS = "in progress elsewhere: another process is separating it"


def fault_of(error: Exception) -> Fault:
    """Return the kind of an error: "input", "model", "disk" or "other"."""
    if is_disk_full(error):
        return "disk"
    if isinstance(error, AudioReadError):
        return "input"
    return "model" if isinstance(error, ModelLoadingError) else "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackResult:
    """The result of a track; errors are results too, not exceptions."""

    track: str
    """The input as given by the caller."""

    status: Status
    model: str
    stems: Mapping[str, Path] = field(default_factory=dict)
    manifest: Path | None = None
    key: str = ""
    """The key of the recipe: equal keys mean equal stems."""

    seconds: float = 0.0
    """Processing time."""

    duration_seconds: float = 0.0
    """Duration of the track."""

    gain: float = 1.0
    """The smallest gain of a stem; 1.0 if none would clip."""

    resumed_seconds: float = 0.0
    """Seconds of audio that an interrupted run had separated before."""

    warnings: tuple[str, ...] = ()
    error: str = ""
    fault: Fault = ""
    """The cause of the error: the input, the model, a full disk, or something else."""

    @classmethod
    def done(cls, track: str, path: Path, manifest: Manifest, is_written: bool) -> "TrackResult":
        """Build the result of a separated track, whose manifest has the path `path`."""
        return cls(
            track=track,
            status="done",
            model=manifest.recipe.model,
            stems={name: path.parent / stem.file for name, stem in manifest.stems.items()},
            manifest=path if is_written else None,
            key=manifest.recipe.key,
            seconds=manifest.seconds,
            duration_seconds=manifest.duration_seconds,
            gain=manifest.gain,
            resumed_seconds=manifest.resumed_seconds,
            warnings=manifest.warnings,
        )

    @classmethod
    def skipped(cls, track: str, path: Path, manifest: Mapping[str, Any]) -> "TrackResult":
        """Build the result of a finished track from its manifest at `path`."""
        return cls(
            track=track,
            status="skipped",
            model=manifest["recipe"]["model"],
            stems={name: path.parent / stem["file"] for name, stem in manifest["stems"].items()},
            manifest=path,
            key=manifest["key"],
            seconds=manifest["seconds"],
            duration_seconds=manifest["duration_seconds"],
            resumed_seconds=manifest["resumed_seconds"],
            gain=manifest["gain"],
            warnings=tuple(manifest["warnings"]),
        )

    @classmethod
    def in_progress(cls, track: str, model: str) -> "TrackResult":
        """Build the result of a track that another process separates at this moment."""
        return cls(track=track, status="skipped", model=model, error=_IN_PROGRESS)

    @property
    def ok(self) -> bool:
        """Whether the stems exist."""
        return self.status in ("done", "skipped") and not self.error

    @property
    def is_failure(self) -> bool:
        """Whether it counts as an error; a track in progress elsewhere does not."""
        return self.status in ("failed", "quarantined")

    def row(self) -> dict[str, Any]:
        """Return the result as JSON values."""
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
