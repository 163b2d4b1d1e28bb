"""Stems are scored against references, and scores are cached beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from demucs_infer.distributed.worker import TrackWorker
from tests.helpers.audio_signals import make_noise
from tests.helpers.batch_runs import MODEL, make_worker, row_of, sha256_of
from tests.helpers.cli_process import load, save, write_song
from tests.helpers.requests import make_request

# References of 1.1 times the stem: 20 log10(1.1 / 0.1).
SDR_OF_A_TENTH = pytest.approx(20.83, abs=0.05)


class ScoredSong:
    """A song that was separated, and references that differ from its drums by a tenth."""

    def __init__(self, worker: TrackWorker, folder: Path) -> None:
        self.worker = worker
        self.path = write_song(folder / "song.wav", 1)
        self.references = folder / "references"
        self.cache = folder / f"out/{MODEL}/song/scores.json"
        stems = self.run(references=None)["stems"]
        self.references.mkdir()
        for stem in ("drums", "vocals"):
            wav = torch.from_numpy(load(Path(stems[stem]))).T
            wav = 1.1 * wav if stem == "drums" else wav
            save(self.references / f"{stem}.wav", wav, subtype="FLOAT")

    def run(self, references: str | None = "", **more: Any) -> dict[str, Any]:
        folder = str(self.references) if references == "" else references
        return next(self.worker([row_of(self.path, references=folder, **more)]))


@pytest.fixture
def song(repo: Path, tmp_path: Path) -> ScoredSong:
    return ScoredSong(make_worker(repo, tmp_path / "out"), tmp_path)


def test_stems_with_references_are_scored_without_separating_again(song: ScoredSong) -> None:
    result = song.run()
    assert result["status"] == "skipped"
    assert result["scores"]["drums"] == SDR_OF_A_TENTH
    assert set(result["scores"]) == {"drums", "vocals"}


def test_scores_are_the_same_for_a_track_that_is_not_read(song: ScoredSong) -> None:
    assert song.run(sha256=sha256_of(song.path))["scores"] == song.run()["scores"]


def test_scores_are_cached_beside_the_stems(song: ScoredSong) -> None:
    assert song.run()["scores"] == json.loads(song.cache.read_text())["scores"]
    cached = json.loads(song.cache.read_text())
    cached["scores"]["drums"] = 1.0
    song.cache.write_text(json.dumps(cached))
    assert song.run()["scores"]["drums"] == 1.0


def test_malformed_cache_is_replaced(song: ScoredSong) -> None:
    scores = song.run()["scores"]
    key = json.loads(song.cache.read_text())["of"]
    for text in ("{", "[]", '{"of": 1}', json.dumps({"of": key}), "null"):
        song.cache.write_text(text)
        assert song.run()["scores"] == scores


def test_references_of_another_length_are_a_warning(song: ScoredSong) -> None:
    song.run()
    for file in song.references.iterdir():
        save(file, make_noise(2, 77), subtype="FLOAT")
    result = song.run()
    assert result["status"] == "skipped" and "not scored" in result["warnings"][0]


@pytest.mark.parametrize("references", ["nowhere://x", "a\0b", "a\ud800b", "/absent"], ids=ascii)
def test_unreachable_references_are_a_warning(song: ScoredSong, references: str) -> None:
    result = song.run(references=references)
    assert result["status"] == "skipped" and "not scored" in result["warnings"][0]


@pytest.mark.parametrize("has_older_stems", [False, True], ids=["new folder", "older stems"])
def test_only_stems_of_this_result_are_scored(
    repo: Path, tmp_path: Path, has_older_stems: bool
) -> None:
    """Not those of another song and another format in the same folder."""
    out, references = tmp_path / "out", tmp_path / "references"
    path = write_song(tmp_path / "song.wav", 1)
    older = next(make_worker(repo, out if has_older_stems else tmp_path / "x")([row_of(path)]))
    references.mkdir()
    for stem, file in older["stems"].items():
        (references / f"{stem}.wav").write_bytes(Path(file).read_bytes())
    write_song(path, 1, seed=5)
    worker = make_worker(repo, out, make_request(format="flac"))
    result = next(worker([row_of(path, references=str(references))]))
    assert result["status"] == "done" and max(result["scores"].values()) < 20
