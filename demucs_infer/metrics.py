"""Score separations: decibels between true and estimated stems, summarized over tracks.

`sdr`, `snr` and `si_sdr` compare one stem; `evaluate` compares folders of stems. The score of a
silent true stem is None, because it is undefined.
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
"""Added to both energies of `sdr`, as in the Music Demixing Challenge, to keep it finite."""

METRICS = ("sdr", "si_sdr", "snr", "fullness", "bleedless", "frame_sdr")
_MIXTURE_NAMES = {"mix", "mixture"}
_AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".aif", ".aiff", ".wv"}


def _energy(signal: Tensor) -> float:
    return float(signal.double().square().sum())


def _decibels(signal: float, error: float) -> float:
    return 10 * math.log10(signal / error) if error > 0 else math.inf


def _check_same_shape(reference: Tensor, estimate: Tensor) -> None:
    if reference.shape != estimate.shape:
        raise ValueError(
            f"the reference has shape {tuple(reference.shape)}, the estimate "
            f"{tuple(estimate.shape)}: expected equal channels and lengths"
        )


def sdr(reference: Tensor, estimate: Tensor) -> float | None:
    """Return the signal-to-distortion ratio (SDR), as defined by the MDX challenge."""
    _check_same_shape(reference, estimate)
    energy = _energy(reference)
    if not energy:
        return None
    return _decibels(energy + DELTA, _energy(reference.double() - estimate) + DELTA)


def snr(reference: Tensor, estimate: Tensor) -> float | None:
    """Return the signal-to-noise ratio: `sdr` without `DELTA`, infinite for a perfect estimate."""
    _check_same_shape(reference, estimate)
    energy = _energy(reference)
    return _decibels(energy, _energy(reference.double() - estimate)) if energy else None


def si_sdr(reference: Tensor, estimate: Tensor) -> float | None:
    """Return the scale-invariant SDR, which does not depend on the gain of the estimate.

    It is minus infinity for an estimate that is orthogonal to the reference.
    """
    _check_same_shape(reference, estimate)
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
    """Return the SDR of every window of `window` samples: two (S, C, T) -> (S, N).

    These are the SDR values of BSS Eval v4 (`museval.evaluate`), whose distortion filters split
    the error into parts without changing their sum. As in museval, a window in which any true or
    estimated stem is silent is NaN for all stems, and an incomplete last window is dropped.
    """
    _check_same_shape(references, estimates)
    if window < 1 or (hop is not None and hop < 1):
        raise ValueError(f"{window = }, {hop = }: expected at least one sample")
    window = min(window, references.shape[-1])
    truth, guess = (
        x.double().unfold(-1, window, hop or window).transpose(1, 2)
        for x in (references, estimates)
    )
    signal = truth.square().sum((2, 3))
    scores = 10 * torch.log10(signal / (truth - guess).square().sum((2, 3)))
    silent = (truth.sum(2) == 0).all(-1).any(0) | (guess.sum(2) == 0).all(-1).any(0)
    return scores.masked_fill(silent, torch.nan)


_FFT_SIZE, _HOP, _BANDS = 4096, 1024, 512
_FLOOR_DECIBELS = -80.0
"""Level below which nothing is heard, relative to the loudest point of the true stem."""


def fullness_bleedless(
    reference: Tensor, estimate: Tensor, sample_rate: int = 44100
) -> tuple[float, float] | None:
    """Return two scores from 0 to 100: how complete a stem is, and how free from other stems.

    The levels of 512 mel bands are compared in decibels: fullness is 100 / (1 + mean deficit),
    bleedless 100 / (1 + mean excess). MVSEP's leaderboard has scores of these names; they differ
    slightly, because it uses other filters. The result is None for a silent true stem.
    """
    _check_same_shape(reference, estimate)
    if not _energy(reference):
        return None
    filters = _mel_filters(sample_rate)
    truth, guess = (filters @ _power(signal.mean(0)) for signal in (reference, estimate))
    floor = float(truth.max()) * 10 ** (_FLOOR_DECIBELS / 10)
    difference = 10 * torch.log10(guess.clamp(min=floor) / truth.clamp(min=floor))
    missing, surplus = (
        float(part.mean()) if part.numel() else 0.0
        for part in (-difference[difference < 0], difference[difference > 0])
    )
    return 100 / (1 + missing), 100 / (1 + surplus)


def _power(signal: Tensor) -> Tensor:
    """Return the power of every bin and frame: (T) -> (F, N)."""
    signal = torch.nn.functional.pad(signal.float(), (0, max(0, _FFT_SIZE - len(signal))))
    window = torch.hann_window(_FFT_SIZE)
    spectrum = torch.stft(signal, _FFT_SIZE, _HOP, window=window, center=False, return_complex=True)
    return spectrum.abs().square()


def _mel_filters(sample_rate: int) -> Tensor:
    """Return triangular filters (bands, F) that are equally wide on the mel scale."""
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, highest, _BANDS + 2)
    edges = (700 * (10 ** (mels / 2595) - 1)) / sample_rate * _FFT_SIZE
    bins = torch.arange(_FFT_SIZE // 2 + 1)
    low, center, high = (edges[start : start + _BANDS, None] for start in range(3))
    filters = torch.minimum((bins - low) / (center - low), (high - bins) / (high - center))
    filters = filters.clamp(min=0)
    # A narrow low band may lie between two bins: it gets the nearest one.
    nearest = center.round().long().clamp(max=len(bins) - 1)
    empty = filters.sum(1, keepdim=True) == 0
    return torch.where(empty & (bins == nearest), torch.ones(()), filters)


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one stem of one track in decibels; None where undefined."""

    track: str
    stem: str
    sdr: float | None
    si_sdr: float | None
    snr: float | None
    frame_sdr: float | None = None
    """Median over windows of one second; None unless requested or if undefined."""
    fullness: float | None = None
    """How complete the stem is, 0 to 100."""
    bleedless: float | None = None
    """How free the stem is from other stems, 0 to 100."""

    def to_row(self) -> dict[str, str | float | None]:
        """Return a row for JSON and CSV, with None for infinities, which JSON does not have."""
        values = {name: _round_finite(getattr(self, name)) for name in METRICS}
        return {"track": self.track, "stem": self.stem, **values}


def _round_finite(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


def score(
    track: str,
    references: Mapping[str, Tensor],
    estimates: Mapping[str, Tensor],
    *,
    frames: int | None = None,
    sample_rate: int = 44100,
) -> list[Score]:
    """Score all stems (C, T) of one track, in the order of `references`.

    `frames` is the window of `frame_sdr` in samples; None leaves that score out. Raises
    `ConfigError` if an estimate is missing.
    """
    missing = [stem for stem in references if stem not in estimates]
    if missing:
        raise ConfigError(
            f"{track}: no estimate of {', '.join(missing)}; available: {', '.join(estimates)}."
        )
    medians: list[float | None] = [None] * len(references)
    if frames is not None:
        names = list(references)
        values = frame_sdr(
            torch.stack([references[name] for name in names]),
            torch.stack([estimates[name] for name in names]),
            window=frames,
        )
        medians = [_compute_median(row) for row in values]
    return [
        _score_stem(track, stem, truth, estimates[stem], median_sdr, sample_rate)
        for (stem, truth), median_sdr in zip(references.items(), medians, strict=True)
    ]


def _score_stem(
    track: str,
    stem: str,
    truth: Tensor,
    guess: Tensor,
    median_sdr: float | None,
    sample_rate: int,
) -> Score:
    fullness, bleedless = fullness_bleedless(truth, guess, sample_rate) or (None, None)
    return Score(
        track,
        stem,
        sdr(truth, guess),
        si_sdr(truth, guess),
        snr(truth, guess),
        median_sdr,
        fullness,
        bleedless,
    )


def _compute_median(values: Tensor) -> float | None:
    """Return the median of the values that are not NaN; None if there are none."""
    present = values[~values.isnan()].tolist()
    return median(present) if present else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of all tracks, their summary, and their text formats."""

    scores: tuple[Score, ...]

    @property
    def stems(self) -> list[str]:
        """The names of all stems, in the order of their first track."""
        return list(dict.fromkeys(score.stem for score in self.scores))

    def values(self, stem: str, metric: str) -> list[float]:
        """Return the defined scores of a stem over all tracks."""
        values = [getattr(score, metric) for score in self.scores if score.stem == stem]
        return [value for value in values if value is not None and not math.isnan(value)]

    def summary(self) -> dict[str, dict[str, dict[str, float | int | None]]]:
        """Return stem -> metric -> median, mean and number of tracks with a defined score."""
        return {
            stem: {metric: _aggregate(self.values(stem, metric)) for metric in METRICS}
            for stem in self.stems
        }

    def table(self) -> str:
        """Format the scores for a terminal, one row per stem: of several tracks median and mean."""
        columns = [m for m in METRICS if any(self.values(stem, m) for stem in self.stems)]
        has_several = any(len(self.values(stem, m)) > 1 for stem in self.stems for m in columns)
        kinds = ("median", "mean") if has_several else ("median",)
        titles = (f"{m} {kind}" if has_several else m for m in columns for kind in kinds)
        rows = [["stem", "tracks", *titles]]
        for stem, metrics in self.summary().items():
            cells = [_format_cell(metrics[m][kind]) for m in columns for kind in kinds]
            rows.append([stem, str(metrics["sdr"]["tracks"]), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )

    def json(self) -> str:
        """Format the summary and the scores of every track as JSON."""
        tracks = [score.to_row() for score in self.scores]
        return json.dumps({"summary": self.summary(), "tracks": tracks}, indent=1)

    def html(self) -> str:
        """Format the scores as a page: a boxplot of the SDR per stem, and all numbers."""
        from demucs_infer.pictures import draw_boxplot, make_page, make_table

        titles = {
            "sdr": "SDR in dB, one dot per track",
            "fullness": "Fullness, 0 to 100",
            "bleedless": "Bleedless, 0 to 100",
        }
        parts = [
            draw_boxplot({stem: self.values(stem, metric) for stem in self.stems}, title)
            for metric, title in titles.items()
        ]
        rows = [
            [score.track, score.stem, *(_format_cell(score.to_row()[m]) for m in METRICS)]
            for score in self.scores
        ]
        return make_page("Scores", [*parts, make_table(["track", "stem", *METRICS], rows)])

    def csv(self) -> str:
        """Format the scores of every track as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["track", "stem", *METRICS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(score.to_row() for score in self.scores)
        return text.getvalue()


def _aggregate(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        return {"median": None, "mean": None, "tracks": 0}
    return {
        "median": _round_finite(median(values)),
        "mean": _round_finite(fmean(values)),
        "tracks": len(values),
    }


def _format_cell(value: float | str | None) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else value or "-"


def evaluate(
    references: str | Path,
    estimates: str | Path | Callable[[Tensor, int], Mapping[str, Tensor]],
    *,
    stems: Sequence[str] | None = None,
    framewise: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score a folder of tracks, `ROOT/track/stem.wav` or `ROOT/stem.wav` for one track.

    `estimates` is a folder of the same layout, or a function that gets the mixture (C, T) and its
    sample rate and returns the stems. The mixture is the track's `mixture` or `mix` file, or else
    the sum of its stems. One track is in memory at a time. `stems` selects the stems to score
    (default: all of the references); `progress` is called with every track's name. Raises
    `ConfigError` if the folders or their signals do not match.
    """
    scores: list[Score] = []
    for name, folder in _find_tracks(Path(references)):
        if progress is not None:
            progress(name)
        files = _find_stem_files(folder, stems)
        truth, rate = _read_all(files)
        if callable(estimates):
            guess = dict(estimates(_read_mixture(folder, truth), rate))
        else:
            guess = _read_estimates(Path(estimates), name, files, rate)
        for stem in truth.keys() & guess.keys():
            if truth[stem].shape != guess[stem].shape:
                raise ConfigError(
                    f"{name}/{stem}: the reference has (channels, samples) "
                    f"{tuple(truth[stem].shape)}, the estimate {tuple(guess[stem].shape)}; "
                    "write the estimates in a lossless format, without padding."
                )
        scores += score(name, truth, guess, frames=rate if framewise else None, sample_rate=rate)
    return Evaluation(tuple(scores))


def _find_tracks(root: Path) -> list[tuple[str, Path]]:
    """Return (name, folder) of every track in `root`."""
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; expected ROOT/track/stem.wav.")
    tracks = [
        (path.name, path)
        for path in sorted(root.iterdir())
        if path.is_dir() and any(_list_audio_files(path))
    ]
    if not tracks and any(_list_audio_files(root)):
        return [(root.name, root)]
    if not tracks:
        raise ConfigError(f"{root} has no stems; expected ROOT/track/stem.wav.")
    return tracks


def _list_audio_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in _AUDIO_SUFFIXES)


def _find_stem_files(folder: Path, stems: Iterable[str] | None) -> dict[str, Path]:
    files = {
        path.stem: path for path in _list_audio_files(folder) if path.stem not in _MIXTURE_NAMES
    }
    requested = list(files) if stems is None else list(stems)
    missing = [stem for stem in requested if stem not in files]
    if missing or not requested:
        raise ConfigError(
            f"{folder} has no file for {', '.join(missing) or 'any stem'}; "
            f"available: {', '.join(files) or 'none'}."
        )
    return {stem: files[stem] for stem in requested}


def _read_estimates(root: Path, name: str, stems: Iterable[str], rate: int) -> dict[str, Tensor]:
    folder = root / name if (root / name).is_dir() else root
    if not folder.is_dir() or (folder is root and any(path.is_dir() for path in root.iterdir())):
        raise ConfigError(f"{root} has no folder {name!r}; expected the references' track names.")
    signals, estimate_rate = _read_all(_find_stem_files(folder, stems))
    if estimate_rate != rate:
        raise ConfigError(
            f"{folder} is at {estimate_rate} Hz, the references at {rate} Hz; resample one."
        )
    return signals


def _read(path: Path) -> tuple[Tensor, int]:
    reader = AudioReader(path)
    return torch.cat(list(reader.blocks()), -1), reader.info.sample_rate


def _read_all(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], int]:
    signals = {stem: _read(path) for stem, path in files.items()}
    rates = {rate for _, rate in signals.values()}
    shapes = {tuple(signal.shape) for signal, _ in signals.values()}
    if len(rates) > 1 or len(shapes) > 1:
        folder = next(iter(files.values())).parent
        raise ConfigError(
            f"the stems in {folder} differ: sample rates {sorted(rates)}, "
            f"(channels, samples) {sorted(shapes)}; expected one rate and one shape per track."
        )
    return {stem: signal for stem, (signal, _) in signals.items()}, rates.pop()


def _read_mixture(folder: Path, stems: Mapping[str, Tensor]) -> Tensor:
    mixtures = [path for path in _list_audio_files(folder) if path.stem in _MIXTURE_NAMES]
    if mixtures:
        return _read(mixtures[0])[0]
    files = _find_stem_files(folder, None)
    rest = {stem: path for stem, path in files.items() if stem not in stems}
    parts = [*stems.values(), *(_read(path)[0] for path in rest.values())]
    return torch.stack(parts).sum(0)
