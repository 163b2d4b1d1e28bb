"""Represent the results of a separation: stems in memory, or the files they were written to.

Shapes: C channels, T samples of the track.
"""

from __future__ import annotations

import html
import io
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from demucs_infer.audio.encoders.pyav import PIECE
from demucs_infer.audio.filenames import stem_paths
from demucs_infer.audio.formats import FORMATS, Encoding, nearest_bitrate
from demucs_infer.audio.gain import Shaper, clip_gains, peak_of, track_gain, translate_os_errors
from demucs_infer.audio.stem_files import StemFiles
from demucs_infer.audio.stem_mp4 import check_stem_count
from demucs_infer.audio.stem_writer import Layout
from demucs_infer.audio.writer import AudioWriter, Target
from demucs_infer.options import Format, OutputChanges, OutputOptions, change_output
from demucs_infer.system.durability import make_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack


def stem_targets(
    out: str | os.PathLike[str] | Mapping[str, Target],
    stems: tuple[str, ...],
    options: OutputOptions,
    track: str = "track",
) -> dict[str, Target]:
    """Return the target of each stem: as mapped by `out`, or a path in the folder `out`."""
    if not isinstance(out, Mapping):
        extension = options.extension
        paths = stem_paths(Path(out), stems, options.template, track=track, extension=extension)
        return dict(paths)
    if set(out) != set(stems):
        raise ValueError(
            f"got paths for {', '.join(map(str, out))}, but the stems are {', '.join(stems)}"
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

    Files at the sample rate of the source have exactly its number of samples, `frames`.
    """
    formats = {"model": model, "source": source}
    rate = formats[options.rate][0] if isinstance(options.rate, str) else options.rate
    requested = options.channels
    channels = formats[requested][1] if isinstance(requested, str) else requested
    if 1 < model[1] < channels:
        raise ValueError(
            f"channels = {requested!r}: the stems have {model[1]} channels and cannot be written "
            f"with {channels}; choose 'model', or at most {model[1]}"
        )
    return Layout(
        spool_rate=model[0],
        rate=rate,
        channels=channels,
        frames=frames if rate == source[0] else None,
    )


def check_output(
    options: OutputOptions, stems: Sequence[str], sample_rate: int, channels: int
) -> None:
    """Check, before any track is read, that the stems of a model can be written.

    What depends on the track, with `source` for rate or channels, is checked when it is opened.

    Raises:
        ValueError: The format does not support these stems or channels, or has no such bit rate.
    """
    model = sample_rate, channels
    layout = file_layout(options, model=model, source=model)
    encoding = options.encoding()
    if encoding.kind.holds_all_stems:
        check_stem_count(stems)
    if "source" not in (options.rate, options.channels):
        encoding.check_bitrate(encoding.kind.rate_for(layout.rate), layout.channels)


@contextmanager
def make_folders(targets: Mapping[str, Target], source: Path | None = None) -> Iterator[None]:
    """Make the folders of the files; after an error in the block, remove the new ones.

    Raises:
        ValueError: A file would replace `source`.
    """
    paths = [Path(target) for target in targets.values() if isinstance(target, str | os.PathLike)]
    for path in paths:
        if source is not None and path.resolve() == source.resolve():
            raise ValueError(f"{path} is the input, which a stem would replace: choose a folder")
    made: set[Path] = set()
    try:
        for folder in {path.parent for path in paths}:
            with translate_os_errors(str(folder)):
                missing = (path for path in (folder, *folder.parents) if not path.exists())
                made.update(missing)
                make_folder(folder)
        yield
    except BaseException:
        for folder in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # another program has put files there
                folder.rmdir()
        raise


_PREVIEW_SECONDS = 60
"""Length of the audio that a notebook stores for its players."""

_PREVIEW_KILOBITS = 128


@dataclass(frozen=True, slots=True, eq=False, repr=False)  # comparing tensors gives no bool
class InferenceOutput:
    """The stems of one track, at the level of the mixture: `out["vocals"]` is (C, T).

    A notebook shows it as waveforms and players.
    """

    outputs: dict[str, Tensor]
    """Stems (C, T) by name: those of the model in its order, then derived ones."""

    sample_rate: int
    """Sample rate of the model."""

    mixture: Tensor | None = field(default=None, repr=False)
    """The track (C, T) at the sample rate and with the channels of the model."""

    @property
    def stems(self) -> dict[str, Tensor]:
        """The same as `outputs`."""
        return self.outputs

    @property
    def gain(self) -> float:
        """The gain that `save` applies to all stems: 1.0 unless one would clip."""
        peaks = {name: peak_of(stem, name) for name, stem in self.outputs.items()}
        return track_gain(peaks, Encoding())

    def __repr__(self) -> str:
        channels, length = next(iter(self.outputs.values())).shape
        return (
            f"InferenceOutput({', '.join(self.outputs)}: {channels} channels, "
            f"{length / self.sample_rate:.1f} s at {self.sample_rate} Hz)"
        )

    def _repr_html_(self) -> str:
        """Return a waveform and a player for each stem; they play the first minute."""
        from demucs_infer.pictures import draw_waveform, find_hue

        frames = _PREVIEW_SECONDS * self.sample_rate
        stems = {name: stem[:, :frames].cpu() for name, stem in self.outputs.items()}
        peaks = {name: peak_of(stem, name) for name, stem in stems.items()}
        gain, top = track_gain(peaks, Encoding("mp3")), max(*peaks.values(), 0.05)
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td>{draw_waveform(stem, hue=find_hue(name, index), width=400, top=top)}</td>"
            f"<td><audio controls preload='none' src='data:audio/mpeg;base64,"
            f"{_encode_preview(stem * gain, self.sample_rate)}'></audio></td></tr>"
            for index, (name, stem) in enumerate(stems.items())
        )
        length = next(iter(self.outputs.values())).shape[-1]
        note = f"<p>The first {_PREVIEW_SECONDS} seconds.</p>" if length > frames else ""
        return f"<table>{rows}</table>{note}"

    def __getitem__(self, stem: str) -> Tensor:
        try:
            return self.outputs[stem]
        except KeyError:
            raise KeyError(
                f"no stem named {stem!r}; available: {', '.join(self.outputs)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def to(self, device: str | torch.device) -> InferenceOutput:
        """Return a copy on another device."""
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
        """Write one file per stem, all or none, and return their paths.

        `options` and `changes` are the settings of `OutputOptions`; the files have the sample rate
        and the channels of the stems. `track` replaces `{track}` in the template. If a stem would
        clip, all get the same `gain`; `clip="rescale"` gives each its own, as upstream does.
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
        shaper = Shaper.from_options(options, encoding)
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


def _encode_preview(stem: Tensor, sample_rate: int) -> str:
    """Encode a stem (C, T) to mp3, in base64."""
    file, kind = io.BytesIO(), FORMATS["mp3"]
    bitrate = nearest_bitrate(kind, _PREVIEW_KILOBITS, kind.rate_for(sample_rate), len(stem))
    with AudioWriter(file, sample_rate, len(stem), format="mp3", bitrate=bitrate) as writer:
        writer.write(stem)
    return b64encode(file.getvalue()).decode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparatedFiles:
    """The files that were written for one track."""

    paths: Mapping[str, Path | None]
    """Paths by stem; None for a file object."""

    sample_rate: int
    channels: int
    frames: int
    """Number of samples of each file, as passed to its encoder."""

    gains: Mapping[str, float]
    """Gains by stem, which prevent clipping."""

    peaks: Mapping[str, float]
    """The largest absolute sample of each stem before its gain."""

    warnings: tuple[str, ...] = ()
    """Problems of the input that are not errors."""

    seconds: float = 0.0
    """Processing time in seconds."""

    @property
    def gain(self) -> float:
        """The gain of the most attenuated stem; with `clip="track"`, that of all stems."""
        return min(self.gains.values(), default=1.0)
