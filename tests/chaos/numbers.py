"""Separate odd signals, and compare with upstream's `apply_model` where it runs.

The outputs are finite and of the length of the input; NaN and infinity are refused or silenced;
what upstream computes is equal within class B: 100 dB.
"""

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from demucs_infer.api import Separator
from demucs_infer.errors import DemucsError
from tests.chaos.report import Limits, Report
from tests.chaos.scenarios import prepare
from tests.helpers.audio_signals import make_noise
from tests.helpers.batch_runs import MODEL
from tests.helpers.cli_process import RATE

CLASS_B = 100.0  # dB


def signals() -> Iterator[tuple[str, Tensor, int]]:
    """Yield names, signals (C T) and sample rates."""
    noise = make_noise(2, 2 * RATE + 7, 0) * 0.1
    time = torch.arange(2 * RATE) / RATE
    yield "noise", noise, RATE
    yield "silence", torch.zeros(2, RATE), RATE
    yield "constant", torch.full((2, RATE), 0.25), RATE
    yield (
        "constant of one channel",
        torch.stack([torch.full((RATE,), 0.5), torch.zeros(RATE)]),
        RATE,
    )
    yield "denormals", noise * 1e-40, RATE
    yield "tiny", noise * 1e-20, RATE
    yield "huge", noise * 1e7, RATE
    yield "clicks of 1e6", torch.zeros(2, RATE).index_fill(1, torch.tensor([100, 5000]), 1e6), RATE
    yield "opposite channels", torch.stack([noise[0], -noise[0]]), RATE
    yield "offset", noise + 10.0, RATE
    yield "sine", torch.sin(2 * math.pi * 440 * time).repeat(2, 1), RATE
    yield "impulse", torch.zeros(2, RATE).index_fill(1, torch.tensor([0]), 1.0), RATE
    for length in (1, 2, 3, 7, 97, 997, 7919, 8009):
        yield f"{length} samples", make_noise(2, length, length), RATE
    for rate in (11025, 16000, 22050, 44100, 48000, 96000, 192000, 384000):
        yield f"{rate} Hz", make_noise(2, rate // 2 + 1, 1), rate
    for channels in (1, 3, 6, 8, 64):
        yield f"{channels} channels", make_noise(channels, RATE, channels), RATE


def run(limits: Limits) -> Report:  # noqa: PLR0915 (a list of cases)
    """Separate every signal once."""
    from demucs.apply import apply_model
    from demucs.pretrained import get_model

    report = Report("numbers", limits.seed)
    torch.set_num_threads(1)
    top = Path(tempfile.mkdtemp(prefix="chaos-numbers-"))
    os.environ["DEMUCS_INFER_CACHE"] = str(top / "cache")
    decibels: dict[str, float | str] = {}
    try:
        prepare(top)
        oracle = get_model(MODEL, top / "repo")
        with (
            warnings.catch_warnings(),
            Separator(MODEL, top / "repo", device="cpu", shifts=0) as separator,
        ):
            warnings.simplefilter("ignore")
            for name, wav, rate in signals():
                try:
                    stems = separator.run(wav, sample_rate=rate)
                except DemucsError as error:
                    report.counts[f"refused: {name}"] += 1
                    if "expected" not in str(error):
                        report.find("refused", f"{name}: {error}")
                    continue
                ours = torch.stack([stems[source] for source in oracle.sources])
                report.counts["separated"] += 1
                if not torch.isfinite(ours).all():
                    report.find("not finite", name)
                if rate != RATE or wav.shape[0] != 2:
                    continue  # upstream converts in its own way
                if ours.shape[-1] != wav.shape[-1]:
                    report.find("length", f"{name}: {ours.shape[-1]} of {wav.shape[-1]}")
                theirs = _separate_as_upstream(apply_model, oracle, wav)
                decibels[name] = _compare(name, ours, theirs, report)
            for bad in (math.nan, math.inf, -math.inf):
                wav = make_noise(2, RATE, 0)
                wav[1, 77] = bad
                try:
                    stems = separator.run(wav, sample_rate=RATE)
                    report.counts["not finite, silenced"] += 1
                    if not all(torch.isfinite(stem).all() for stem in stems.values()):
                        report.find("not finite", str(bad))
                except (DemucsError, ValueError):
                    report.counts["not finite, refused"] += 1
    finally:
        shutil.rmtree(top, ignore_errors=True)
    report.figures["decibels to upstream"] = decibels
    report.figures["cases"] = sum(report.counts.values())
    return report


def _separate_as_upstream(apply_model: object, oracle: object, wav: Tensor) -> Tensor:
    """Do what upstream's command does: normalize by the mean of the channels, and undo it."""
    mono = wav.mean(0)
    scale = mono.std() + 1e-8
    normal = (wav - mono.mean()) / scale
    stems: Tensor = apply_model(oracle, normal[None], shifts=0, device="cpu")[0]  # type: ignore[operator]
    return stems * scale + mono.mean()


def _compare(name: str, ours: Tensor, theirs: Tensor, report: Report) -> float | str:
    if not torch.isfinite(theirs).all():
        report.counts["upstream gives NaN"] += 1
        return "upstream gives NaN"
    error = (ours - theirs).double().square().sum().item()
    power = theirs.double().square().sum().item()
    if error == 0:
        return "equal"
    level = 10 * math.log10(power / error) if power else -math.inf
    if (ours - theirs).abs().max() < 1e-12:
        report.counts["equal, but for less than 1e-12"] += 1
    elif "constant" in name:
        report.counts["known difference"] += 1  # docs/reliability.md
    elif level < CLASS_B:
        report.find("differs from upstream", f"{name}: {level:.1f} dB")
    return round(level, 1)
