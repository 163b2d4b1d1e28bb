"""Separate a track into stems: `Separator("htdemucs").run("song.mp3")["vocals"]`.

Shapes: S stems, C channels, T samples of the track, t of a block.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from runpy import run_module
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

import torch
from torch import Tensor, nn

from demucs_infer.apply import with_bar
from demucs_infer.audio.channels import convert_channels
from demucs_infer.audio.gain import Levels, translate_os_errors
from demucs_infer.audio.spool import Spool
from demucs_infer.audio.stem_writer import StemWriter
from demucs_infer.audio.writer import Target, save_audio
from demucs_infer.checkpoints.download import progress_bar
from demucs_infer.custom.build import load_network
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.devices import choose_device
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
from demucs_infer.engine.stems import Rule, StemPlan, choose_stems
from demucs_infer.errors import AudioReadError as LoadAudioError
from demucs_infer.errors import ModelLoadingError as LoadModelError
from demucs_infer.events import ChunkStarted, Event, Stage, WarningEvent, call_back
from demucs_infer.optimized.compiled import compile_network
from demucs_infer.optimized.optimize import choose_precision, optimize
from demucs_infer.options import (
    Format,
    InputChanges,
    InputOptions,
    OtherMethod,
    OutputChanges,
    OutputOptions,
    Padding,
    Precision,
    Profile,
    SeparationOptions,
    StemOptions,
    Window,
    change_output,
    list_options,
)
from demucs_infer.pretrained import get_model, list_models
from demucs_infer.results import (
    InferenceOutput,
    SeparatedFiles,
    file_layout,
    make_folders,
    stem_targets,
)
from demucs_infer.sources import (
    Audio,
    AudioInput,
    AudioSource,
    FileSource,
    ReadFormat,
    open_audio,
)
from demucs_infer.system.lazy import make_getattr
from demucs_infer.system.threads import limit_to_one_thread

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

__getattr__ = make_getattr(  # what upstream's module imports is imported from it
    __name__,
    {
        "AudioFile": "demucs_infer.audio.upstream",
        "BagOnlyRepo": "demucs_infer.repo",
        "LocalRepo": "demucs_infer.repo",
        "ModelOnlyRepo": "demucs_infer.repo",
        "REMOTE_ROOT": "demucs_infer.pretrained",
        "RemoteRepo": "demucs_infer.repo",
        "apply_model": "demucs_infer.apply",
        "convert_audio": "demucs_infer.audio.channels",
        "fatal": "demucs_infer.utils",
    },
)

Callback: TypeAlias = "Callable[[dict[str, object]], object]"
Device: TypeAlias = "str | torch.device | None"


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


class OwnChanges(TypedDict, total=False):
    """What upstream's `Separator` does not know; a test compares it with the options."""

    stems: Sequence[str] | StemPlan | None
    derive: Sequence[str | Rule]
    two_stems: str | None
    other_method: OtherMethod
    io_device: Device
    transition_power: float
    seed: int | None
    precision: Precision
    batch_size: int | Literal["auto"]
    oom: Literal["retry", "raise"]
    cpu_fallback: bool
    compile: bool | str
    profile: Profile
    window: Window
    padding: Padding
    normalize: bool


class Changes(OwnChanges, total=False):
    """Every setting of a `Separator`."""

    device: Device
    shifts: int
    overlap: float
    split: bool
    segment: float | None
    jobs: int
    progress: bool
    callback: Callback | None
    callback_arg: Mapping[str, object] | None


class Separator:
    """A model that is ready for any number of tracks, from any number of threads.

    `model` is a name, a signature, `hf://namespace/name` or the path of a checkpoint; with `repo`,
    a model of that folder. `callback` is called with upstream's dictionary at the start and the
    end of every window; it stops the separation by raising. With `progress` there are bars on
    standard error, of a download and of every track.

    All other settings are the fields of `SeparationOptions` and `StemOptions`, given as keywords
    or as `options` and `stem_options`; keywords that are not at their default win.
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
        options: SeparationOptions | None = None,
        stem_options: StemOptions | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        trust: bool = False,
        **changes: Unpack[OwnChanges],
    ) -> None:
        upstream = {
            "device": device,
            "shifts": shifts,
            "overlap": overlap,
            "split": split,
            "segment": segment,
            "jobs": jobs,
        }
        values = _join(options, stem_options, {**upstream, **changes})
        values |= {"progress": progress, "callback": callback, "callback_arg": callback_arg}
        _State.resolve(None, values)  # every mistake is found before anything is downloaded
        self._name, self._repo = model, repo
        self._loading = {"cache_dir": cache_dir, "offline": offline, "trust": trust}
        self._has_download_bar = progress
        self._load_model()
        is_own = type(self)._load_model is Separator._load_model
        self._init_from(self._model, values, owns_model=is_own)

    def _load_model(self) -> None:
        """Set `_model`. A subclass may do it in its own way, as one of upstream's class may."""
        has_bar = self._has_download_bar
        with progress_bar(os.fspath(self._name)) if has_bar else nullcontext() as on_progress:
            self._model = get_model(
                self._name, self._repo, progress=on_progress, **cast("Any", self._loading)
            )

    def __getattr__(self, name: str) -> Any:
        """Prepare a subclass of upstream's kind, which sets `_model` and does not call `__init__`.

        Such subclasses also read `_samplerate` and `_audio_channels`, which upstream's class has.
        """
        if "_model" in vars(self):
            if "_runner" not in vars(self) and name in _PREPARED:
                self._init_from(self._model, {}, owns_model=False)
                return getattr(self, name)
            if name in ("_samplerate", "_audio_channels"):
                return getattr(self, name.removeprefix("_"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        options: SeparationOptions | None = None,
        stem_options: StemOptions | None = None,
        **changes: Unpack[Changes],
    ) -> Separator:
        """Return a separator around a network, or a bag of them, that is in memory already.

        The settings are those of `Separator(...)`. The network stays the caller's: after each
        track it is on its device and in its mode again. Its weights are read when it first runs.

        It has `sources`, `samplerate`, `audio_channels` and `segment`. A plain module gets them
        from `demucs_infer.extension.create_w2w_model(module, params)`; no `metadata` could
        give them here, since it tells how a network is made, and this one is.
        """
        separator = cls.__new__(cls)
        values = _join(options, stem_options, changes)
        separator._init_from(model, values, owns_model=False)
        return separator

    @classmethod
    def from_pretrained(
        cls,
        *,
        config: Config | Mapping[str, object] | str | os.PathLike[str],
        checkpoint: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        metadata: ModelMetadata[Any] | None = None,
        options: SeparationOptions | None = None,
        stem_options: StemOptions | None = None,
        **changes: Unpack[Changes],
    ) -> Separator:
        """Return a separator around a network of your own, from a configuration and its weights.

        `overrides` change the configuration (`"inference.batch_size=2"`); the settings are those
        of `Separator(...)` and win over it. `metadata` says which network it is; without, its
        package offers it under the configuration's `model_type`.
        """
        parsed = Config.load(config, overrides)
        network = load_network(parsed, checkpoint, metadata)
        separator = cls.__new__(cls)
        values = {**parsed.settings, **_join(options, stem_options, changes)}
        separator._init_from(network, values, owns_model=True)
        separator._input_options = parsed.input_options
        separator._output_options = parsed.output_options
        return separator

    def _init_from(
        self, model: nn.Module, values: Mapping[str, object], *, owns_model: bool
    ) -> None:
        self._model = model
        self._ensemble = Ensemble.from_model(model)
        self._values = {**_preferences(self._ensemble.members), **values}
        self._state = _State.resolve(self._ensemble.sources, self._values)
        self._lock = Lock()
        self._is_closed = False
        self._owns_model = owns_model
        self._input_options = InputOptions()
        self._output_options = OutputOptions()
        self._device_lease = ExitStack()
        """What keeps a network of ours on its device from one track to the next."""
        self._runner = self._move_to(self._state.device)

    def _move_to(self, device: torch.device) -> Runner:
        """Return a runner for `device`, with the networks there to stay if they are ours."""
        runner = _runner(device, compile=self._state.options.compile)
        if self._owns_model:
            self._device_lease.enter_context(runner.lease(self._ensemble.members))
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
        return self._state.device

    @property
    def jobs(self) -> int:
        """How many forwards may run beside the one being stitched."""
        return self._state.options.jobs

    @property
    def model(self) -> nn.Module:
        """The network, or the bag of them."""
        return self._model

    @property
    def stems(self) -> tuple[str, ...]:
        """What is handed out, in order."""
        return self._state.plan.outputs

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
        *,
        options: SeparationOptions | None = None,
        stem_options: StemOptions | None = None,
        **changes: Unpack[OwnChanges],
    ) -> None:
        """Change the settings that are given, for tracks that begin from now on.

        `options` and `stem_options` replace all settings of their kind.
        """
        given = {
            "device": device,
            "shifts": shifts,
            "overlap": overlap,
            "split": split,
            "segment": segment,
            "jobs": jobs,
            "progress": progress,
            "callback": callback,
            "callback_arg": callback_arg,
            **changes,
        }
        given = {name: value for name, value in given.items() if value is not NotProvided}
        with self._lock:
            values = {**self._values, **_values_of(options), **_values_of(stem_options), **given}
            state = _State.resolve(self._ensemble.sources, values)
            before, self._state = self._state, state
            if state.device != before.device:
                self._device_lease.close()
                try:
                    self._runner = self._move_to(state.device)
                except ValueError:  # in use by a track that has begun
                    self._state = before
                    self._move_to(before.device)
                    raise
            self._values = values

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
        options: InputOptions | None = None,
        **changes: Unpack[InputChanges],
    ) -> AudioSource:
        """Open a part of a track, or one that needs care; `run` and the others take the result.

        `options` and `changes` are the settings of `InputOptions`: `start` and `duration` in
        seconds, what happens to channels that the model does not take, and so on.
        """
        read_format = ReadFormat(
            sample_rate=self.samplerate,
            channels=self.audio_channels,
            device=self._state.track_device,
        )
        options = replace(options or self._input_options, **changes)
        return open_audio(audio, sample_rate, read_format, options)

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
        format: Format | None = None,
        *,
        sample_rate: float | None = None,
        options: OutputOptions | None = None,
        **changes: Unpack[OutputChanges],
    ) -> SeparatedFiles:
        """Separate a track into files, in memory that does not grow with its length.

        `out` is a folder, where `template` names the files, or a path or file object per stem.
        `sample_rate` is that of an array. `options` and `changes` are the settings of
        `OutputOptions`; what is not given is as the configuration of the network has it,
        otherwise a wav file.

        All files appear, complete, at the end; after an error there are neither files nor a new
        folder. Meanwhile the stems are kept beside them as floats, 4 bytes a sample. Unlike
        upstream's, they share one gain where one would clip; `clip="rescale"` gives each its own.
        """
        stream = self.stream_to(
            audio, out, format, sample_rate=sample_rate, options=options, **changes
        )
        for item in stream:
            if isinstance(item, SeparatedFiles):
                return item
        raise AssertionError("a stream ends with its output")

    def stream_to(
        self,
        audio: AudioInput,
        out: str | os.PathLike[str] | Mapping[str, Target],
        format: Format | None = None,
        *,
        sample_rate: float | None = None,
        options: OutputOptions | None = None,
        **changes: Unpack[OutputChanges],
    ) -> FileEvents:
        """Do as `separate_to`, and yield what happens on the way as events.

        Closing the generator ends the work within a batch, and leaves no file.
        """
        output = change_output(options or self._output_options, format, changes)
        return _to_files(self._task(), self.open_audio(audio, sample_rate), out, output)

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
            options=task.state.options,
            stems=task.plan,
            runner=task.runner,
            max_tracks_per_batch=max_tracks_per_batch,
        )

    def free_original_weights(self) -> None:
        """Keep one copy of the weights instead of two, before the first track.

        For a process that only separates, in one precision: on a processor, networks hand their
        weights over to their fast forms. `model` can then neither be run nor saved.
        """
        if not self._owns_model:
            raise ValueError(
                "cannot free the weights of a model passed to from_model(): the caller owns it"
            )
        with self._lock:
            device, compile = self._state.device, self._state.options.compile
            self._runner = _runner(device, compile=compile, consume_weights=True)

    def close(self) -> None:
        """Give the memory of the device back; the separator cannot be used any more."""
        with self._lock:
            self._is_closed = True
            self._device_lease.close()
            self._runner = Runner("cpu")
        if self._state.device.type == "cuda":
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
            state, runner = self._state, self._runner
        if not self._owns_model:
            # Its owner may change the weights, and an optimized copy would not follow.
            runner = _runner(state.device, compile=state.options.compile)
        if not model_kwargs and queries is None:
            return _TrackSeparation(self._ensemble, state.plan, state, runner)
        ensemble = _with_queries(self._ensemble, model_kwargs or {}, queries)
        # A runner remembers every network it has seen, and this one is gone after the track.
        runner = _runner(state.device, compile=state.options.compile)
        plan = _State.choose_plan(ensemble.sources, self._values)
        return _TrackSeparation(ensemble, plan, state, runner)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _State:
    """The settings of a `Separator`, resolved for this machine."""

    options: SeparationOptions
    plan: StemPlan
    device: torch.device
    """Where the networks run."""
    track_device: torch.device
    """Where the track and the stems are."""
    progress: bool = False
    callback: Callback | None = None
    callback_arg: Mapping[str, object] | None = None

    @classmethod
    def resolve(cls, sources: Sequence[str] | None, values: Mapping[str, object]) -> _State:
        """Check all values by name; `sources` are the model's stems, None before it is there."""
        settings: dict[str, Any] = {
            name: value for name, value in values.items() if name not in _STEM_NAMES
        }
        own = {name: settings.pop(name) for name in _PYTHON_ONLY & settings.keys()}
        device = choose_device(settings.pop("device", "auto"))
        track_device = choose_device(settings.pop("io_device", "cpu"))
        options = SeparationOptions(device=str(device), io_device=str(track_device), **settings)
        precision = choose_precision(options.precision, device)
        plan = StemPlan((), ()) if sources is None else cls.choose_plan(sources, values)
        return cls(
            options=replace(options, precision=precision),
            plan=plan,
            device=device,
            track_device=track_device,
            **own,
        )

    @staticmethod
    def choose_plan(sources: Sequence[str], values: Mapping[str, object]) -> StemPlan:
        """Return the stems that are asked for, out of these."""
        stems = {name: value for name, value in values.items() if name in _STEM_NAMES}
        if isinstance(stems.get("stems"), StemPlan):
            return cast(StemPlan, stems["stems"])
        return choose_stems(sources, **cast("dict[str, Any]", stems))


_PREPARED = {"_device_lease", "_ensemble", "_input_options", "_is_closed", "_lock", "_owns_model"}
_PREPARED |= {"_output_options", "_runner", "_state", "_values"}
"""Attributes that `Separator._init_from` sets."""

_PYTHON_ONLY = {"progress", "callback", "callback_arg"}
_STEM_NAMES = {option.name for option in list_options(StemOptions)}


def _values_of(options: SeparationOptions | StemOptions | None) -> dict[str, object]:
    if options is None:
        return {}
    return {option.name: getattr(options, option.name) for option in list_options(type(options))}


def _join(
    options: SeparationOptions | None,
    stem_options: StemOptions | None,
    changes: Mapping[str, object],
) -> dict[str, object]:
    """Return all settings by name; a keyword at its default does not hide that of `options`."""
    defaults = _values_of(SeparationOptions()) if options is not None else {}
    given = {
        name: value
        for name, value in changes.items()
        if name not in defaults or value != defaults[name]
    }
    return {**_values_of(options), **_values_of(stem_options), **given}


def _preferences(members: Sequence[object]) -> dict[str, object]:
    """Return the settings that the networks want where they are not given."""
    preferences = [dict(getattr(member, "preferences", {})) for member in members]
    if any(each != preferences[0] for each in preferences):
        raise ValueError(f"the networks of a bag want different settings: {preferences}")
    return preferences[0]


def _runner(device: torch.device, *, compile: bool | str, consume_weights: bool = False) -> Runner:
    """What runs networks on `device`, in their fast form."""

    def prepare(network: Network, precision: str) -> Network:
        fast = optimize(
            cast(nn.Module, network),
            cast(Precision, precision),
            device=device,
            consume_weights=consume_weights,
        )
        backend = "inductor" if compile is True else compile
        return cast(Network, compile_network(fast, backend) if backend else fast)

    return Runner(device, prepare=prepare)


def _pair(output: InferenceOutput) -> tuple[Tensor, dict[str, Tensor]]:
    assert output.mixture is not None
    return output.mixture, output.outputs


def _with_queries(
    ensemble: Ensemble,
    model_kwargs: Mapping[str, object],
    queries: Mapping[str, Mapping[str, object]] | None,
) -> Ensemble:
    """Return the same networks, which get more arguments at every call."""
    if queries is None:
        queries = {"": {}}
    elif ensemble.weights is not None:
        raise ValueError("`queries` is not supported for bags of models")
    all_queries = {name: {**model_kwargs, **query} for name, query in queries.items()}
    members = [QueryAdapter(cast(nn.Module, member), all_queries) for member in ensemble.members]
    return Ensemble(tuple(cast(Network, member) for member in members), ensemble.weights)


@dataclass(frozen=True, slots=True, eq=False)
class _TrackSeparation:
    """How one track is separated, whatever happens to the separator meanwhile."""

    ensemble: Ensemble
    plan: StemPlan
    state: _State
    runner: Runner

    def run(self, track: Track) -> BlockEvents:
        """Events and blocks; the callback and the bar of the settings hear of them too."""
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
    stems = {name: torch.empty(shape, device=task.state.track_device) for name in task.plan.outputs}
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
    source: AudioSource,
    out: str | os.PathLike[str] | Mapping[str, Target],
    options: OutputOptions,
) -> FileEvents:
    begun = perf_counter()
    targets = stem_targets(out, task.plan.outputs, options, source.name)
    warnings: list[str] = []
    with (
        make_folders(targets, source.path),
        _temporary_spool(targets, task) as spool,
        _open_writer(task, source, targets, options, spool) as writer,
        ThreadPoolExecutor(1, "demucs-write", limit_to_one_thread) as pool,
    ):
        try:
            encoding: Future[Levels] | None = None
            with closing(task.run(source)) as stream:
                for item in stream:
                    if not isinstance(item, Block):
                        warnings += [item.message] if isinstance(item, WarningEvent) else []
                        yield item
                        continue
                    if encoding is None:  # by now it is known how long the source is
                        writer.layout = replace(writer.layout, frames=_frames(writer, source))
                        encoding = pool.submit(writer.encode)
                    if encoding.done():  # before the end: it has failed
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
        seconds=perf_counter() - begun,
    )


def _frames(writer: StemWriter, source: AudioSource) -> int | None:
    """Return how many samples files at the rate of the source have."""
    return source.frames if writer.layout.rate == source.sample_rate else None


def _open_writer(
    task: _TrackSeparation,
    source: AudioSource,
    targets: Mapping[str, Target],
    options: OutputOptions,
    spool: Spool,
) -> StemWriter:
    model = task.ensemble
    layout = file_layout(
        options,
        model=(model.samplerate, model.audio_channels),
        source=(source.sample_rate, source.num_channels),
    )
    return StemWriter.open(spool, targets, layout, options, source)


@contextmanager
def _temporary_spool(targets: Mapping[str, Target], task: _TrackSeparation) -> Iterator[Spool]:
    """Make a spool on the disk that must hold the files; the system's own may be memory."""
    paths = [Path(target) for target in targets.values() if isinstance(target, str | os.PathLike)]
    place = paths[0].parent if paths else None
    with translate_os_errors(str(place or tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(
            prefix=".demucs-infer-", dir=place, ignore_cleanup_errors=True
        )
    with folder:
        spool = Spool(Path(folder.name), len(task.plan.outputs), task.ensemble.audio_channels)
        try:
            yield spool
        finally:
            spool.abandon_unless_finished()


if __name__ == "__main__":  # upstream's module is a command, too
    run_module("demucs_infer.separate", run_name="__main__")
