"""Separate one track with fixed settings, into blocks, memory or files.

Shapes: C channels, T samples of the track.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TypeAlias, cast

import torch
from torch import nn

from demucs_infer.apply import with_bar
from demucs_infer.audio.channels import convert_channels
from demucs_infer.audio.gain import Levels, translate_os_errors
from demucs_infer.audio.spool import Spool
from demucs_infer.audio.stem_writer import StemWriter
from demucs_infer.audio.writer import Target
from demucs_infer.engine.network import Ensemble, Network
from demucs_infer.engine.pipeline import Block, TensorTrack, Track, separate
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.stems import StemPlan
from demucs_infer.events import ChunkStarted, Event, Stage, WarningEvent, call_back
from demucs_infer.options import OutputOptions
from demucs_infer.results import (
    InferenceOutput,
    SeparatedFiles,
    file_layout,
    make_folders,
    stem_targets,
)
from demucs_infer.separator_state import SeparatorState
from demucs_infer.sources import AudioSource, FileSource
from demucs_infer.system.threads import limit_to_one_thread

Events: TypeAlias = "Generator[Event | InferenceOutput, None, None]"
FileEvents: TypeAlias = "Generator[Event | SeparatedFiles, None, None]"
BlockEvents: TypeAlias = "Generator[Event | Block, None, None]"


def with_queries(
    ensemble: Ensemble,
    model_kwargs: Mapping[str, object],
    queries: Mapping[str, Mapping[str, object]] | None,
) -> Ensemble:
    """Return the networks with additional arguments that are passed in every call."""
    if queries is None:
        queries = {"": {}}
    elif ensemble.weights is not None:
        raise ValueError("`queries` is not supported for bags of models")
    all_queries = {name: {**model_kwargs, **query} for name, query in queries.items()}
    members = [QueryAdapter(cast(nn.Module, member), all_queries) for member in ensemble.members]
    return replace(ensemble, members=tuple(cast(Network, member) for member in members))


@dataclass(frozen=True, slots=True, eq=False)
class TrackSeparation:
    """The networks and settings of one track, unaffected by later changes of the separator."""

    ensemble: Ensemble
    plan: StemPlan
    state: SeparatorState
    runner: Runner

    def run(self, track: Track) -> BlockEvents:
        """Yield events and blocks, and update the callback and the progress bar of the settings."""
        state = self.state
        engine = separate(
            track,
            self.ensemble,
            options=state.options,
            stems=self.plan,
            runner=self.runner,
            announce=state.callback is not None,
        )
        with closing(engine):
            stream: Iterator[Event | Block] = engine
            if state.callback is not None:
                extra = dict(state.callback_arg or {})
                stream = call_back(
                    _with_length(stream, track, extra),
                    state.callback,
                    models=len(self.ensemble.members),
                    extra=extra,
                )
            if state.progress:
                stream = with_bar(stream)
            for item in stream:
                if not isinstance(item, ChunkStarted):  # only the callback asked for these
                    yield item


def _with_length(
    stream: Iterator[Event | Block], track: Track, extra: dict[str, object]
) -> Iterator[Event | Block]:
    """Yield the items, and update the track's length, which is known once its level is measured."""
    for item in stream:
        extra["audio_length"] = getattr(track, "length", None)
        yield item


def separate_in_memory(separation: TrackSeparation, source: AudioSource) -> Events:
    """Yield events, then the stems."""
    is_file = isinstance(source, FileSource)
    if is_file:
        yield Stage.Started("load")
    wav = torch.cat(list(source.blocks()), dim=-1)
    for message in source.warnings:
        yield WarningEvent(message)
    if is_file:
        yield Stage.Completed("load")
    shape = (separation.ensemble.audio_channels, wav.shape[-1])
    # One tensor each, so that a program that keeps one stem does not keep the memory of all.
    stems = {
        name: torch.empty(shape, device=separation.state.track_device)
        for name in separation.plan.outputs
    }
    with closing(separation.run(TensorTrack(wav))) as stream:
        for item in stream:
            if not isinstance(item, Block):
                yield item
                continue
            stop = item.start + item.stems.shape[-1]
            for stem, samples in zip(stems.values(), item.stems):
                stem[:, item.start : stop] = samples
    mixture = convert_channels(wav, separation.ensemble.audio_channels)
    yield InferenceOutput(stems, separation.ensemble.samplerate, mixture)


def separate_to_files(
    separation: TrackSeparation,
    source: AudioSource,
    out: str | os.PathLike[str] | Mapping[str, Target],
    options: OutputOptions,
) -> FileEvents:
    """Yield progress events, then the files; an error, or `close`, leaves no files."""
    start_time = perf_counter()
    targets = stem_targets(out, separation.plan.outputs, options, source.name)
    warnings: list[str] = []
    with (
        make_folders(targets, source.path),
        _temporary_spool(targets, separation) as spool,
        _open_writer(separation, source, targets, options, spool) as writer,
        ThreadPoolExecutor(1, "demucs-write", limit_to_one_thread) as pool,
    ):
        try:
            encoding: Future[Levels] | None = None
            with closing(separation.run(source)) as stream:
                for item in stream:
                    if not isinstance(item, Block):
                        warnings += [item.message] if isinstance(item, WarningEvent) else []
                        yield item
                        continue
                    if encoding is None:  # the length of the source is known now
                        writer.layout = replace(writer.layout, frames=_frames(writer, source))
                        encoding = pool.submit(writer.encode)
                    if encoding.done():  # early: it has failed
                        encoding.result()
                    with translate_os_errors(writer.sink.name):
                        spool.append(item.stems)
            spool.finish()
            yield Stage.Started("save")
            levels = (encoding or pool.submit(writer.encode)).result()
            writer.commit()
            yield Stage.Completed("save")
        finally:
            spool.abandon_unless_finished()
    for message in source.warnings:
        yield WarningEvent(message)
    yield SeparatedFiles(
        paths={
            name: Path(target) if isinstance(target, str | os.PathLike) else None
            for name, target in targets.items()
        },
        sample_rate=writer.layout.rate,
        channels=writer.layout.channels,
        frames=writer.frames,
        gains=levels.gains,
        peaks=levels.peaks,
        warnings=(*warnings, *source.warnings),
        seconds=perf_counter() - start_time,
    )


def _frames(writer: StemWriter, source: AudioSource) -> int | None:
    """Return the exact length of the files, if they have the sample rate of the source."""
    return source.frames if writer.layout.rate == source.sample_rate else None


def _open_writer(
    separation: TrackSeparation,
    source: AudioSource,
    targets: Mapping[str, Target],
    options: OutputOptions,
    spool: Spool,
) -> StemWriter:
    model = separation.ensemble
    layout = file_layout(
        options,
        model=(model.samplerate, model.audio_channels),
        source=(source.sample_rate, source.num_channels),
    )
    return StemWriter.open(spool, targets, layout, options, source)


@contextmanager
def _temporary_spool(targets: Mapping[str, Target], separation: TrackSeparation) -> Iterator[Spool]:
    """Make a spool in the folder of the files, as the temporary folder may be in memory."""
    paths = [Path(target) for target in targets.values() if isinstance(target, str | os.PathLike)]
    parent = paths[0].parent if paths else None
    with translate_os_errors(str(parent or tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(
            prefix=".demucs-infer-", dir=parent, ignore_cleanup_errors=True
        )
    with folder:
        spool = Spool(
            Path(folder.name), len(separation.plan.outputs), separation.ensemble.audio_channels
        )
        try:
            yield spool
        finally:
            spool.abandon_unless_finished()
