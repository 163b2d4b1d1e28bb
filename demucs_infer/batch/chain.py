"""Separate a stem of one model further with a second model, in one run.

The stems of the first model are buffered in a temporary file, so that memory does not grow with the
length of the track. Only the requested stems are written to files.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from demucs_infer.batch.request import ModelSpec
from demucs_infer.errors import ModelLoadingError
from demucs_infer.options import Request

if TYPE_CHECKING:
    from torch import Tensor

    from demucs_infer.api import Separator
    from demucs_infer.audio.spool import Spool
    from demucs_infer.engine.pipeline import Track, TrackEvent

_PIECE = 65_536
"""Samples that are read from the temporary file at a time."""


@dataclass(frozen=True, kw_only=True)
class ChainedModelSpec(ModelSpec):
    """Two models: the second one separates a stem of the first."""

    first: ModelSpec
    second: ModelSpec
    stem: str

    def weights(self) -> tuple[str, ...] | None:
        """Return the sha256 of each file of both models; None if some are not downloaded."""
        first, second = self.first.weights(), self.second.weights()
        if first is None or second is None:
            return None
        return (*first, f"then {self.stem}", *second)

    def open(self, request: Request) -> Separator:
        """Return a separator that runs both models, for the settings and stems of a request.

        The second model runs with the settings of its own, but with the device, precision and jobs
        of the request.
        """
        from typing import cast

        from demucs_infer.batch.runner import open_separator

        chosen = request.stems.stems
        keeps_stem = chosen is not None and self.stem in chosen
        if chosen is not None and not keeps_stem:
            request = request.replace({"stems": (*chosen, self.stem)})
        options = request.separation
        shared = {name: getattr(options, name) for name in ("device", "precision", "jobs")}
        own = Request().replace(self.second.fill_settings(shared))
        first = open_separator(self.first, request)
        second = open_separator(self.second, own)
        return cast("Separator", ChainedSeparator(first, second, self.stem, keeps_stem=keeps_stem))


class ChainedSeparator:
    """Two separators in the place of one `Separator`, with the methods that a batch run calls."""

    def __init__(
        self, first: Separator, second: Separator, stem: str, *, keeps_stem: bool = False
    ) -> None:
        if stem not in first.stems:
            raise ValueError(
                f"the first model has no stem {stem!r} to separate again: choose one of "
                f"{', '.join(first.stems)}"
            )
        for name in ("samplerate", "audio_channels"):
            if getattr(first, name) != getattr(second, name):
                raise ModelLoadingError(
                    f"the two models differ in {name}: {getattr(first, name)} and "
                    f"{getattr(second, name)}: separate the stem in a run of its own"
                )
        self._first, self._second, self._stem = first, second, stem
        kept = [name for name in first.stems if name != stem or keeps_stem]
        self._kept = [first.stems.index(name) for name in kept]
        new = [name if name not in kept else f"{stem}_{name}" for name in second.stems]
        self.stems = (*kept, *new)
        """Names of the stems: those of the first model, then those of the second."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the first separator, such as `devices`; both have the same."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._first, name)

    def update_parameter(self, **_settings: object) -> None:
        """Do nothing, as both separators have their settings already."""

    def free_original_weights(self) -> None:
        """Do nothing, as both separators have freed their weights already."""

    def stream_blocks_many(
        self, tracks: Iterable[Track | Exception], *, max_tracks_per_batch: int = 1
    ) -> Generator[tuple[int, TrackEvent], None, None]:
        """Yield the items of `Separator.stream_blocks_many`, one track after the other."""
        from demucs_infer.events import TrackFailed, TrackFinished

        del max_tracks_per_batch
        for index, track in enumerate(tracks):
            if isinstance(track, Exception):
                yield index, TrackFailed(track)
                continue
            try:
                with closing(self._separate(track)) as stream:
                    for item in stream:
                        yield index, item
            except Exception as error:  # noqa: BLE001 (a bad track must not stop the others)
                yield index, TrackFailed(error)
            else:
                yield index, TrackFinished()

    def _separate(self, track: Track) -> Generator[TrackEvent, None, None]:
        import torch

        from demucs_infer.audio.spool import Spool, read_frames
        from demucs_infer.engine.pipeline import Block

        with TemporaryDirectory(prefix="demucs-stems-") as name:
            folder = Path(name)
            spool = Spool(folder, len(self._first.stems), self._first.audio_channels)
            try:
                for item in self._first.stream_blocks(_WholeTrack(track)):
                    if isinstance(item, Block):
                        spool.append(item.stems.cpu())
                    else:
                        yield _scale(item, 0.0)
                spool.finish()
            finally:
                spool.abandon_unless_finished()
            first_sample = getattr(track, "first", 0)
            stem = _SpooledStem(folder, spool, self._first.stems.index(self._stem), first_sample)
            for item in self._second.stream_blocks(stem):
                if not isinstance(item, Block):
                    yield _scale(item, 0.5)
                    continue
                stop = item.start + item.stems.shape[-1]
                others = read_frames(folder, spool.shape, item.start, stop)[self._kept]
                yield Block(item.start, torch.cat([others.to(item.stems.device), item.stems]))

    def close(self) -> None:
        """Free the memory of the device."""
        self._first.close()
        self._second.close()

    def __enter__(self) -> ChainedSeparator:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _scale(event: Any, start: float) -> Any:
    """Return an event of one of the two models, which does half of the work."""
    from demucs_infer.events import ChunkProcessed

    if isinstance(event, ChunkProcessed):
        return replace(event, fraction=start + event.fraction / 2)
    return event


class _WholeTrack:
    """A track from its first sample on, also where the rest of its stems exists already."""

    def __init__(self, track: Track) -> None:
        self._track = track
        self.channels = track.channels
        for name in ("length", "level"):
            if hasattr(track, name):
                setattr(self, name, getattr(track, name))

    def blocks(self) -> Iterator[Tensor]:
        """Return the samples: (C, t)."""
        return self._track.blocks()


class _SpooledStem:
    """A stem in a temporary file, as a track."""

    def __init__(self, folder: Path, spool: Spool, stem: int, first: int) -> None:
        self._folder, self._shape, self._stem = folder, spool.shape, stem
        self.length = spool.frames
        self.channels = spool.shape[1]
        self.first = first

    def blocks(self) -> Iterator[Tensor]:
        """Yield the samples: (C, t)."""
        from demucs_infer.audio.spool import read_frames

        for start in range(0, self.length, _PIECE):
            stop = min(start + _PIECE, self.length)
            yield read_frames(self._folder, self._shape, start, stop)[self._stem].contiguous()
