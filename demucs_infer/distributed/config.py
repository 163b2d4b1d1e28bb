"""Declare the settings that all workers of a run share."""

from dataclasses import dataclass

from demucs_infer.batch.attempts import Run
from demucs_infer.batch.prepare import Skip
from demucs_infer.batch.request import ModelSpec
from demucs_infer.options import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Settings of all workers of a run; pickled for those on other machines."""

    model: ModelSpec
    request: Request
    out: str
    """Path or URI of the output folder."""

    skip: Skip = "same"
    verify: bool = False
    """Whether the files of finished tracks are read, and compared by their digests."""

    max_crashes: int = 2
    """Worker crashes after which a track is quarantined."""

    run: Run = Run()
    """As in `BatchRunner`: which crashes count against a track."""

    shared_path_digests: frozenset[int] = frozenset()
    """Digests of paths that several rows share (see `OutputConflicts`)."""

    max_tracks_per_batch: int = 0
    """Tracks whose windows share batches of the network; 0: a good number for the device."""
