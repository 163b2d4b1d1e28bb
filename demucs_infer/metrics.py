"""How good a separation is: decibels between the true stems and the estimated ones, and a table.

`sdr`, `snr` and `si_sdr` compare one stem; `evaluate` compares folders of them. A true stem that
is silent has no score (None): there is nothing to be close to.
Shapes: S stems, C channels, T samples, N frames.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from demucs_infer.audio.reader import AudioReader
from demucs_infer.errors import ConfigError

DELTA = 1e-7
"""Added to both energies of `sdr`, as in the Music Demixing Challenge: silence is not infinity."""

METRICS = ("sdr", "si_sdr", "snr", "frame_sdr")
_MIXES = {"mix", "mixture"}
_SOUNDS = {".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".aif", ".aiff", ".wv"}


def _energy(signal: Tensor) -> float:
    return float(signal.double().square().sum())


def _decibels(signal: float, error: float) -> float:
    return 10 * math.log10(signal / error) if error > 0 else math.inf


def _same_shape(reference: Tensor, estimate: Tensor) -> None:
    if reference.shape != estimate.shape:
        raise ValueError(
            f"the reference has shape {tuple(reference.shape)}, the estimate "
            f"{tuple(estimate.shape)}: score signals of equal length and channels"
        )


def sdr(reference: Tensor, estimate: Tensor) -> float | None:
    """Signal to distortion ratio over all samples and channels, as the MDX challenge defines it."""
    _same_shape(reference, estimate)
    energy = _energy(reference)
    if not energy:
        return None
    return _decibels(energy + DELTA, _energy(reference.double() - estimate) + DELTA)


def snr(reference: Tensor, estimate: Tensor) -> float | None:
    """Signal to noise ratio: `sdr` with nothing added, infinite for a perfect estimate."""
    _same_shape(reference, estimate)
    energy = _energy(reference)
    return _decibels(energy, _energy(reference.double() - estimate)) if energy else None


def si_sdr(reference: Tensor, estimate: Tensor) -> float | None:
    """`snr` of the estimate at the loudness that suits it best: a wrong level costs nothing.

    Minus infinity for an estimate that has nothing of the reference.
    """
    _same_shape(reference, estimate)
    energy = _energy(reference)
    if not energy:
        return None
    truth, guess = reference.double(), estimate.double()
    target = (truth * guess).sum() / energy * truth
    signal = _energy(target)
    return _decibels(signal, _energy(guess - target)) if signal else -math.inf


def frame_sdr(
    references: Tensor, estimates: Tensor, *, window: int = 44100, hop: int | None = None
) -> Tensor:
    """The SDR of every window of `window` samples: two (S C T) -> (S N).

    These are the SDR values of BSS Eval v4 (`museval.evaluate`): its distortion filters split the
    error into parts but leave the sum, and so the SDR, alone. As there, a window in which any stem
    is silent, true or estimated, counts for none of them and holds NaN, and an incomplete last
    window is left out.
    """
    _same_shape(references, estimates)
    if window < 1 or (hop is not None and hop < 1):
        raise ValueError(f"{window = } and {hop = } must be at least one sample")
    window = min(window, references.shape[-1])
    truth, guess = (
        x.double().unfold(-1, window, hop or window).transpose(1, 2)
        for x in (references, estimates)
    )
    signal = truth.square().sum((2, 3))
    scores = 10 * torch.log10(signal / (truth - guess).square().sum((2, 3)))
    silent = (truth.sum(2) == 0).all(-1).any(0) | (guess.sum(2) == 0).all(-1).any(0)
    return scores.masked_fill(silent, torch.nan)


@dataclass(frozen=True, slots=True)
class Score:
    """What one stem of one track reached, in decibels; None where there is no answer."""

    track: str
    stem: str
    sdr: float | None
    si_sdr: float | None
    snr: float | None
    frame_sdr: float | None = None
    """Median over windows of a second, where it was asked for."""

    def rounded(self) -> dict[str, str | float | None]:
        """A row for JSON and CSV; infinities are None there, because JSON has none."""
        values = {name: _finite(getattr(self, name)) for name in METRICS}
        return {"track": self.track, "stem": self.stem, **values}


def _finite(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


def score(
    track: str,
    references: Mapping[str, Tensor],
    estimates: Mapping[str, Tensor],
    *,
    frames: int | None = None,
) -> list[Score]:
    """All stems of one track, in the order of `references`; each (C T).

    `frames` is the number of samples of the windows of `frame_sdr`; without it that is left out.
    """
    missing = [stem for stem in references if stem not in estimates]
    if missing:
        raise ConfigError(
            f"{track}: no estimate of {', '.join(missing)}; there is {', '.join(estimates)}."
        )
    medians: list[float | None] = [None] * len(references)
    if frames is not None:
        names = list(references)
        values = frame_sdr(
            torch.stack([references[name] for name in names]),
            torch.stack([estimates[name] for name in names]),
            window=frames,
        )
        medians = [_middle(row) for row in values]
    return [
        Score(track, stem, sdr(truth, guess), si_sdr(truth, guess), snr(truth, guess), middle)
        for (stem, truth), middle in zip(references.items(), medians, strict=True)
        for guess in (estimates[stem],)
    ]


def _middle(values: Tensor) -> float | None:
    """NumPy's median (the mean of the two in the middle) of what is not NaN."""
    known = values[~values.isnan()].tolist()
    return median(known) if known else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of all tracks, and ways to write them down."""

    scores: tuple[Score, ...]

    @property
    def stems(self) -> list[str]:
        return list(dict.fromkeys(score.stem for score in self.scores))

    def values(self, stem: str, metric: str) -> list[float]:
        """What the tracks reached that have an answer."""
        found = [getattr(score, metric) for score in self.scores if score.stem == stem]
        return [value for value in found if value is not None and not math.isnan(value)]

    def summary(self) -> dict[str, dict[str, dict[str, float | int | None]]]:
        """stem -> metric -> median, mean and the number of tracks that have an answer."""
        return {
            stem: {metric: _aggregate(self.values(stem, metric)) for metric in METRICS}
            for stem in self.stems
        }

    def table(self) -> str:
        """For a terminal: a row a stem, median and mean over the tracks, in decibels."""
        shown = [m for m in METRICS if any(self.values(stem, m) for stem in self.stems)]
        head = ["stem", "tracks", *(f"{m} {kind}" for m in shown for kind in ("median", "mean"))]
        rows = [head]
        for stem, metrics in self.summary().items():
            cells = [_cell(metrics[m][kind]) for m in shown for kind in ("median", "mean")]
            rows.append([stem, str(metrics["sdr"]["tracks"]), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )

    def json(self) -> str:
        tracks = [score.rounded() for score in self.scores]
        return json.dumps({"summary": self.summary(), "tracks": tracks}, indent=1)

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["track", "stem", *METRICS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(score.rounded() for score in self.scores)
        return text.getvalue()


def _aggregate(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        return {"median": None, "mean": None, "tracks": 0}
    return {
        "median": _finite(median(values)),
        "mean": _finite(fmean(values)),
        "tracks": len(values),
    }


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def evaluate(
    references: str | Path,
    estimates: str | Path | Callable[[Tensor, int], Mapping[str, Tensor]],
    *,
    stems: Sequence[str] | None = None,
    framewise: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score a folder of tracks, `ROOT/track/stem.wav` or `ROOT/stem.wav` for one track.

    `estimates` is a folder of the same form, or a function that separates: it is given the mix
    (C T) and its sample rate and returns the stems. The mix is the track's `mixture` or `mix`
    file, or else the sum of its stems. One track is in memory at a time. `stems` are the ones to
    score, by default all that the references have; `progress` is told every track's name.
    """
    scores: list[Score] = []
    for name, folder in _tracks(Path(references)):
        if progress is not None:
            progress(name)
        files = _stem_files(folder, stems)
        truth, rate = _read_all(files)
        if callable(estimates):
            guess = dict(estimates(_mix(folder, truth), rate))
        else:
            guess = _estimates(Path(estimates), name, files, rate)
        for stem in truth.keys() & guess.keys():
            if truth[stem].shape != guess[stem].shape:
                raise ConfigError(
                    f"{name}/{stem}: the reference has (channels, samples) "
                    f"{tuple(truth[stem].shape)}, the estimate {tuple(guess[stem].shape)}; "
                    "write the estimates without a lossy codec's padding."
                )
        scores += score(name, truth, guess, frames=rate if framewise else None)
    return Evaluation(tuple(scores))


def _tracks(root: Path) -> list[tuple[str, Path]]:
    """(name, folder) of every track below `root`."""
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; expected ROOT/track/stem.wav.")
    found = [
        (path.name, path) for path in sorted(root.iterdir()) if path.is_dir() and any(_sounds(path))
    ]
    if not found and any(_sounds(root)):
        return [(root.name, root)]
    if not found:
        raise ConfigError(f"{root} has no stems; expected ROOT/track/stem.wav.")
    return found


def _sounds(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SOUNDS)


def _stem_files(folder: Path, stems: Iterable[str] | None) -> dict[str, Path]:
    files = {path.stem: path for path in _sounds(folder) if path.stem not in _MIXES}
    wanted = list(files) if stems is None else list(stems)
    missing = [stem for stem in wanted if stem not in files]
    if missing or not wanted:
        raise ConfigError(
            f"{folder} has no file for {', '.join(missing) or 'any stem'}; "
            f"it has {', '.join(files) or 'none'}."
        )
    return {stem: files[stem] for stem in wanted}


def _estimates(root: Path, name: str, wanted: Iterable[str], rate: int) -> dict[str, Tensor]:
    folder = root / name if (root / name).is_dir() else root
    if not folder.is_dir() or (folder is root and any(path.is_dir() for path in root.iterdir())):
        raise ConfigError(f"{root} has no folder {name!r}; expected the references' track names.")
    signals, found = _read_all(_stem_files(folder, wanted))
    if found != rate:
        raise ConfigError(f"{folder} is at {found} Hz, the references at {rate} Hz; resample one.")
    return signals


def _read(path: Path) -> tuple[Tensor, int]:
    reader = AudioReader(path)
    return torch.cat(list(reader.blocks()), -1), reader.info.sample_rate


def _read_all(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], int]:
    read = {stem: _read(path) for stem, path in files.items()}
    rates = {rate for _, rate in read.values()}
    shapes = {tuple(signal.shape) for signal, _ in read.values()}
    if len(rates) > 1 or len(shapes) > 1:
        folder = next(iter(files.values())).parent
        raise ConfigError(
            f"the stems in {folder} differ: sample rates {sorted(rates)}, "
            f"(channels, samples) {sorted(shapes)}; stems of one track are of one length."
        )
    return {stem: signal for stem, (signal, _) in read.items()}, rates.pop()


def _mix(folder: Path, stems: Mapping[str, Tensor]) -> Tensor:
    mixes = [path for path in _sounds(folder) if path.stem in _MIXES]
    if mixes:
        return _read(mixes[0])[0]
    files = _stem_files(folder, None)
    rest = {stem: path for stem, path in files.items() if stem not in stems}
    parts = [*stems.values(), *(_read(path)[0] for path in rest.values())]
    return torch.stack(parts).sum(0)
