"""Write stems from a spool to files, at their level, sample rate and channels.

Shapes: S stems, C channels, t samples of a block.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from demucs_infer.audio.channels import StreamResampler, convert_channels
from demucs_infer.audio.formats import Encoding, source_depth
from demucs_infer.audio.gain import Levels, Shaper, clip_gains, peak_of, translate_os_errors
from demucs_infer.audio.spool import Spool
from demucs_infer.audio.stem_files import Sink, StemFiles
from demucs_infer.audio.stem_mp4 import MIX, StemMp4
from demucs_infer.audio.tags import portable_tags
from demucs_infer.audio.writer import Target
from demucs_infer.options import OutputOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sample rate and channels of the spool and of the files."""

    spool_rate: int
    rate: int
    channels: int
    frames: int | None = None
    """Exact number of samples, if the files must be as long as their source."""


class SourceDetails(Protocol):
    """The metadata of the file, or array, that was separated."""

    @property
    def tags(self) -> Mapping[str, str]:
        """Title, artist and so on."""

    @property
    def cover(self) -> bytes | None:
        """The cover art."""

    @property
    def bits(self) -> int | None:
        """Bits of a sample; None for formats without a fixed number."""

    @property
    def is_float(self) -> bool:
        """Whether samples are floats."""


class _NeedsGain(Exception):
    """Raised when a stem clips: the gain is known only after the last sample."""


class StemWriter:
    """Encodes the stems of a spool while it is being filled; `commit` renames the files.

    Files are encoded without a gain first, as few tracks clip. If a stem clips, encoding restarts
    when the peaks of the whole track are known, with the gain that prevents it. `open_sink`
    creates the files. It is first called at once, so that an unusable folder is reported before any
    work.
    """

    def __init__(
        self,
        spool: Spool,
        stems: tuple[str, ...],
        open_sink: Callable[[], Sink],
        layout: Layout,
        shaper: Shaper,
        *,
        mix_name: str | None = None,
    ) -> None:
        """Open the files; with `mix_name`, the sum of the stems is also written, by that name."""
        self.spool = spool
        self.layout = layout
        self._stems = stems
        self._open_sink = open_sink
        self._names = stems if mix_name is None else (*stems, mix_name)
        self._mix_name = mix_name
        self._shaper = shaper
        self.sink = open_sink()
        """The files, complete after `encode`."""

        self.frames = 0
        """Number of samples of each file, as passed to its encoder."""

    @classmethod
    def open(
        cls,
        spool: Spool,
        targets: Mapping[str, Target],
        layout: Layout,
        options: OutputOptions,
        source: SourceDetails,
        *,
        temp_folder: Path | None = None,
    ) -> "StemWriter":
        """Return a writer for files with these options, and with tags and cover of the source."""
        bits = source_depth(source.bits, is_float=source.is_float, format=options.format)
        encoding = options.encoding(bits)
        tags = source.tags if options.tags else {}
        cover = source.cover if options.tags else None
        stems = tuple(targets)

        def open_sink() -> Sink:
            if encoding.kind.holds_all_stems:
                return StemMp4(
                    targets[stems[0]],
                    layout.rate,
                    layout.channels,
                    stems,
                    encoding=Encoding("m4a", bitrate=encoding.bitrate),
                    tags=portable_tags(tags, ""),
                    cover=cover,
                    overwrite=options.overwrite,
                    temp_folder=temp_folder,
                )
            return StemFiles(
                targets,
                layout.rate,
                layout.channels,
                encoding,
                tags={stem: portable_tags(tags, f" ({stem})") for stem in stems},
                cover=cover,
                overwrite=options.overwrite,
                temp_folder=temp_folder,
            )

        shaper = Shaper.from_options(options, encoding)
        mix_name = MIX if encoding.kind.holds_all_stems else None
        return cls(spool, stems, open_sink, layout, shaper, mix_name=mix_name)

    @property
    def encoding(self) -> Encoding:
        """How the files are encoded."""
        return self._shaper.encoding

    @property
    def file_rate(self) -> int:
        """The sample rate of the files: `layout.rate`, or the next one that the format supports."""
        return self.encoding.kind.rate_for(self.layout.rate)

    def encode(self) -> Levels:
        """Encode all files, under temporary names, until the spool ends; return the levels."""
        peaks = dict.fromkeys(self._names, 0.0)
        unity = dict.fromkeys(self._names, 1.0)
        try:
            self._encode(self._measured_blocks(peaks, stop_at_clipping=True), unity)
        except _NeedsGain:
            peaks = dict.fromkeys(self._names, 0.0)
            for _ in self._measured_blocks(peaks, stop_at_clipping=False):
                pass
            gains = self._gains(peaks)
            self.sink = self._open_sink()
            self._encode(self._blocks(), gains)
            return self._levels(peaks, gains)
        return self._levels(peaks, unity)

    def commit(self) -> None:
        """Rename the temporary files to their final names."""
        with translate_os_errors(self.sink.name):
            self.sink.commit()

    def abort(self) -> None:
        """Remove the files."""
        self.sink.abort()

    def __enter__(self) -> "StemWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()

    def _levels(self, peaks: Mapping[str, float], gains: Mapping[str, float]) -> Levels:
        """Return the peaks and gains of the stems, without those of the mixture."""
        return Levels(
            {stem: peaks[stem] for stem in self._stems}, {stem: gains[stem] for stem in self._stems}
        )

    def _gains(self, peaks: Mapping[str, float]) -> dict[str, float]:
        return clip_gains(peaks, self._shaper.clip, self._shaper.encoding)

    def _encode(self, blocks: Iterator[dict[str, Tensor]], gains: Mapping[str, float]) -> None:
        self.frames = 0
        try:
            with translate_os_errors(self.sink.name):
                for block in blocks:
                    self.frames += next(iter(block.values())).shape[-1]
                    self.sink.write(self._shaper.shape(block, gains))
                self.sink.finish()
        except BaseException:
            self.sink.abort()
            raise

    def _measured_blocks(
        self, peaks: dict[str, float], *, stop_at_clipping: bool
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each block, after updating `peaks` from it."""
        for block in self._blocks():
            for stem, samples in block.items():
                peaks[stem] = max(peaks[stem], peak_of(samples, f"{self.sink.name} ({stem})"))
            if stop_at_clipping and any(gain != 1 for gain in self._gains(peaks).values()):
                raise _NeedsGain
            yield block

    def _blocks(self) -> Iterator[dict[str, Tensor]]:
        """Yield the blocks (C, t) of each file, at its sample rate and with its channels."""
        layout, stems = self.layout, len(self._stems)
        remaining = layout.frames
        for block in self._resampled_blocks():
            if remaining is not None:
                block = block[..., :remaining]
                remaining -= block.shape[-1]
            if block.shape[-1]:
                yield self._name(block.reshape(stems, layout.channels, -1))
        if remaining:  # resampling twice may lose a sample
            yield self._name(torch.zeros(stems, layout.channels, remaining))

    def _name(self, block: Tensor) -> dict[str, Tensor]:
        """Return the stems (S, C, t) by name, and the mixture if the files include it."""
        named = dict(zip(self._stems, block))
        return named if self._mix_name is None else {**named, self._mix_name: block.sum(0)}

    def _resampled_blocks(self) -> Iterator[Tensor]:
        """Yield resampled blocks of all stems: (S*C, t)."""
        layout = self.layout
        rows = len(self._stems) * layout.channels
        resampler = StreamResampler(layout.spool_rate, layout.rate, rows)
        for block in self.spool.blocks():
            yield resampler.push(convert_channels(block, layout.channels).flatten(0, 1))
        yield resampler.finish()
