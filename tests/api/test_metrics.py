"""Metrics: closed forms, museval, upstream's evaluation, and folders of files."""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import museval
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from demucs_infer import metrics
from demucs_infer.errors import ConfigError

RATE = 8000


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sdr_of_half_the_stem_is_six_decibels() -> None:
    stem = noise(2, RATE)
    # The error is s/2, so the ratio is 4; delta is 1e-9 of these energies.
    assert metrics.sdr(stem, 0.5 * stem) == pytest.approx(20 * math.log10(2), abs=1e-6)
    assert metrics.snr(stem, 0.5 * stem) == pytest.approx(6.0206, abs=1e-4)


def test_delta_bounds_perfect_and_faint_estimates() -> None:
    stem = noise(2, RATE)
    energy = float(stem.double().square().sum())
    assert metrics.sdr(stem, stem) == pytest.approx(10 * math.log10((energy + 1e-7) / 1e-7))
    assert metrics.snr(stem, stem) == math.inf
    faint = torch.full((2, 50), 1e-5)  # energy 1e-8: (1e-8 + 1e-7) / (4e-8 + 1e-7)
    assert metrics.sdr(faint, -faint) == pytest.approx(10 * math.log10(1.1 / 1.4), abs=1e-5)


def test_si_sdr_of_orthogonal_noise_is_independent_of_level() -> None:
    time = torch.arange(RATE) / RATE
    stem = torch.sin(2 * math.pi * 100 * time).expand(2, -1)
    other = 0.1 * torch.cos(2 * math.pi * 100 * time).expand(2, -1)
    for level in (1.0, 0.01, -3.0):
        # A tenth of the amplitude is a hundredth of the power; float32 sines, whole periods.
        assert metrics.si_sdr(stem, level * (stem + other)) == pytest.approx(20, abs=1e-3)
    assert metrics.sdr(stem, stem + other) == pytest.approx(20, abs=1e-3)
    assert metrics.si_sdr(stem, torch.zeros_like(stem)) == -math.inf


@pytest.mark.parametrize("metric", [metrics.sdr, metrics.snr, metrics.si_sdr])
def test_silent_stem_has_no_score(metric) -> None:
    assert metric(torch.zeros(2, 100), noise(2, 100)) is None


@pytest.mark.parametrize("metric", [metrics.sdr, metrics.snr, metrics.si_sdr, metrics.frame_sdr])
def test_different_shapes_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"\(2, 100\).*\(1, 100\)"):
        metric(noise(2, 100), noise(1, 100))


def load_upstream_sdr() -> Callable[[Tensor, Tensor], Tensor]:
    """Extract it from the source: the module imports a training framework that is not installed."""
    spec = importlib.util.find_spec("demucs")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "evaluate.py").read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "new_sdr"]
    scope: dict[str, Any] = {"th": torch}
    exec(compile(tree, "evaluate.py", "exec"), scope)
    return scope["new_sdr"]


def test_sdr_equals_upstream() -> None:
    new_sdr = load_upstream_sdr()
    truth, guess = noise(4, 2, RATE), noise(4, 2, RATE, seed=1)
    guess = truth + torch.tensor([0.01, 0.3, 1.0, 3.0])[:, None, None] * guess
    expected = new_sdr(truth[None].double(), guess[None].double())[0]
    scores = [metrics.sdr(*pair) for pair in zip(truth, guess, strict=True)]
    assert scores == pytest.approx(expected.tolist(), abs=1e-9)  # the same sums in double precision


@pytest.mark.parametrize("length", [3 * RATE, 3 * RATE + 17, RATE // 2])
@pytest.mark.parametrize("hop", [RATE, RATE // 2])
def test_frame_sdr_equals_museval(length: int, hop: int) -> None:
    truth, guess = noise(2, 2, length), noise(2, 2, length, seed=1)
    guess = truth.roll(3, -1) + 0.5 * guess
    expected, *_ = museval.evaluate(
        truth.transpose(1, 2).double().numpy(),
        guess.transpose(1, 2).double().numpy(),
        win=RATE,
        hop=hop,
    )
    scores = metrics.frame_sdr(truth, guess, window=RATE, hop=hop)
    # museval reaches the same error as a sum of projections: rounding of 512-tap filters.
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-6)


def test_frames_with_a_silent_stem_are_nan_as_in_museval() -> None:
    truth, guess = noise(2, 2, 4 * RATE), noise(2, 2, 4 * RATE, seed=1)
    truth[0, :, RATE : 2 * RATE] = 0
    guess[1, :, 2 * RATE : 3 * RATE] = 0
    expected, *_ = museval.evaluate(
        truth.transpose(1, 2).double().numpy(),
        guess.transpose(1, 2).double().numpy(),
        win=RATE,
        hop=RATE,
    )
    scores = metrics.frame_sdr(truth, guess, window=RATE)
    assert scores.isnan().tolist() == [[False, True, True, False]] * 2
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-6)  # as above
    scored = metrics.score("t", {"a": truth[0]}, {"a": guess[0]}, frames=RATE)[0].frame_sdr
    alone = metrics.frame_sdr(truth[:1], guess[:1], window=RATE)
    assert scored == pytest.approx(float(np.nanmedian(alone.numpy())))


def write(folder: Path, **stems: Tensor) -> Path:
    folder.mkdir(parents=True)
    for stem, signal in stems.items():
        soundfile.write(folder / f"{stem}.wav", signal.T.numpy(), RATE, subtype="FLOAT")
    return folder


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    for seed, track in enumerate(("one", "two")):
        bass = noise(2, 2 * RATE, seed=seed)
        write(tmp_path / "truth" / track, bass=bass, vocals=bass.roll(5) * (track == "one"))
    return tmp_path / "truth"


def test_evaluate_scores_folders_with_null_for_silence(truth: Path, tmp_path: Path) -> None:
    for track, factor in (("one", 0.5), ("two", 0.9)):
        read = {p.stem: torch.from_numpy(soundfile.read(p)[0].T) for p in (truth / track).glob("*")}
        write(tmp_path / "guess" / track, **{stem: factor * s for stem, s in read.items()})
    report = metrics.evaluate(truth, tmp_path / "guess", framewise=True)
    assert [(score.track, score.stem) for score in report.scores] == [
        (track, stem) for track in ("one", "two") for stem in ("bass", "vocals")
    ]
    data = json.loads(report.json())
    bass, vocals = data["summary"]["bass"], data["summary"]["vocals"]
    # Errors of s/2 and s/10: 6.0206 dB and 20 dB, each also in every frame; four decimals kept.
    assert bass["sdr"] == pytest.approx({"median": 13.0103, "mean": 13.0103, "tracks": 2}, abs=1e-3)
    assert data["tracks"][0]["frame_sdr"] == pytest.approx(6.0206, abs=1e-3)
    assert vocals["sdr"] == pytest.approx({"median": 6.0206, "mean": 6.0206, "tracks": 1}, abs=1e-3)
    assert data["tracks"][3]["sdr"] is None
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert (rows[3]["track"], rows[3]["stem"], rows[3]["sdr"]) == ("two", "vocals", "")
    lines = report.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:4] == ["bass", "2", "13.01", "13.01"]


def test_evaluate_gives_a_function_the_mixture_and_its_rate(truth: Path) -> None:
    calls: list[tuple[Tensor, int]] = []

    def separate(mix: Tensor, sample_rate: int) -> dict[str, Tensor]:
        calls.append((mix, sample_rate))
        return {"bass": mix, "vocals": mix, "drums": mix}

    tracks: list[str] = []
    report = metrics.evaluate(truth, separate, stems=["bass"], progress=tracks.append)
    assert tracks == ["one", "two"]
    assert report.stems == ["bass"]
    stems = [torch.from_numpy(soundfile.read(p)[0].T) for p in (truth / "one").iterdir()]
    # The mix is the sum of all stems, scored or not; float32 sums.
    torch.testing.assert_close(calls[0][0].double(), sum(stems), rtol=0, atol=1e-6)
    assert calls[0][1] == RATE
    assert report.scores[1].sdr == pytest.approx(10 * math.log10(320 / 1e-7), abs=0.2)


def test_evaluate_prefers_a_mixture_file_to_the_sum(tmp_path: Path) -> None:
    mix = noise(1, 100)
    folder = write(tmp_path / "song", bass=noise(1, 100, seed=2), mixture=mix)
    mixtures: list[Tensor] = []

    def separate(mix: Tensor, sample_rate: int) -> dict[str, Tensor]:
        mixtures.append(mix)
        return {"bass": mix}

    report = metrics.evaluate(folder, separate)
    assert torch.equal(mixtures[0], mix)
    assert [(score.track, score.stem) for score in report.scores] == [("song", "bass")]


def test_mismatched_folders_are_one_clear_error(truth: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder 'one'"):
        metrics.evaluate(truth, write(tmp_path / "a" / "b", bass=noise(2, 9)).parent)
    write(tmp_path / "c" / "one", bass=noise(2, 9), vocals=noise(2, 9))
    with pytest.raises(ConfigError, match=r"\(2, 16000\).*\(2, 9\)"):
        metrics.evaluate(truth, tmp_path / "c")
    with pytest.raises(ConfigError, match="no file for drums"):
        metrics.evaluate(truth, truth, stems=["drums"])
    with pytest.raises(ConfigError, match="not a folder"):
        metrics.evaluate(tmp_path / "none", truth)
    with pytest.raises(ConfigError, match="no estimate of vocals"):
        metrics.evaluate(truth, lambda mix, _: {"bass": mix})
