"""What a separation returns: stems in memory, or the files that they were written to.

Shapes: C channels, T samples of the track.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from demucs_infer.audio.encoders.pyav import PIECE
from demucs_infer.audio.filenames import stem_paths
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.gain import Shaper, clip_gains, peak_of, track_gain, translate_os_errors
from demucs_infer.audio.stem_files import StemFiles
from demucs_infer.audio.stem_writer import Layout
from demucs_infer.audio.writer import Target
from demucs_infer.options import Format, OutputChanges, OutputOptions, change_output

if TYPE_CHECKING:
    from typing_extensions import Unpack


def stem_targets(
    out: str | os.PathLike[str] | Mapping[str, Target],
    stems: tuple[str, ...],
    options: OutputOptions,
    track: str = "track",
) -> dict[str, Target]:
    """Return where each stem goes: into a folder by the template, or as the mapping says."""
    if not isinstance(out, Mapping):
        extension = options.extension
        paths = stem_paths(Path(out), stems, options.template, track=track, extension=extension)
        return dict(paths)
    if set(out) != set(stems):
        raise ValueError(
            f"paths for {', '.join(map(str, out))}, but the stems are {', '.join(stems)}"
        )
    return {stem: out[stem] for stem in stems}


def file_layout(
    options: OutputOptions,
    *,
    model: tuple[int, int],
    source: tuple[int, int],
    frames: int | None = None,
) -> Layout:
    """Return the layout of the files, for a model and a source of (sample rate, channels).

    Files at the rate of the source have as many samples as the source, `frames`.
    """
    known = {"model": model, "source": source}
    rate = known[options.rate][0] if isinstance(options.rate, str) else options.rate
    named = options.channels
    channels = known[named][1] if isinstance(named, str) else named
    if 1 < model[1] < channels:
        raise ValueError(
            f"channels = {named}: stems of {model[1]} channels cannot be written with {channels}; "
            "choose 'model' or fewer"
        )
    return Layout(
        spool_rate=model[0],
        rate=rate,
        channels=channels,
        frames=frames if rate == source[0] else None,
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

    def to(self, device: str | torch.device) -> InferenceOutput:
        """The same on another device."""
        stems = {name: stem.to(device) for name, stem in self.outputs.items()}
        mixture = None if self.mixture is None else self.mixture.to(device)
        return replace(self, outputs=stems, mixture=mixture)

    def save(
        self,
        folder: str | os.PathLike[str],
        format: Format | None = None,
        *,
        track: str = "track",
        options: OutputOptions | None = None,
        **changes: Unpack[OutputChanges],
    ) -> dict[str, Path]:
        """Write one file a stem, all or none, and return their paths.

        `options` and `changes` are the settings of `OutputOptions`; files have the rate and the
        channels of the stems. `track` is the name for `{track}` in the template. Should a stem
        clip, all get one common `gain`; `clip="rescale"` gives each its own, as upstream does.
        """
        options = change_output(options or OutputOptions(), format, changes)
        paths = stem_paths(
            Path(folder),
            tuple(self.outputs),
            options.template,
            track=track,
            extension=options.extension,
        )
        channels, length = next(iter(self.outputs.values())).shape
        encoding = options.encoding()
        shaper = Shaper(encoding=encoding, clip=options.clip, exact_sum=options.exact_sum)
        peaks = {name: peak_of(stem, name) for name, stem in self.outputs.items()}
        gains = clip_gains(peaks, options.clip, encoding)
        with (
            make_folders(dict(paths)),
            StemFiles(
                dict(paths), self.sample_rate, channels, encoding, overwrite=options.overwrite
            ) as files,
            translate_os_errors(files.name),
        ):
            for start in range(0, length, PIECE):
                block = {name: x[:, start : start + PIECE] for name, x in self.outputs.items()}
                files.write(shaper.shape({n: x.cpu() for n, x in block.items()}, gains))
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
