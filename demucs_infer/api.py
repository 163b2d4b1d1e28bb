"""Separate a track into stems: `Separator("htdemucs").run("song.mp3")["vocals"]`.

Shapes: S stems, C channels, T samples of the track, t of a block.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from demucs_infer.apply import with_bar
from demucs_infer.audio.channels import ExtraChannels, Method, convert_channels
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.gain import Clip
from demucs_infer.audio.writer import Target, save_audio
from demucs_infer.checkpoints.download import progress_bar
from demucs_infer.custom.build import load_network
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.engine.network import Ensemble, Network
from demucs_infer.engine.pipeline import (
    Block,
    TensorTrack,
    Track,
    TrackEvent,
    separate,
    separate_many,
)
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.stems import StemPlan
from demucs_infer.errors import AudioReadError as LoadAudioError
from demucs_infer.errors import ModelLoadingError as LoadModelError
from demucs_infer.events import ChunkStarted, Event, Stage, WarningEvent, call_back
from demucs_infer.optimized.compiled import compile_network
from demucs_infer.optimized.optimize import optimize
from demucs_infer.pretrained import get_model, list_models
from demucs_infer.results import (
    InferenceOutput,
    OutputOptions,
    SeparatedFiles,
    StemResampler,
    make_folders,
)
from demucs_infer.settings import (
    BatchSize,
    Callback,
    Derive,
    Device,
    OwnParameters,
    Parameters,
    Settings,
    Stems,
)
from demucs_infer.sources import Audio, AudioInput, AudioSource, FileSource, ReadOptions, open_audio

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Audio",
    "InferenceOutput",
    "LoadAudioError",
    "LoadModelError",
    "OutputOptions",
    "SeparatedFiles",
    "Separator",
    "list_models",
    "save_audio",
]


class _NotProvided(Enum):
    """Stands for "as it is", where None already means something."""

    NotProvided = "as it is"

    def __repr__(self) -> str:
        return "NotProvided"


NotProvided = _NotProvided.NotProvided

Events: TypeAlias = "Generator[Event | InferenceOutput, None, None]"
FileEvents: TypeAlias = "Generator[Event | SeparatedFiles, None, None]"
BlockEvents: TypeAlias = "Generator[Event | Block, None, None]"
TrackEvents: TypeAlias = "Generator[tuple[int, TrackEvent], None, None]"


class Separator:
    """A model that is ready for any number of tracks, from any number of threads.

    `model` is a name, a signature, `hf://namespace/name` or the path of a checkpoint; with `repo`,
    a model of that folder. `device="auto"` takes the best there is, when it is asked for. `jobs`
    is how many forwards may run beside the one being stitched. `callback` is called with
    upstream's dictionary at the start and the end of every window, and ends the work by raising.
    With `progress` there are bars on the error stream, of a download and of every track.

    `stems` names what is handed out: networks of a bag that only make others are not run.
    `derive` makes more of them (`"drumless=mixture-drums"`). `io_device` is where tracks and stems
    are kept. Unlike upstream's, shifts are drawn from `seed`, so that a result can be had again;
    `seed=None` draws from the global generator as upstream does.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "htdemucs",
        repo: str | os.PathLike[str] | None = None,
        device: Device = "auto",
        shifts: int = 1,
        overlap: float = 0.25,
        split: bool = True,
        segment: float | None = None,
        jobs: int = 0,
        progress: bool = False,
        callback: Callback | None = None,
        callback_arg: Mapping[str, object] | None = None,
        *,
        stems: Stems = None,
        derive: Derive = (),
        seed: int | None = 0,
        precision: str = "fp32",
        compile: bool | str = False,
        batch_size: BatchSize = "auto",
        io_device: Device = "cpu",
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        trust: bool = False,
    ) -> None:
        parameters: Parameters = {
            "device": device,
            "shifts": shifts,
            "overlap": overlap,
            "split": split,
            "segment": segment,
            "jobs": jobs,
            "progress": progress,
            "callback": callback,
            "callback_arg": callback_arg,
            "stems": stems,
            "derive": derive,
            "seed": seed,
            "precision": precision,
            "compile": compile,
            "batch_size": batch_size,
            "io_device": io_device,
        }
        Settings.check(parameters)  # before anything is downloaded
        with progress_bar(os.fspath(model)) if progress else nullcontext() as told:
            network = get_model(
                model, repo, cache_dir=cache_dir, offline=offline, trust=trust, progress=told
            )
        self._adopt(network, is_ours=True, **parameters)

    @classmethod
    def from_model(cls, model: nn.Module, **parameters: Unpack[Parameters]) -> Separator:
        """A separator around a network, or a bag of them, that is in memory already.

        `parameters` are those of `Separator(...)`. The network stays the caller's: after each
        track it is on its device and in its mode again. Its weights are read when it first runs.

        It has `sources`, `samplerate`, `audio_channels` and `segment`. A plain module gets them
        from `demucs_infer.custom.adapter.create_w2w_model(module, params)`; no `metadata` could
        give them here, since it tells how a network is made, and this one is.
        """
        separator = cls.__new__(cls)
        separator._adopt(model, is_ours=False, **parameters)
        return separator

    @classmethod
    def from_pretrained(
        cls,
        *,
        config: Config | Mapping[str, object] | str | os.PathLike[str],
        checkpoint: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        metadata: ModelMetadata[Any] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Separator:
        """A separator around a network of one's own, from a configuration and its weights.

        `overrides` change the configuration (`"inference.batch_size=2"`), `parameters` are those
        of `Separator(...)` and go before it. `metadata` says which network it is; without, its
        package offers it under the configuration's `model_type`.
        """
        known = Config.load(config, overrides)
        network = load_network(known, checkpoint, metadata)
        separator = cls.__new__(cls)
        told: Parameters = {**known.parameters, **parameters}
        separator._adopt(network, is_ours=True, **told)
        separator._saving = OutputOptions(encoding=known.output.encoding, clip=known.output.clip)
        return separator

    def _adopt(self, model: nn.Module, *, is_ours: bool, **parameters: Unpack[Parameters]) -> None:
        self._model = model
        self._ensemble = Ensemble.from_model(model)
        self._settings = Settings.of(self._ensemble.members, parameters)
        self._lock = Lock()
        self._is_closed = False
        self._is_ours = is_ours
        self._saving = OutputOptions()
        """How files are written where nobody says how."""
        self._home = ExitStack()
        """What keeps a network of ours on its device from one track to the next."""
        self._runner = self._settle(self._settings.network_device)

    def _settle(self, device: torch.device) -> Runner:
        """A runner for `device`, with the networks there to stay if they are ours."""
        runner = _runner(device, compile=self._settings.compile)
        if self._is_ours:
            self._home.enter_context(runner.lease(self._ensemble.members))
        return runner

    @property
    def samplerate(self) -> int:
        """Samples a second of every stem."""
        return self._ensemble.samplerate

    @property
    def audio_channels(self) -> int:
        """Channels of every stem."""
        return self._ensemble.audio_channels

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._settings.network_device

    @property
    def jobs(self) -> int:
        """How many forwards may run beside the one being stitched."""
        return self._settings.jobs

    @property
    def model(self) -> nn.Module:
        """The network, or the bag of them."""
        return self._model

    @property
    def stems(self) -> tuple[str, ...]:
        """What is handed out, in order."""
        return self._settings.plan.outputs

    def update_parameter(
        self,
        device: Device | _NotProvided = NotProvided,
        shifts: int | _NotProvided = NotProvided,
        overlap: float | _NotProvided = NotProvided,
        split: bool | _NotProvided = NotProvided,
        segment: float | _NotProvided | None = NotProvided,
        jobs: int | _NotProvided = NotProvided,
        progress: bool | _NotProvided = NotProvided,
        callback: Callback | _NotProvided | None = NotProvided,
        callback_arg: Mapping[str, object] | _NotProvided | None = NotProvided,
        **own: Unpack[OwnParameters],
    ) -> None:
        """Change what is named, for tracks that begin from now on.

        `own` are `stems`, `derive`, `seed`, `precision`, `batch_size` and `io_device`.
        """
        asked = {
            "device": device,
            "shifts": shifts,
            "overlap": overlap,
            "split": split,
            "segment": segment,
            "jobs": jobs,
            "progress": progress,
            "callback": callback,
            "callback_arg": callback_arg,
            **own,
        }
        changes = {name: value for name, value in asked.items() if value is not NotProvided}
        with self._lock:
            settings = self._settings.but(changes)
            before = self._settings.network_device
            if settings.network_device != before:
                self._home.close()
                try:
                    self._runner = self._settle(settings.network_device)
                except ValueError:  # in use by a track that has begun
                    self._settle(before)
                    raise
            self._settings = settings

    def separate_tensor(
        self, wav: Tensor, sr: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(The track as the model hears it, its stems by name), each (C T).

        Unlike upstream's, channels are converted whether `sr` is the model's or not.
        """
        return _pair(self.run(wav, sr))

    def separate_audio_file(self, file: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """(The track as the model hears it, its stems by name), each (C T)."""
        return _pair(self.run(file))

    def open_audio(
        self,
        audio: AudioInput,
        sample_rate: float | None = None,
        *,
        start_seconds: float = 0.0,
        duration_seconds: float | None = None,
        resampler: Method = "julius",
        extra_channels: ExtraChannels = "first",
        group: int = 0,
        strict: bool = False,
    ) -> AudioSource:
        """A part of a track, or one that needs care; `run` and the others take it as they do paths.

        `extra_channels` and `group` say what becomes of more channels than the model takes,
        `strict` makes an error of a damaged file.
        """
        hearing = ReadOptions(
            sample_rate=self.samplerate,
            channels=self.audio_channels,
            device=self._settings.track_device,
            start_seconds=start_seconds,
            duration_seconds=duration_seconds,
            resampler=resampler,
            extra_channels=extra_channels,
            group=group,
            strict=strict,
        )
        return open_audio(audio, sample_rate, hearing=hearing)

    def run(
        self,
        audio: AudioInput,
        sample_rate: float | None = None,
        *,
        model_kwargs: Mapping[str, object] | None = None,
        queries: Mapping[str, Mapping[str, object]] | None = None,
    ) -> InferenceOutput:
        """The stems of a track: a path, bytes, an open file, or an array (C T), (T,) or (T C).

        An array is at `sample_rate`, or at the model's. `model_kwargs` go to every call of the
        network; with `queries`, arguments by name, it is asked each of them about every window.
        """
        for item in self.stream(audio, sample_rate, model_kwargs=model_kwargs, queries=queries):
            if isinstance(item, InferenceOutput):
                return item
        raise AssertionError("a stream ends with its output")

    def stream(
        self,
        audio: AudioInput,
        sample_rate: float | None = None,
        *,
        model_kwargs: Mapping[str, object] | None = None,
        queries: Mapping[str, Mapping[str, object]] | None = None,
    ) -> Events:
        """As `run`, with what happens on the way as events; the output is the last of them.

        Closing the generator ends the work within a batch.
        """
        task = self._task(model_kwargs, queries)
        return _in_memory(task, self.open_audio(audio, sample_rate))

    def separate_to(
        self,
        audio: AudioInput,
        out: str | os.PathLike[str] | Mapping[str, Target],
        format: str | None = None,
        *,
        sample_rate: float | None = None,
        bits: int | None = None,
        bitrate: int | None = None,
        clip: Clip | None = None,
        template: str = "{stem}.{ext}",
    ) -> SeparatedFiles:
        """A track into files, in memory that does not grow with its length.

        `out` is a folder, where `template` names the files, or a path or file object per stem.
        All files appear, complete, at the end; should it fail, neither they nor a new folder. In
        formats that can clip they are encoded at the end too, when the peaks are known: until then
        there are floats beside them, 4 bytes a sample. Unlike upstream's, they share one gain where
        one would clip; `clip="rescale"` gives each its own. What is not said is as the
        configuration of the network has it: otherwise a wav file.
        """
        encoding = self._saving.encoding
        if (format, bits, bitrate) != (None, None, None):
            encoding = Encoding(format or encoding.format, bits=bits, bitrate=bitrate)
        saving = OutputOptions(encoding=encoding, clip=clip or self._saving.clip, template=template)
        for item in self.stream_to(audio, out, saving, sample_rate=sample_rate):
            if isinstance(item, SeparatedFiles):
                return item
        raise AssertionError("a stream ends with its output")

    def stream_to(
        self,
        audio: AudioInput,
        out: str | os.PathLike[str] | Mapping[str, Target],
        saving: OutputOptions | None = None,
        *,
        sample_rate: float | None = None,
    ) -> FileEvents:
        """As `separate_to`, with what happens on the way as events.

        `saving` says all that can be said about the files. Closing the generator ends the work
        within a batch, and leaves no file.
        """
        return _to_files(
            self._task(), self.open_audio(audio, sample_rate), out, saving or self._saving
        )

    def stream_blocks(self, track: Track) -> BlockEvents:
        """Final samples of the stems in order, and events, for a track at the model's rate.

        This is the level below files and results: `open_audio` makes such a track of anything.
        """
        return self._task().run(track)

    def stream_blocks_many(
        self, tracks: Iterable[Track | Exception], *, max_tracks_per_batch: int = 1
    ) -> TrackEvents:
        """As `stream_blocks`, for one track after the other: (its number, what there is of it).

        Windows of up to `max_tracks_per_batch` tracks in a row run as one batch. A track ends
        with `TrackFinished`, or with `TrackFailed`, as an exception in place of one does. No
        callback hears of it.
        """
        task = self._task()
        return separate_many(
            tracks,
            task.ensemble,
            options=task.settings.options,
            stems=task.plan,
            runner=task.runner,
            max_tracks_per_batch=max_tracks_per_batch,
        )

    def free_original_weights(self) -> None:
        """Keep one copy of the weights instead of two, before the first track.

        For a process that only separates, in one precision: on a processor, networks hand their
        weights over to their fast forms. `model` can then neither be run nor saved.
        """
        if not self._is_ours:
            raise ValueError("the network of from_model is its owner's: its weights stay")
        with self._lock:
            device, compile = self._settings.network_device, self._settings.compile
            self._runner = _runner(device, compile=compile, consume_weights=True)

    def close(self) -> None:
        """Give the memory of the device back; the separator cannot be used any more."""
        with self._lock:
            self._is_closed = True
            self._home.close()
            self._runner = Runner("cpu")
        if self._settings.network_device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Separator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _task(
        self,
        model_kwargs: Mapping[str, object] | None = None,
        queries: Mapping[str, Mapping[str, object]] | None = None,
    ) -> _TrackSeparation:
        with self._lock:
            if self._is_closed:
                raise ValueError("this Separator is closed; make another")
            settings, runner = self._settings, self._runner
        if not self._is_ours:
            # Its owner may change the weights, and a fast form of them would not follow.
            runner = _runner(settings.network_device, compile=settings.compile)
        if not model_kwargs and queries is None:
            return _TrackSeparation(self._ensemble, settings.plan, settings, runner)
        ensemble = _asked(self._ensemble, model_kwargs or {}, queries)
        # A runner remembers every network it has seen, and this one is gone after the track.
        runner = _runner(settings.network_device, compile=settings.compile)
        return _TrackSeparation(ensemble, settings.plan_for(ensemble.sources), settings, runner)


def _runner(device: torch.device, *, compile: bool | str, consume_weights: bool = False) -> Runner:
    """What runs networks on `device`, in their fast form."""

    def prepare(network: Network, precision: str) -> Network:
        fast = optimize(
            cast(nn.Module, network), precision, device=device, consume_weights=consume_weights
        )
        backend = "inductor" if compile is True else compile
        return cast(Network, compile_network(fast, backend) if backend else fast)

    return Runner(device, prepare=prepare)


def _pair(output: InferenceOutput) -> tuple[Tensor, dict[str, Tensor]]:
    assert output.mixture is not None
    return output.mixture, output.outputs


def _asked(
    ensemble: Ensemble,
    model_kwargs: Mapping[str, object],
    queries: Mapping[str, Mapping[str, object]] | None,
) -> Ensemble:
    """The same networks, with something to be told at every call."""
    if queries is None:
        queries = {"": {}}
    elif ensemble.weights is not None:
        raise ValueError("queries are for a single network; a bag weighs stems that it knows")
    all_queries = {name: {**model_kwargs, **query} for name, query in queries.items()}
    members = [QueryAdapter(cast(nn.Module, member), all_queries) for member in ensemble.members]
    return Ensemble(tuple(cast(Network, member) for member in members), ensemble.weights)


@dataclass(frozen=True, slots=True, eq=False)
class _TrackSeparation:
    """How one track is separated, whatever happens to the separator meanwhile."""

    ensemble: Ensemble
    plan: StemPlan
    settings: Settings
    runner: Runner

    def run(self, track: Track) -> BlockEvents:
        """Events and blocks; the callback and the bar of the settings hear of them too."""
        settings = self.settings
        engine = separate(
            track,
            self.ensemble,
            options=settings.options,
            stems=self.plan,
            runner=self.runner,
            announce=settings.callback is not None,
        )
        with closing(engine):
            stream: Iterator[Event | Block] = engine
            if settings.callback is not None:
                extra = dict(settings.callback_arg or {})
                stream = call_back(
                    _with_length(stream, track, extra),
                    settings.callback,
                    models=len(self.ensemble.members),
                    extra=extra,
                )
            if settings.progress:
                stream = with_bar(stream)
            for item in stream:
                if not isinstance(item, ChunkStarted):  # only the callback asked for these
                    yield item


def _with_length(
    stream: Iterator[Event | Block], track: Track, extra: dict[str, object]
) -> Iterator[Event | Block]:
    """The same stream; a file knows its length once it has been read for its level."""
    for item in stream:
        extra["audio_length"] = getattr(track, "length", None)
        yield item


def _in_memory(task: _TrackSeparation, recording: AudioSource) -> Events:
    is_file = isinstance(recording, FileSource)
    if is_file:
        yield Stage.Started("load")
    wav = torch.cat(list(recording.blocks()), dim=-1)
    for message in recording.warnings:
        yield WarningEvent(message)
    if is_file:
        yield Stage.Completed("load")
    shape = (task.ensemble.audio_channels, wav.shape[-1])
    # One tensor each: a stem that is kept must not keep the others.
    stems = {
        name: torch.empty(shape, device=task.settings.track_device) for name in task.plan.outputs
    }
    with closing(task.run(TensorTrack(wav))) as stream:
        for item in stream:
            if not isinstance(item, Block):
                yield item
                continue
            stop = item.start + item.stems.shape[-1]
            for stem, samples in zip(stems.values(), item.stems):
                stem[:, item.start : stop] = samples
    mixture = convert_channels(wav, task.ensemble.audio_channels)
    yield InferenceOutput(stems, task.ensemble.samplerate, mixture)


def _to_files(
    task: _TrackSeparation,
    recording: AudioSource,
    out: str | os.PathLike[str] | Mapping[str, Target],
    saving: OutputOptions,
) -> FileEvents:
    began = perf_counter()
    model = task.ensemble
    targets = saving.paths(out, task.plan.outputs, recording.name)
    rate, channels = saving.layout(recording, model.samplerate, model.audio_channels)
    outlet = StemResampler(task.plan.outputs, model.samplerate, rate, channels)
    warnings: list[str] = []
    with (
        make_folders(targets, recording.path),
        saving.files(targets, rate, channels, recording) as files,
    ):
        with closing(task.run(recording)) as stream:
            for item in stream:
                if isinstance(item, Block):
                    files.write(outlet.push(item.stems))
                    continue
                if isinstance(item, WarningEvent):
                    warnings.append(item.message)
                yield item
        files.write(outlet.finish(recording.frames if rate == recording.sample_rate else None))
        yield Stage.Started("save")
        levels = files.close()
        yield Stage.Completed("save")
    for message in recording.warnings:
        yield WarningEvent(message)
    yield SeparatedFiles(
        paths={
            name: Path(target) if isinstance(target, str | os.PathLike) else None
            for name, target in targets.items()
        },
        sample_rate=rate,
        channels=channels,
        frames=outlet.frames,
        gains=levels.gains,
        peaks=levels.peaks,
        warnings=(*warnings, *recording.warnings),
        seconds=perf_counter() - began,
    )
