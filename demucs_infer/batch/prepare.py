"""Prepare tracks for the network: check, lock, decode and measure them.

Shapes: C channels, t samples of a block.
"""

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from demucs_infer.api import Separator
from demucs_infer.audio.gain import write_error
from demucs_infer.audio.reader import TrackReader
from demucs_infer.audio.spool import Spool, SpoolAbandoned
from demucs_infer.audio.stem_writer import StemWriter
from demucs_infer.batch.attempts import Run
from demucs_infer.batch.decoded_cache import DecodedCache
from demucs_infer.batch.discovery import is_stream
from demucs_infer.batch.earlier_stems import EarlierStems, find_earlier_stems
from demucs_infer.batch.job import TrackJob, find_done
from demucs_infer.batch.manifest import Recipe
from demucs_infer.batch.replaced_input import describe_refusal, find_replaced_input
from demucs_infer.batch.request import ModelSpec, make_recipe
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.workdir import WorkDir
from demucs_infer.engine.level import Level, measure
from demucs_infer.errors import AudioReadError, AudioWriteError, DemucsError, is_disk_full
from demucs_infer.options import Request
from demucs_infer.results import file_layout
from demucs_infer.sources import open_track
from demucs_infer.system.checksum import sha256_file

Skip = Literal["same", "existing", "nothing"]

_POLL_SECONDS = 0.2  # between attempts to lock a track


class AlreadyDone(Exception):
    """Raised when a track is not to be separated; `result` is its result."""

    def __init__(self, result: TrackResult) -> None:
        super().__init__(result.status)
        self.result = result


class TrackLocked(DemucsError):
    """Raised when another process, or another thread, separates the track."""


class DecodedTrack:
    """A track that is decoded and whose level is measured, as input of the engine.

    `first` is the first sample that has not been separated yet.
    """

    def __init__(self, decoded: DecodedCache, level: Level, channels: int, first: int) -> None:
        self.channels = channels
        self.level = level
        self.length = level.length
        self.first = first
        self._decoded = decoded
        self._is_abandoned = threading.Event()
        self._reading: Generator[Tensor, None, None] | None = None

    def abandon(self) -> None:
        """Stop the separation of this track: `blocks` raises `SpoolAbandoned` from now on."""
        self._is_abandoned.set()

    def blocks(self) -> Iterator[Tensor]:
        """Yield all samples of the track: (C, t)."""
        self._reading = self._read()
        return self._reading

    def close(self) -> None:
        """Stop reading now, and not when the generator is collected as garbage.

        By then another run may be reading a file of that name, which would be removed, as happened
        with Python 3.10.
        """
        if self._reading is not None:
            self._reading.close()

    def _read(self) -> Generator[Tensor, None, None]:
        with closing(self._decoded.blocks()) as blocks:
            yield from check_between(blocks, self._is_abandoned)

    def remove(self) -> None:
        """Remove the samples from the disk."""
        self._decoded.remove()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PreparedTrack:
    """A track that is ready to be separated."""

    job: TrackJob
    recipe: Recipe
    track: DecodedTrack
    writer: StemWriter
    workdir: WorkDir
    resumed_frames: int
    """Number of samples that an interrupted run had separated before."""

    warnings: tuple[str, ...]
    start_time: float

    def release(self) -> None:
        """Stop work on the track, and keep its samples so that a later run can resume it."""
        self.track.remove()
        self.writer.spool.abandon()
        self.writer.abort()
        self.workdir.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparer:
    """Checks, decodes and measures tracks, and locks their working folders."""

    separator: Separator
    model: ModelSpec
    request: Request
    weights: tuple[str, ...]
    skip: Skip
    verify: bool
    """Whether the files of finished tracks are compared by digest, not just by size."""

    max_crashes: int | None
    run: Run
    keeps_when_full: bool
    made_folders: set[Path]
    """Folders that this run has created."""

    reuses_stems: bool = False
    """Whether any lossless stems of an earlier run are reused, even if they were rounded."""

    keeps_other_inputs: bool = False
    """Whether tracks fail that would replace the stems of another input."""

    def prepare(
        self, job: TrackJob, stop: threading.Event, start_time: float, *, wait_for_lock: bool
    ) -> PreparedTrack:
        """Lock, decode and measure a track, and return it ready for the network.

        Raises:
            AlreadyDone: The track has its result already.
            TrackLocked: Another process separates it, and `wait_for_lock` is false.
            SpoolAbandoned: `stop` is set.
            DemucsError: It cannot be read, or its files cannot be written.
        """
        if job.result:
            raise AlreadyDone(job.result)
        stamp = _stamp(job.source)
        recipe = self._make_recipe(job, stop)
        self._check_folders(job)
        workdir = self._lock_workdir(job, recipe, stop, wait=wait_for_lock)
        spool: Spool | None = None
        try:
            decoded = DecodedCache(workdir.data_folder, self.separator.audio_channels)
            decoded.remove()  # of a crashed attempt
            # This counts the attempt before decoding, as a decoder may crash the process, too.
            spool = self._open_spool(job, workdir)
            earlier = self._reuse_stems(job, recipe, spool)
            reader = self._open_track(job)
            with closing(decoded.tee(reader.blocks())) as blocks:
                level = measure(check_between(blocks, stop))
            if _stamp(job.source) != stamp:
                raise AudioReadError(
                    "the file changed while it was being read: try again once it has been fully "
                    "written"
                )
            writer = self._open_writer(job, reader, workdir, spool)
        except Exception as error:
            if spool:
                spool.abandon()
            if isinstance(error, AlreadyDone):
                workdir.abandon()
                raise
            if isinstance(error, SpoolAbandoned):
                workdir.release()
                raise
            is_kept = self.keeps_when_full and spool is not None and spool.frames > 0
            raise clean_up(error, job, workdir, keeps_when_full=is_kept) from error.__cause__
        return PreparedTrack(
            job=job,
            recipe=recipe,
            track=DecodedTrack(decoded, level, reader.channels, spool.frames),
            writer=writer,
            workdir=workdir,
            resumed_frames=spool.frames,
            warnings=(
                *reader.warnings,
                *self._rate_warning(writer),
                *workdir.warnings,
                *_rounding_warning(earlier),
            ),
            start_time=start_time,
        )

    def workdir(self, job: TrackJob) -> WorkDir:
        """Return the working folder of a track."""
        return WorkDir(job.target.folder, job.target.manifest, self.made_folders, self.run)

    def _make_recipe(self, job: TrackJob, stop: threading.Event) -> Recipe:
        """Return the recipe of the track; raise `AlreadyDone` if it is done."""
        paths = job.target.stems(self.separator.stems)
        if self.skip == "existing" and all(path.is_file() for path in paths.values()):
            raise AlreadyDone(
                TrackResult(track=job.track, status="skipped", model=self.model.name, stems=paths)
            )
        if is_stream(job.source):
            raise AudioReadError(
                "cannot be read: it is a pipe or a device; save it as a file first"
            )
        try:
            digest = sha256_file(job.source, partial(check_stop, stop))
        except OSError as error:
            raise AudioReadError(f"cannot be read: {error.strerror or error}") from error
        if job.sha256 not in (None, digest):
            raise AudioReadError(f"sha256 mismatch: expected {job.sha256}, got {digest}")
        recipe = make_recipe(self.request, digest, self.model, self.weights)
        self._check_done(job, recipe)
        if self.keeps_other_inputs:
            self._check_replaced_input(job, digest)
        return recipe

    def _check_replaced_input(self, job: TrackJob, digest: str) -> None:
        replaced = find_replaced_input(job, digest)
        if replaced is not None and replaced.relation == "other":
            raise AlreadyDone(
                TrackResult(
                    track=job.track,
                    status="failed",
                    model=self.model.name,
                    error=describe_refusal(job, replaced),
                    fault="other",
                )
            )

    def _check_done(self, job: TrackJob, recipe: Recipe) -> None:
        result = find_done(job, recipe, verify=self.verify) if self.skip == "same" else None
        if result:
            raise AlreadyDone(result)

    def _check_folders(self, job: TrackJob) -> None:
        """Check, before any work, that no output path is a folder."""
        for path in (*job.target.stems(self.separator.stems).values(), job.target.manifest):
            if path.is_dir():
                raise AudioWriteError(f"cannot write {path}: it is a folder; move it away")

    def _lock_workdir(
        self, job: TrackJob, recipe: Recipe, stop: threading.Event, *, wait: bool
    ) -> WorkDir:
        workdir = self.workdir(job)
        while not workdir.acquire(recipe.key):
            if not wait:
                raise TrackLocked("another process is separating this track: let it finish")
            if stop.wait(_POLL_SECONDS):
                raise SpoolAbandoned
        try:
            self._check_done(job, recipe)  # the process that had the lock may have separated it
        except AlreadyDone:
            workdir.remove()
            raise
        return workdir

    def _open_spool(self, job: TrackJob, workdir: WorkDir) -> Spool:
        """Return the spool, with the samples of earlier attempts, and count this attempt.

        Raises `AlreadyDone` if the track is quarantined, because it has crashed too often. It is
        tried again when its folder in `.partial` is removed, or by a run that ignores crashes.
        """
        separator = self.separator
        spool = Spool(workdir.data_folder, len(separator.stems), separator.audio_channels)
        attempts = workdir.read_attempts(spool.frames)
        crashes = attempts.crashes
        if self.max_crashes is not None and crashes >= self.max_crashes:
            spool.abandon()
            times = f"{crashes} times" if crashes > 1 else "once"
            raise AlreadyDone(
                TrackResult(
                    track=job.track,
                    status="quarantined",
                    model=self.model.name,
                    error=f"its process crashed {times}; to try it again, remove {workdir.folder}",
                    fault="other",
                )
            )
        if self.max_crashes is not None:
            attempts.warn_of_kills(job.track)
        workdir.begin(spool.frames)
        return spool

    def _reuse_stems(self, job: TrackJob, recipe: Recipe, spool: Spool) -> EarlierStems | None:
        """Fill the spool with the stems of an earlier run, if they can replace the network.

        Stems that were not rounded give the same files as the network would. Others are used only
        with `reuses_stems`.
        """
        if spool.frames or self.skip == "nothing":
            return None
        separator = self.separator
        earlier = find_earlier_stems(
            job.target.manifest,
            recipe,
            separator.stems,
            separator.samplerate,
            separator.audio_channels,
        )
        if earlier is None or not (earlier.is_exact or self.reuses_stems):
            return None
        for block in earlier.blocks():
            spool.append(block)
        return earlier

    def _open_track(self, job: TrackJob) -> TrackReader:
        separator = self.separator
        return open_track(
            job.source, separator.samplerate, separator.audio_channels, self.request.input
        )

    def _open_writer(
        self, job: TrackJob, reader: TrackReader, workdir: WorkDir, spool: Spool
    ) -> StemWriter:
        output, info, separator = self.request.output, reader.info, self.separator
        layout = file_layout(
            output,
            model=(separator.samplerate, separator.audio_channels),
            source=(info.sample_rate, info.channels),
            frames=reader.reader.frames,
        )
        paths = job.target.stems(separator.stems)
        return StemWriter.open(spool, paths, layout, output, info, temp_folder=workdir.data_folder)

    def _rate_warning(self, writer: StemWriter) -> Iterator[str]:
        """Yield a warning if the format does not support the requested rate."""
        rate, written = writer.layout.rate, writer.file_rate
        if isinstance(self.request.output.rate, int) and written != rate:
            yield f"{writer.encoding.format} does not support {rate} Hz: written at {written} Hz"


def _rounding_warning(earlier: EarlierStems | None) -> Iterator[str]:
    """Yield a warning if stems were encoded from others that were rounded."""
    if earlier is not None and not earlier.is_exact:
        yield f"encoded from the {earlier.bits}-bit stems of an earlier run"


def clean_up(
    error: Exception, job: TrackJob, workdir: WorkDir, *, keeps_when_full: bool
) -> Exception:
    """Clean up after an error, and return the error to report.

    With `keeps_when_full`, a full disk leaves the samples that were separated for the next attempt.
    """
    if not (keeps_when_full and workdir.is_resumable and is_disk_full(error)):
        workdir.remove()
        return error
    workdir.release()
    if isinstance(error, OSError):
        error = write_error(str(job.target.folder), error)
    kept = AudioWriteError(f"{error}; the next attempt continues from here")
    kept.__cause__ = error
    return kept


def check_between(blocks: Iterable[Tensor], stop: threading.Event) -> Iterator[Tensor]:
    """Yield the blocks; raise `SpoolAbandoned` once `stop` is set."""
    for block in blocks:
        check_stop(stop)
        yield block


def check_stop(stop: threading.Event) -> None:
    """Raise `SpoolAbandoned` if `stop` is set."""
    if stop.is_set():
        raise SpoolAbandoned


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return values that change when the file is replaced or written to."""
    try:
        stat = path.stat()
    except OSError:  # reported when it is read
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
