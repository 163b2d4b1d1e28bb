"""The bundled model separates offline, by at least the measured improvements.

The held-out excerpt in `data/studio` is a song of `tools/studio` whose seed is not in the training
set.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demucs_infer import demo
from demucs_infer.api import Separator, save_audio
from demucs_infer.audio.reader import load_track
from demucs_infer.checkpoints import catalog
from demucs_infer.cli.main import main
from demucs_infer.metrics import evaluate, sdr
from demucs_infer.pretrained import get_model

STUDIO = Path(__file__).parents[1] / "data" / "studio"
STEMS = ("drums", "bass", "other", "vocals")
MEASURED = {  # decibels of SDR above the mixture's, in the order of `STEMS`
    "demo": (11.31, 11.42, 14.98, 16.04),
    "studio": (11.88, 10.27, 11.5, 13.88),
}
# Other processors sum in another order: much less than 1 dB. A defect costs much more.
MARGIN = 1.0


@pytest.fixture(scope="module")
def separator() -> Separator:
    return Separator("tiny", device="cpu", shifts=0, offline=True)


def compute_improvements(separator: Separator, stems: dict[str, Tensor], rate: int) -> list[float]:
    mix = sum(stems.values(), torch.zeros(()))
    estimates = separator.separate_tensor(mix, rate)[1]
    gains = []
    for name, stem in stems.items():
        reached, unmixed = sdr(stem, estimates[name]), sdr(stem, mix)
        assert reached is not None and unmixed is not None
        gains.append(reached - unmixed)
    return gains


def test_tiny_separates_the_demo_song(separator: Separator) -> None:
    song = demo.song(20, seed=0)
    stems = dict(zip(demo.STEMS, song.stems, strict=True))
    gains = compute_improvements(separator, stems, song.sample_rate)
    assert gains == pytest.approx(MEASURED["demo"], abs=MARGIN)


def test_tiny_separates_a_held_out_song(separator: Separator) -> None:
    def separate(mix: Tensor, rate: int) -> dict[str, Tensor]:
        return separator.separate_tensor(mix, rate)[1]

    reached = evaluate(STUDIO, separate)
    unmixed = evaluate(STUDIO, lambda mix, _: dict.fromkeys(STEMS, mix))
    gains = {}
    for after, before in zip(reached.scores, unmixed.scores, strict=True):
        assert after.sdr is not None and before.sdr is not None
        gains[after.stem] = after.sdr - before.sdr
    assert [gains[stem] for stem in STEMS] == pytest.approx(MEASURED["studio"], abs=MARGIN)


def test_stems_are_in_their_places(separator: Separator) -> None:
    """Every estimate correlates most with its own stem."""
    song = demo.song(6, seed=1)
    estimates = separator.separate_tensor(song.mix, song.sample_rate)[1]
    guesses = torch.stack([estimates[name] for name in demo.STEMS]).flatten(1)
    truth = song.stems.flatten(1)
    correlation = torch.corrcoef(torch.cat([truth, guesses]))[:4, 4:]
    assert correlation.argmax(0).tolist() == correlation.argmax(1).tolist() == [0, 1, 2, 3]
    assert bool((correlation.diagonal() > 0.7).all())  # unrelated stems are at 0.1 at most


@pytest.mark.parametrize("left", [1, 56, 2048, 2049])
def test_last_window_of_any_length(separator: Separator, left: int) -> None:
    """A window shorter than half a frame is too short to be padded by reflection."""
    stride = round(0.75 * float(separator.model.segment) * separator.samplerate)  # type: ignore[arg-type]
    song = torch.randn(2, stride + left, generator=torch.Generator().manual_seed(0)) / 8
    stems = separator.run(song)
    for stem in stems.outputs.values():
        assert stem.shape == song.shape
        assert torch.isfinite(stem).all()


def test_file_matches_the_catalog_and_is_small() -> None:
    entry = catalog.load_catalog().files("tiny")[0]
    assert entry.is_bundled
    data = entry.path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry.sha256
    assert len(data) == entry.size
    assert len(data) < 8e6  # it is part of every wheel
    card = importlib.resources.files("demucs_infer").joinpath("tiny.md").read_text("utf-8")
    assert "synthetic music" in card


def test_weights_are_finite_float32() -> None:
    network = get_model("tiny", offline=True)
    weights = [weight for _, weight in network.named_parameters()]
    assert all(
        bool(weight.isfinite().all()) and weight.dtype == torch.float32 for weight in weights
    )
    assert sum(weight.numel() for weight in weights) < 4e6


@pytest.fixture(scope="module")
def song_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight seconds of the demo song to a file."""
    song = demo.song(8, seed=0)
    path = tmp_path_factory.mktemp("song") / "song.wav"
    save_audio(song.mix, path, song.sample_rate, as_float=True)
    return path


def score_files(files: Mapping[str, Path]) -> dict[str, float]:
    """Return the SDR of stems in files, `no_vocals` among them; silence would have 0 dB."""
    song = demo.song(8, seed=0)
    truth = dict(zip(demo.STEMS, song.stems, strict=True))
    truth["no_vocals"] = song.mix - truth["vocals"]
    scores = {}
    for name, path in files.items():
        reached = sdr(truth[name], load_track(path, 2, song.sample_rate))
        assert reached is not None
        scores[name] = reached
    return scores


@pytest.mark.parametrize("flags", ["", "--two-stems vocals", "--stems drums --flac"])
def test_command_reaches_scores(song_file: Path, flags: str) -> None:
    out = song_file.parent / f"out{len(flags)}"
    words = [str(song_file), "-n", "tiny", "-d", "cpu", "--offline", "-q", "-o", str(out)]
    assert main([*words, *flags.split()]) == 0
    files = {path.stem: path for path in (out / "tiny/song").glob("*.[wf]*")}
    scores = score_files(files)
    assert scores and all(score > 4 for score in scores.values()), scores


def test_separate_to_reaches_scores(separator: Separator, song_file: Path) -> None:
    done = separator.separate_to(song_file, song_file.parent / "streamed")
    assert all(score > 4 for score in score_files(done.paths).values())


def test_server_reaches_scores(song_file: Path, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from demucs_infer.server import ServerSettings, create_app

    settings = ServerSettings(data_dir=tmp_path / "data", models=("tiny",), devices=("cpu",))
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        headers = {"accept": "audio/flac"}
        answer = client.post(
            "/v1/separate?stems=vocals&model=tiny", content=song_file.read_bytes(), headers=headers
        )
    assert answer.status_code == 200, answer.text
    (tmp_path / "vocals.flac").write_bytes(answer.content)
    assert score_files({"vocals": tmp_path / "vocals.flac"})["vocals"] > 4
