"""Test that a stem is separated again by a second model, in one run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demucs_infer import ModelLoadingError, Separator
from demucs_infer.batch.chain import ChainedModelSpec, ChainedSeparator
from demucs_infer.batch.request import ModelSpec
from demucs_infer.cli.main import main
from demucs_infer.engine.pipeline import Block, TensorTrack
from demucs_infer.events import ChunkProcessed, TrackFailed, TrackFinished
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import RATE, make_repo, write_song

FIRST, SECOND = "4f2b8e3d", "1c7e5a90"
NAMES = ("bass", "other", "vocals", "drums", "drums_bass", "drums_other", "drums_vocals")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("chain") / "models")


@pytest.fixture(scope="module")
def separators(repo: Path) -> tuple[Separator, Separator]:
    return Separator(FIRST, repo, device="cpu"), Separator(SECOND, repo, device="cpu")


def collect(chain: ChainedSeparator, track: Any) -> tuple[Tensor, list[Any]]:
    """Return the samples of all stems, and the other items."""
    items = [item for _, item in chain.stream_blocks_many([track])]
    blocks = [item for item in items if isinstance(item, Block)]
    return torch.cat([block.stems for block in blocks], dim=-1), items


def test_stems_are_those_of_two_runs(separators: tuple[Separator, Separator]) -> None:
    first, second = separators
    chain = ChainedSeparator(first, second, "drums")
    assert chain.stems == NAMES
    mix = make_noise(2, 2 * RATE)
    stems, items = collect(chain, TensorTrack(mix))
    outer = first.run(mix, sample_rate=RATE).stems
    inner = second.run(outer["drums"], sample_rate=RATE).stems
    expected = [outer[name] for name in NAMES[:3]] + list(inner.values())
    assert torch.equal(stems, torch.stack(expected))
    assert isinstance(items[-1], TrackFinished)
    fractions = [item.fraction for item in items if isinstance(item, ChunkProcessed)]
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_interrupted_track_is_continued(separators: tuple[Separator, Separator]) -> None:
    chain = ChainedSeparator(*separators, "drums", keeps_stem=True)
    assert chain.stems[:4] == ("drums", "bass", "other", "vocals")
    assert chain.stems[4:] == ("drums_drums", "drums_bass", "drums_other", "drums_vocals")
    mix = make_noise(2, 3 * RATE)
    whole, _ = collect(chain, TensorTrack(mix))

    class Rest:
        channels, length, first = 2, mix.shape[-1], 11_000

        def blocks(self) -> Any:
            return iter([mix])

    rest, _ = collect(chain, Rest())
    assert torch.equal(rest, whole[..., 11_000:])


def test_bad_track_does_not_stop_the_others(separators: tuple[Separator, Separator]) -> None:
    chain = ChainedSeparator(*separators, "drums")
    tracks = [OSError("gone"), TensorTrack(torch.zeros(2, 0)), TensorTrack(make_noise(2, RATE))]
    last = dict(chain.stream_blocks_many(tracks))
    assert [type(last[index]) for index in range(3)] == [TrackFailed, TrackFailed, TrackFinished]


def test_mistakes_are_named(separators: tuple[Separator, Separator]) -> None:
    with pytest.raises(ValueError, match="no stem 'piano' to separate again: choose one of drums"):
        ChainedSeparator(*separators, "piano")
    with pytest.raises(ModelLoadingError, match="differ in samplerate: 8000 and 44100"):
        ChainedSeparator(separators[0], Separator("tiny"), "drums")


def test_key_of_a_result_depends_on_both_models(repo: Path) -> None:
    first, second = (ModelSpec(name=name, repo=repo) for name in (FIRST, SECOND))
    keys = {
        ChainedModelSpec(name="chain", first=a, second=b, stem=stem).weights()
        for a, b in ((first, second), (second, first), (first, first))
        for stem in ("drums", "bass")
    }
    assert len(keys) == 6


def test_command_writes_the_stems_of_the_stem_instead(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_song(tmp_path / "song.wav", 1)
    monkeypatch.chdir(tmp_path)
    words = ["song.wav", "--repo", str(repo), "-n", FIRST, "--then", f"drums={SECOND}"]
    assert main([*words, "-q"]) == 0
    folder = tmp_path / f"separated/{FIRST}-then-{SECOND}/song"
    assert {path.stem for path in folder.glob("*.wav")} == set(NAMES)
    assert main([*words, "-q", "--stems", "vocals,drums", "-o", "kept"]) == 0
    folder = tmp_path / f"kept/{FIRST}-then-{SECOND}/song"
    names = {"vocals", "drums", "drums_drums", "bass", "other", "drums_vocals"}
    assert {path.stem for path in folder.glob("*.wav")} == names
    capsys.readouterr()
    assert main([*words[:-1], "drums", "-q"]) != 0
    assert "expected STEM=MODEL" in capsys.readouterr().err
