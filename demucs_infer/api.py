"""Separate a track into stems: `Separator("htdemucs").run("song.mp3")["vocals"]`.

Shapes: S stems, C channels, T samples of the track, t of a block.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from runpy import run_module
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

import torch
from torch import Tensor, nn

from demucs_infer.audio.writer import Target, save_audio
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.checkpoints.download import progress_bar
from demucs_infer.custom.build import load_network, wrap_network
from demucs_infer.custom.community import PREFIX, choose_rules, import_library
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.custom.msst import find_pair
from demucs_infer.engine.network import Ensemble
from demucs_infer.engine.pipeline import (
    Track,
    TrackEvent,
    separate_many,
)
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.stems import Rule, StemPlan
from demucs_infer.engine.window_pool import WindowQueue
from demucs_infer.errors import AudioReadError as LoadAudioError
from demucs_infer.errors import ModelLoadingError as LoadModelError
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
)
from demucs_infer.pretrained import get_model, list_models, pull
from demucs_infer.results import (
    InferenceOutput,
    SeparatedFiles,
)
from demucs_infer.separator_state import (
    Callback,
    Device,
    Omitted,
    SeparatorState,
    find_preferences,
    make_runner,
    merge_values,
    values_of,
)
from demucs_infer.sources import (
    Audio,
    AudioInput,
    AudioSource,
    ReadFormat,
    open_audio,
)
from demucs_infer.system.lazy import make_getattr
from demucs_infer.track_separation import (
    BlockEvents,
    Events,
    FileEvents,
    TrackSeparation,
    separate_in_memory,
    separate_to_files,
    with_queries,
)

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
    aliases={"subprocess": "subprocess", "th": "torch"},
)


class _NotProvided(Enum):
    """Marks arguments of `update_parameter` that were omitted, as None is a valid value."""

    NotProvided = "as it is"

    def __repr__(self) -> str:
        return "NotProvided"


NotProvided = _NotProvided.NotProvided

_PREPARED = {"_device_lease", "_ensemble", "_input_options", "_is_closed", "_lock", "_owns_model"}
_PREPARED |= {"_output_options", "_runner", "_state", "_values"}
"""Attributes that `Separator._init_from` sets."""
_REBUILT = {"_device_lease", "_ensemble", "_lock", "_runner", "_state"}
"""Those that a copy of a `Separator` makes anew."""

TrackEvents: TypeAlias = "Generator[tuple[int, TrackEvent], None, None]"


class OwnChanges(TypedDict, total=False):
    """The settings that upstream's `Separator` lacks; a test compares them with the options."""

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
    gate: bool
    max_memory: int | None


class Changes(OwnChanges, total=False):
    """All settings of a `Separator`, as optional keyword arguments."""

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
    """A loaded model, for any number of tracks and threads.

    `model` is a name, a signature, `hf://namespace/name` or the path of a checkpoint; with `repo`,
    a model in that folder. A network of the community has the settings of its configuration, unless
    they are given. `callback` is called with upstream's dictionary at the start and the
    end of every window, and may raise to stop the separation. `progress` shows progress bars of
    downloads and tracks on standard error.

    All other settings are the fields of `SeparationOptions` and `StemOptions`, as keywords or as
    `options` and `stem_options`; keywords that are given take precedence.

    Examples:
        >>> separator = Separator("htdemucs", stems=["vocals"])
        >>> output = separator.run("song.mp3")
        >>> output["vocals"].shape
        torch.Size([2, 9437184])
        >>> output.save("stems", "flac")
    """

    _windows: WindowQueue | None = None
    """Where the windows run; None: in threads of each stream."""
    _config: Config | None = None
    """The configuration of a network of the community that was loaded by its name."""
    _rest: tuple[str, ...] = ()
    """Rules of such a configuration, for the rest of the track."""

    def __init__(
        self,
        model: str | os.PathLike[str] = "htdemucs",
        repo: str | os.PathLike[str] | None = None,
        device: Device = cast("Device", Omitted("auto")),  # noqa: B008 (immutable)
        shifts: int = cast("int", Omitted(1)),
        overlap: float = cast("float", Omitted(0.25)),
        split: bool = cast("bool", Omitted(True)),
        segment: float | None = cast("None", Omitted(None)),
        jobs: int = cast("int", Omitted(0)),
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
        values = merge_values(options, stem_options, {**upstream, **changes})
        values |= {"progress": progress, "callback": callback, "callback_arg": callback_arg}
        SeparatorState.resolve(None, values)  # reports all mistakes before a download
        self._name, self._repo = model, repo
        self._loading = {"cache_dir": cache_dir, "offline": offline, "trust": trust}
        self._has_download_bar = progress
        self._load_model()
        is_own = type(self)._load_model is Separator._load_model
        self._init_from_config(self._model, self._config, values, owns_model=is_own)

    def _load_model(self) -> None:
        """Load the model into `_model`; a subclass may override this, as with upstream's class."""
        has_bar, name = self._has_download_bar, os.fspath(self._name)
        loading = cast("dict[str, Any]", self._loading)
        with progress_bar(name) if has_bar else nullcontext() as on_progress:
            pair = find_pair(name, self._repo)
            if pair is None and self._repo is None and name in load_catalog().networks:
                import_library()  # if it is missing, nothing is downloaded
                places = {key: loading[key] for key in ("cache_dir", "offline")}
                config, checkpoint = pull(name, progress=on_progress, **places)
                pair = config, checkpoint
            if pair is None:
                self._model = get_model(name, self._repo, progress=on_progress, **loading)
                return
        self._config = Config.from_file(pair[0])
        self._model = load_network(self._config, pair[1])

    def __getattr__(self, name: str) -> Any:
        """Initialize a subclass that sets `_model` itself and does not call `__init__`.

        Subclasses written for upstream do that. They may also read its attributes `_samplerate`
        and `_audio_channels`.
        """
        if "_model" in vars(self):
            if "_runner" not in vars(self) and name in _PREPARED:
                self._init_from(self._model, {}, owns_model=False)
                return getattr(self, name)
            if name in ("_samplerate", "_audio_channels"):
                return getattr(self, name.removeprefix("_"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """Return what `pickle` and `copy` keep: the model and the settings, but no runner."""
        if vars(self).get("_is_consumed"):
            raise TypeError(
                "cannot copy this Separator: its weights were freed by free_original_weights(); "
                "copy it before that"
            )
        return {name: value for name, value in vars(self).items() if name not in _REBUILT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare the model of a copy."""
        vars(self).update(state)
        if "_values" in state:
            self._init_from(self._model, state["_values"], owns_model=state["_owns_model"])
            vars(self).update(state)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        metadata: object = None,
        options: SeparationOptions | None = None,
        stem_options: StemOptions | None = None,
        **changes: Unpack[Changes],
    ) -> Separator:
        """Return a separator for a network, or a bag of networks, that is already in memory.

        The settings are those of `Separator(...)`. After each track, the network is back on the
        device and in the mode (training or evaluation) in which it was passed.

        The network needs the attributes `sources`, `samplerate`, `audio_channels` and `segment`.
        For a network without them, pass `metadata`: parameters with `chunk_size` and
        `output_stem_names`, a `ModelMetadata` whose parameters have defaults, or a `Config`, whose
        settings become the defaults. Raises `ConfigError` if the metadata does not fit the network.
        """
        separator = cls.__new__(cls)
        values, config = merge_values(options, stem_options, changes), None
        if metadata is not None:
            model, config = wrap_network(model, metadata)
        separator._init_from_config(model, config, values, owns_model=False)
        return separator

    @classmethod
    def from_pretrained(
        cls,
        *,
        config: Config | Mapping[str, object] | str | os.PathLike[str],
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        metadata: ModelMetadata[Any] | None = None,
        options: SeparationOptions | None = None,
        stem_options: StemOptions | None = None,
        **changes: Unpack[Changes],
    ) -> Separator:
        """Return a separator for a custom network, from its configuration and its weights.

        `overrides` change values of the configuration (`"inference.batch_size=2"`). The keyword
        arguments of `Separator(...)` are accepted too, and take precedence over the configuration.
        `metadata` defines the class of the network; by default, `model_type` in the configuration
        selects a registered class. `checkpoint_path` is another name of `checkpoint`.
        """
        paths = [path for path in (checkpoint, checkpoint_path) if path is not None]
        if len(paths) != 1:
            raise ValueError(
                f"got {len(paths)} of `checkpoint` and `checkpoint_path`: pass one path of a file "
                "with weights"
            )
        checkpoint = paths[0]
        parsed = Config.load(config, overrides)
        network = load_network(parsed, checkpoint, metadata)
        separator = cls.__new__(cls)
        values = merge_values(options, stem_options, changes)
        separator._init_from_config(network, parsed, values, owns_model=True)
        return separator

    def _init_from_config(
        self,
        model: nn.Module,
        config: Config | None,
        values: Mapping[str, object],
        *,
        owns_model: bool,
    ) -> None:
        """Initialize with the settings of a configuration, if there is one, changed by `values`."""
        if config is None:
            self._init_from(model, values, owns_model=owns_model)
            return
        settings = config.settings
        stems = values.get("stems", settings["stems"])
        if config.model_type.startswith(PREFIX):
            self._rest = config.rules
            settings["derive"] = self._choose_rules(config.model.output_stem_names, stems)
        self._init_from(model, {**settings, **values}, owns_model=owns_model)
        self._input_options = config.input_options
        self._output_options = config.output_options

    def _choose_rules(self, sources: Sequence[str], stems: object) -> tuple[str, ...]:
        """Return the rules for the rest of the track, if the requested stems need it."""
        if isinstance(stems, StemPlan):
            return ()
        return choose_rules(self._rest, sources, cast("Sequence[str] | None", stems))

    def _init_from(
        self, model: nn.Module, values: Mapping[str, object], *, owns_model: bool
    ) -> None:
        self._model = model
        self._ensemble = Ensemble.from_model(model)
        self._values = {**find_preferences(self._ensemble), **values}
        self._state = SeparatorState.resolve(self._ensemble.sources, self._values)
        self._lock = Lock()
        self._is_closed = False
        self._owns_model = owns_model
        self._input_options = InputOptions()
        self._output_options = OutputOptions()
        self._device_lease = ExitStack()
        """Keeps the networks on their device between tracks, unless the caller owns them."""
        self._runner = self._move_to(self._state.devices)

    def _move_to(self, devices: Sequence[torch.device]) -> Runner:
        """Return a runner for the devices; move the networks there unless the caller owns them."""
        choice = self._state.device_choice
        runner = make_runner(devices, compile=self._state.options.compile, device_choice=choice)
        if self._owns_model:
            self._device_lease.enter_context(runner.lease(self._ensemble.members))
        return runner

    @property
    def samplerate(self) -> int:
        """Sample rate of the stems."""
        return self._ensemble.samplerate

    @property
    def audio_channels(self) -> int:
        """Channels of the stems."""
        return self._ensemble.audio_channels

    @property
    def device(self) -> torch.device:
        """The device that the network runs on, or the first of several."""
        return self._state.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the network runs on."""
        return self._state.devices

    @property
    def jobs(self) -> int:
        """Number of background forward passes (0: none)."""
        return self._state.options.jobs

    @property
    def model(self) -> nn.Module:
        """The network, or the bag of them."""
        return self._model

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the returned stems, in order."""
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
        """Change settings; this affects tracks that start after the call.

        `options` replaces all settings of the separation, `stem_options` all settings of the stems.
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
        if self._rest and "stems" in given and "derive" not in given:
            given["derive"] = self._choose_rules(self._ensemble.sources, given["stems"])
        with self._lock:
            values = {**self._values, **values_of(options), **values_of(stem_options), **given}
            state = SeparatorState.resolve(self._ensemble.sources, values)
            before, self._state = self._state, state
            if state.devices != before.devices:
                self._device_lease.close()
                try:
                    self._runner = self._move_to(state.devices)
                except ValueError:  # a track is still running on the old device
                    self._state = before
                    self._move_to(before.devices)
                    raise
            self._values = values

    def separate_tensor(
        self, wav: Tensor, sr: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Separate an array; return the mixture at the model's rate, and its stems: each (C, T).

        Unlike with upstream, channels are converted even if `sr` is the sample rate of the model.
        """
        return _pair(self.run(wav, sr))

    def separate_audio_file(
        self, file: str | bytes | os.PathLike[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Separate a file; return the mixture at the model's rate, and its stems: each (C, T).

        Bytes are the path of a file here, not its content. A subclass may override `_load_audio` or
        `separate_tensor`, as with upstream's class.
        """
        file = os.fsdecode(file)
        own = type(self)
        if (own._load_audio, own.separate_tensor) == (
            Separator._load_audio,
            Separator.separate_tensor,
        ):
            return _pair(self.run(file))
        return self.separate_tensor(self._load_audio(Path(file)), self.samplerate)

    def _load_audio(self, track: Path) -> Tensor:
        """Return a file (C, T) at the rate and with the channels of the model."""
        return torch.cat(list(self.open_audio(track).blocks()), dim=-1)

    def open_audio(
        self,
        audio: AudioInput,
        sample_rate: float | None = None,
        *,
        options: InputOptions | None = None,
        **changes: Unpack[InputChanges],
    ) -> AudioSource:
        """Open a track with reading options, for `run` and the other methods.

        `options` and `changes` are the settings of `InputOptions`: `start` and `duration` in
        seconds, the handling of additional channels, and so on.
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
        """Separate a track: a path, bytes, an open file, or an array (C, T), (T,) or (T, C).

        `sample_rate` is that of an array, by default the model's. `model_kwargs` are passed to
        every call of the network. `queries` are arguments by name: the network is called with each
        of them for every window.
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
        """Separate a track as `run` does, yielding progress events and finally the output.

        Closing the generator stops the separation when the current batch of windows is done.
        """
        separation = self._make_separation(model_kwargs, queries)
        return separate_in_memory(separation, self.open_audio(audio, sample_rate))

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
        """Separate a track into files; the use of memory does not grow with its length.

        `out` is a folder, where `template` names the files, or a path or file object per stem.
        `sample_rate` is that of an array. `options` and `changes` are the settings of
        `OutputOptions`; the defaults are those of a custom model's configuration, otherwise wav.

        All files appear at the end; an error leaves neither files nor new folders. Until then, the
        stems are in a temporary file in the same place (4 bytes per sample). Unlike with upstream,
        if one stem would clip, all stems get the same gain; `clip="rescale"` gives each its own.
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
        """Separate a track as `separate_to` does, yielding progress events and finally the files.

        Closing the generator stops the separation when the current batch of windows is done, and
        leaves no files.
        """
        output = change_output(options or self._output_options, format, changes)
        source = self.open_audio(audio, sample_rate)
        return separate_to_files(self._make_separation(), source, out, output)

    def stream_blocks(self, track: Track) -> BlockEvents:
        """Yield progress events and blocks of finished samples, in order.

        The track must have the model's sample rate, as one from `open_audio` has.
        """
        return self._make_separation().run(track)

    def stream_blocks_many(
        self, tracks: Iterable[Track | Exception], *, max_tracks_per_batch: int = 1
    ) -> TrackEvents:
        """Yield `(index of the track, item)` for the items of `stream_blocks` of several tracks.

        Windows of up to `max_tracks_per_batch` consecutive tracks run as one batch. The last item
        of a track is `TrackFinished` or `TrackFailed`. An exception in `tracks` is reported as the
        failure of a track. The callback of the settings is not called.
        """
        separation = self._make_separation()
        return separate_many(
            tracks,
            separation.ensemble,
            options=separation.state.options,
            stems=separation.plan,
            runner=separation.runner,
            windows=self._windows,
            max_tracks_per_batch=max_tracks_per_batch,
        )

    def free_original_weights(self) -> None:
        """Keep one copy of the weights instead of two; call this before the first track.

        Use this in a process that only separates, and always at the same precision. On a CPU, the
        weights are moved into the optimized networks. After that, `model` can be neither run nor
        saved.
        """
        if not self._owns_model:
            raise ValueError(
                "cannot free the weights of a model passed to from_model(): the caller owns it"
            )
        with self._lock:
            devices = self._state.devices
            self._is_consumed = True
            self._runner = make_runner(
                devices,
                compile=self._state.options.compile,
                consume_weights=True,
                device_choice=self._state.device_choice,
            )
            if len(devices) > 1:  # the copies of the runner before it are no longer needed
                self._device_lease.close()
                self._device_lease.enter_context(self._runner.lease(self._ensemble.members))

    def close(self) -> None:
        """Free the memory of the device; the separator cannot be used after this."""
        with self._lock:
            self._is_closed = True
            self._device_lease.close()
            self._runner.release_memory()
            self._runner = Runner("cpu")
        if self._state.device.type == "cuda":
            gc.collect()  # a network and its core refer to each other
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

    def _make_separation(
        self,
        model_kwargs: Mapping[str, object] | None = None,
        queries: Mapping[str, Mapping[str, object]] | None = None,
    ) -> TrackSeparation:
        with self._lock:
            if self._is_closed:
                raise ValueError("this Separator is closed; create another one")
            state, runner = self._state, self._runner
        if not self._owns_model:
            # The caller may change its weights, which an optimized copy would not notice.
            runner = runner.renew()
        if not model_kwargs and queries is None:
            return TrackSeparation(self._ensemble, state.plan, state, runner)
        ensemble = with_queries(self._ensemble, model_kwargs or {}, queries)
        # A runner keeps all networks it has seen, and this one exists for one track only.
        runner = make_runner(
            state.devices, compile=state.options.compile, device_choice=state.device_choice
        )
        plan = SeparatorState.choose_plan(ensemble.sources, self._values)
        return TrackSeparation(ensemble, plan, state, runner)


def share_networks(
    separator: Separator,
    windows: WindowQueue,
    options: SeparationOptions,
    stem_options: StemOptions,
) -> Separator:
    """Return a separator for one track, with other settings but the same networks.

    It runs beside other tracks of `separator`, in turn with them. Closing it has no effect on
    `separator`. Raises `ValueError` if the model does not support the settings.
    """
    shared = Separator.__new__(Separator)
    vars(shared).update(vars(separator))
    devices = ",".join(map(str, separator.devices))
    values = {**separator._values, **values_of(options), **values_of(stem_options)}
    shared._values = {**values, "device": devices}
    shared._state = SeparatorState.resolve(separator._ensemble.sources, shared._values)
    shared._lock, shared._device_lease = Lock(), ExitStack()
    shared._windows = windows
    return shared


def _pair(output: InferenceOutput) -> tuple[Tensor, dict[str, Tensor]]:
    assert output.mixture is not None
    return output.mixture, output.outputs


if __name__ == "__main__":  # upstream's module is a command, too
    run_module("demucs_infer.separate", run_name="__main__")
