"""From final samples to files under their names: levels, rate, encoders, manifest, one commit.

Shapes: S stems, C channels, t samples of a block.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from demucs_infer.audio.channels import StreamResampler, convert_channels
from demucs_infer.audio.file_set import StemFileSet
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.gain import Clip, clip_gains, translate_os_errors
from demucs_infer.batch.manifest import Manifest, Stem
from demucs_infer.batch.spool import Spool
from demucs_infer.batch.workdir import WorkDir
from demucs_infer.system.checksum import sha256_file


class _NeedsGain(Exception):
    """A gain will be needed, and is known only when the last sample is."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StemWriter:
    """How the samples in a spool become files; nothing appears before `commit`."""

    paths: Mapping[str, Path]
    """Where each stem goes, in the order of the spool."""

    workplace: WorkDir
    spool: Spool
    encoding: Encoding
    clip: Clip
    spool_rate: int
    rate: int
    channels: int
    frames: int | None = None
    """Exactly that many samples, where the files are to be as long as their source."""

    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cover: bytes | None = None

    def part(self, stem: str) -> Path:
        """Where a stem's file is made."""
        number = list(self.paths).index(stem)
        return self.workplace.folder / f"{number}{self.encoding.kind.suffixes[0]}"

    def encode(self) -> dict[str, float]:
        """Write all files while the spool is being filled; says what each was multiplied by.

        The files are encoded as they are, in the hope that nothing clips. Where that fails, they
        are encoded again when the peak of the whole track is known.
        """
        silent = dict.fromkeys(self.paths, 0.0)
        unity = dict.fromkeys(self.paths, 1.0)
        if self.clip not in ("track", "rescale"):
            self._write(self._blocks(), unity)
            return unity
        try:
            self._write(self._watched(dict(silent), gives_up=True), unity)
        except _NeedsGain:
            peaks = dict(silent)
            for _ in self._watched(peaks, gives_up=False):
                pass
            gains = clip_gains(peaks, self.clip, self.encoding)
            self._write(self._blocks(), gains)
            return gains
        return unity

    def _write(self, blocks: Iterator[dict[str, Tensor]], gains: Mapping[str, float]) -> None:
        with StemFileSet(
            {stem: self.part(stem) for stem in self.paths},
            self.rate,
            self.channels,
            self.encoding,
            clip="none" if self.clip in ("track", "rescale") else self.clip,
            # With a gain each, the stems do not add up to anything.
            exact_sum=self.clip != "rescale",
            tags=self.tags,
            cover=self.cover,
        ) as files:
            for block in blocks:
                files.write({stem: samples * gains[stem] for stem, samples in block.items()})

    def _watched(self, peaks: dict[str, float], *, gives_up: bool) -> Iterator[dict[str, Tensor]]:
        """The blocks, whose peaks are taken on the way."""
        for block in self._blocks():
            for stem, samples in block.items():
                peaks[stem] = max(peaks[stem], float(samples.abs().max()))
            if gives_up and set(clip_gains(peaks, self.clip, self.encoding).values()) != {1.0}:
                raise _NeedsGain
            yield block

    def _blocks(self) -> Iterator[dict[str, Tensor]]:
        """What the files hold: (C t) for each stem, at their rate and with their channels."""
        stems, channels = len(self.paths), self.channels
        resampler = StreamResampler(self.spool_rate, self.rate, stems * channels)
        left = self.frames
        for block in self._resampled(resampler):
            if left is not None:
                block = block[..., :left]
                left -= block.shape[-1]
            if block.shape[-1]:
                yield dict(zip(self.paths, block.reshape(stems, channels, -1)))
        if left:
            yield {stem: torch.zeros(channels, left) for stem in self.paths}

    def _resampled(self, resampler: StreamResampler) -> Iterator[Tensor]:
        """All stems side by side: (S·C t)."""
        for block in self.spool.blocks():
            yield resampler.push(convert_channels(block, self.channels).flatten(0, 1))
        yield resampler.finish()

    def commit(self, manifest: Manifest | None, where: Path) -> None:
        """Give all files their names; the manifest comes last, so that it vouches for the rest."""
        with translate_os_errors(str(where.parent)):
            where.unlink(missing_ok=True)
            for stem, path in self.paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                self.part(stem).replace(path)
            if manifest:
                where.parent.mkdir(parents=True, exist_ok=True)
                manifest.write(where)
        self.workplace.remove()

    def described(self, where: Path, gains: Mapping[str, float]) -> dict[str, Stem]:
        """The files as the manifest lists them."""
        found = {}
        for stem, path in self.paths.items():
            part = self.part(stem)
            found[stem] = Stem(
                file=Path(os.path.relpath(path, where.parent)).as_posix(),
                bytes=part.stat().st_size,
                sha256=sha256_file(part),
                gain=gains[stem],
            )
        return found
