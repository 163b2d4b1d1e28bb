"""What a separation gives back: stems in memory, or the files that they were written to.

Shapes: C channels, T samples of the track.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.audio.channels import StreamResampler, convert_channels
from demucs_infer.audio.encoders.pyav import PIECE
from demucs_infer.audio.file_set import StemFileSet
from demucs_infer.audio.filenames import stem_paths, valid_template
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.gain import Clip, peak_of, track_gain, translate_os_errors
from demucs_infer.audio.tags import portable_tags
from demucs_infer.audio.writer import Target
from demucs_infer.sources import AudioSource


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How stems become files; one that exists can be carried out."""

    encoding: Encoding = field(default_factory=Encoding)
    """Format, depth, bit rate."""

    clip: Clip = "track"
    """What happens beyond full scale. "track": one gain for all stems, so that they still sum to
    the mix; upstream's way, each stem by its own gain, is "rescale"."""

    exact_sum: bool = True
    """Round the stems together, so that their sum stays within half a step of the true one."""

    template: str = "{stem}.{ext}"
    """Name of each file inside the folder; `{track}` and `{trackext}` are the input's."""

    overwrite: bool = True
    """Replace files that exist; otherwise they are an error."""

    tags: bool = True
    """Carry the input's tags and cover over to the stems, where the format can."""

    sample_rate: int | str = "model"
    """Of the files: "model", "source", or a number."""

    channels: int | str = "model"
    """Of the files: "model", "source", or a number."""

    def __post_init__(self) -> None:
        valid_template(self.template)
        for name in ("sample_rate", "channels"):
            value = getattr(self, name)
            number = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not (number or value in ("model", "source")):
                raise ValueError(f"{name} = {value!r} must be 'model', 'source' or a number")

    def paths(
        self,
        out: str | os.PathLike[str] | Mapping[str, Target],
        stems: tuple[str, ...],
        track: str = "track",
    ) -> dict[str, Target]:
        """The target of every stem: in a folder by the template, or as the mapping says."""
        if not isinstance(out, Mapping):
            extension = self.encoding.kind.suffixes[0].removeprefix(".")
            found = stem_paths(Path(out), stems, self.template, track=track, extension=extension)
            return dict(found)
        if set(out) != set(stems):
            raise ValueError(
                f"paths for {', '.join(map(str, out))}, but the stems are {', '.join(stems)}"
            )
        return {stem: out[stem] for stem in stems}

    def layout(self, recording: AudioSource, sample_rate: int, channels: int) -> tuple[int, int]:
        """(sample rate, channels) of the files, for a model that has the ones given."""
        known = {"model": (sample_rate, channels)}
        known["source"] = (recording.sample_rate, recording.num_channels)
        rate, count = self.sample_rate, self.channels
        rate = known[rate][0] if isinstance(rate, str) else rate
        count = known[count][1] if isinstance(count, str) else count
        if 1 < channels < count:
            raise ValueError(f"stems of {channels} channels cannot be written with {count}")
        return rate, count

    def files(
        self, targets: Mapping[str, Target], sample_rate: int, channels: int, recording: AudioSource
    ) -> StemFileSet:
        """The files, open, with what the recording says about its music."""
        names = {stem: portable_tags(recording.tags, f" ({stem})") for stem in targets}
        return StemFileSet(
            targets,
            sample_rate,
            channels,
            self.encoding,
            clip=self.clip,
            exact_sum=self.exact_sum,
            tags=names if self.tags else None,
            cover=recording.cover if self.tags else None,
            overwrite=self.overwrite,
        )


@contextmanager
def make_folders(targets: Mapping[str, Target], source: Path | None = None) -> Iterator[None]:
    """The folders that the files will lie in; those that had to be made go with a failure.

    None of the files may be the `source` itself.
    """
    paths = [Path(target) for target in targets.values() if isinstance(target, str | os.PathLike)]
    for path in paths:
        if source is not None and path.resolve() == source.resolve():
            raise ValueError(f"{path} is the input, which a stem would replace: choose a folder")
    made: set[Path] = set()
    try:
        for folder in {path.parent for path in paths}:
            with translate_os_errors(str(folder)):
                made.update(one for one in (folder, *folder.parents) if not one.exists())
                folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in sorted(made, key=lambda one: len(one.parts), reverse=True):
            with suppress(OSError):  # what somebody else put there keeps it
                folder.rmdir()
        raise


@dataclass(frozen=True, slots=True, eq=False)  # eq: tensors do not compare to a bool
class InferenceOutput:
    """The stems of one track: `out["vocals"]` is (C T), on the same scale as the mix."""

    outputs: dict[str, Tensor]
    """Every stem (C T): those of the model in its order, then derived ones."""

    sample_rate: int
    """Samples per second, of the model."""

    mixture: Tensor | None = field(default=None, repr=False)
    """The track (C T) as the model heard it: at its rate, with its channels."""

    @property
    def stems(self) -> dict[str, Tensor]:
        """Another name of `outputs`."""
        return self.outputs

    @property
    def gain(self) -> float:
        """The one gain that `save` applies to all stems: 1.0 unless one would clip."""
        peaks = {name: peak_of(stem, name) for name, stem in self.outputs.items()}
        return track_gain(peaks, Encoding())

    def __getitem__(self, stem: str) -> Tensor:
        try:
            return self.outputs[stem]
        except KeyError:
            raise KeyError(f"no stem {stem!r}; there are {', '.join(self.outputs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def to(self, device: str | torch.device) -> "InferenceOutput":
        """The same on another device."""
        stems = {name: stem.to(device) for name, stem in self.outputs.items()}
        mixture = None if self.mixture is None else self.mixture.to(device)
        return replace(self, outputs=stems, mixture=mixture)

    def save(
        self,
        folder: str | os.PathLike[str],
        format: str = "wav",
        *,
        bits: int | None = None,
        bitrate: int | None = None,
        clip: Clip = "track",
        template: str = "{stem}.{ext}",
        track: str = "track",
    ) -> dict[str, Path]:
        """Write one file a stem, all or none, and say where they are.

        `bits`: 16, 24, or 32 for float; `bitrate` in kbit/s; `track` is the name behind the
        template's `{track}`. Should a stem clip, all get one common `gain`; upstream gives each
        its own, as `clip="rescale"` does.
        """
        encoding = Encoding(format, bits=bits, bitrate=bitrate)
        saving = OutputOptions(encoding=encoding, clip=clip, template=template)
        return self.save_as(saving, folder, track=track)

    def save_as(
        self, saving: OutputOptions, folder: str | os.PathLike[str], *, track: str = "track"
    ) -> dict[str, Path]:
        """The same, from one value that says how."""
        paths = stem_paths(
            Path(folder),
            tuple(self.outputs),
            saving.template,
            track=track,
            extension=saving.encoding.kind.suffixes[0].removeprefix("."),
        )
        channels, length = next(iter(self.outputs.values())).shape
        with (
            make_folders(dict(paths)),
            StemFileSet(
                dict(paths),
                self.sample_rate,
                channels,
                saving.encoding,
                clip=saving.clip,
                exact_sum=saving.exact_sum,
                overwrite=saving.overwrite,
            ) as files,
        ):
            for at in range(0, length, PIECE):
                files.write({name: x[:, at : at + PIECE] for name, x in self.outputs.items()})
        return paths


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparatedFiles:
    """The files of one track, all of them complete."""

    paths: Mapping[str, Path | None]
    """Where each stem lies; None for one that went to a file object."""

    sample_rate: int
    channels: int
    frames: int
    """Samples of each file, as they went to its encoder."""

    gains: Mapping[str, float]
    """What each stem was multiplied by so that it would not clip."""

    peaks: Mapping[str, float]
    """The largest absolute sample of each stem before that."""

    warnings: tuple[str, ...] = ()
    """What was wrong with the input without being an error."""

    seconds: float = 0.0
    """How long it took."""

    @property
    def gain(self) -> float:
        """The gain of the most attenuated stem; with `clip="track"` that of all."""
        return min(self.gains.values(), default=1.0)


class StemResampler:
    """Blocks of stems, brought to the rate and the channels of the files they go to.

    With as many samples as `frames` in the end: resampling there and back may be off by one.
    """

    def __init__(
        self, stems: Sequence[str], from_rate: int, sample_rate: int, channels: int
    ) -> None:
        self._streams = {name: StreamResampler(from_rate, sample_rate, channels) for name in stems}
        self._channels = channels
        self.frames = 0
        """Samples of a channel that have come out."""

    def push(self, stems: Tensor) -> dict[str, Tensor]:
        """The next samples of all stems: (S C t) -> (C' t') by name."""
        stems = convert_channels(stems.cpu(), self._channels)
        found = {
            name: stream.push(stem) for (name, stream), stem in zip(self._streams.items(), stems)
        }
        return self._counted(found)

    def finish(self, frames: int | None = None) -> dict[str, Tensor]:
        """The rest, so that there are `frames` samples in all: (C' t') by name."""
        rest = {name: stream.finish() for name, stream in self._streams.items()}
        if frames is not None:
            missing = frames - self.frames
            # A negative padding cuts.
            rest = {name: F.pad(x, (0, missing - x.shape[-1])) for name, x in rest.items()}
        return self._counted(rest)

    def _counted(self, stems: dict[str, Tensor]) -> dict[str, Tensor]:
        self.frames += next(iter(stems.values())).shape[-1]
        return stems
