"""Test that a bag may have any networks: stems by name, each with its own windows and level."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demucs_infer import CheckpointError, Separator
from demucs_infer.apply import BagOfModels
from demucs_infer.cli.main import main
from demucs_infer.engine.network import Ensemble
from demucs_infer.engine.pipeline import Block
from tests.engine.test_spectral import choose_whole
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import make_repo, write_song
from tests.helpers.community import CONFIGS, decibels, write_files
from tests.helpers.oracles import import_oracle, require_module

KINDS = ("bs_roformer, one target", "scnet, two stems", "mel_band_roformer, two stems")
STEMS = ("vocals", "other")


@dataclass
class Excerpt:
    """A track of which only the samples from `first` on are separated."""

    samples: Tensor
    first: int
    channels = 2

    def blocks(self) -> Iterator[Tensor]:
        yield self.samples


@pytest.fixture(scope="module")
def separators(tmp_path_factory: pytest.TempPathFactory) -> list[Separator]:
    require_module("pymss_core")
    folder = tmp_path_factory.mktemp("networks")
    files = [write_files(CONFIGS[kind], folder, f"n{i}") for i, kind in enumerate(KINDS)]
    return [Separator.from_pretrained(config=c, checkpoint=w) for c, w in files]


def separate_each(separators: list[Separator], track: Tensor) -> list[dict[str, Tensor]]:
    """Return what each network separates by itself, without the derived stem of the first."""
    outputs = [separator.run(track, sample_rate=44100).stems for separator in separators]
    return [{"vocals": outputs[0]["vocals"]}, *outputs[1:]]


@pytest.mark.parametrize("combine", ["mean", "median", "min", "max"])
def test_combination_is_that_of_whole_stems(combine: str, separators: list[Separator]) -> None:
    ensemble = import_oracle("pymss.ensemble")
    track = make_noise(2, 30_000)
    outputs = separate_each(separators, track)
    bag = BagOfModels([s.model for s in separators], stems=STEMS, combine=combine)
    together = Separator.from_model(bag, shifts=0).run(track, sample_rate=44100).stems
    algorithms = {"mean": "avg_wave", "median": "median_wave"}
    for stem in STEMS:
        values = [output[stem] for output in outputs if stem in output]
        if combine in algorithms:
            waves = [value.numpy() for value in values]
            wave = ensemble.average_waveforms(waves, algorithm=algorithms[combine])
            expected = torch.from_numpy(wave)
        else:
            expected = choose_whole(torch.stack(values), combine)
        assert decibels(expected, together[stem]) >= 110


def test_choice_of_bins_is_the_same_from_within_the_track(separators: list[Separator]) -> None:
    bag = BagOfModels([s.model for s in separators], stems=STEMS, combine="min")
    samples = make_noise(2, 60_000)
    whole = Separator.from_model(bag, shifts=0).run(samples, sample_rate=44100).stems
    for gate in (False, True):
        separator = Separator.from_model(bag, shifts=0, gate=gate)
        events = separator.stream_blocks(Excerpt(samples, first=40_001))
        blocks = [event for event in events if isinstance(event, Block)]
        assert blocks[0].start == 40_001
        part = torch.cat([block.stems for block in blocks], dim=-1)
        for stem, name in enumerate(STEMS):
            assert torch.equal(part[stem], whole[name][:, 40_001:])


def test_weights_are_per_network_and_stem(separators: list[Separator]) -> None:
    track = make_noise(2, 20_000)
    first, second, _ = separate_each(separators, track)
    models = [separator.model for separator in separators[:2]]
    bag = BagOfModels(models, [[3, 0], [1, 2]], stems=STEMS)
    together = Separator.from_model(bag, shifts=0).run(track, sample_rate=44100).stems
    assert decibels((3 * first["vocals"] + second["vocals"]) / 4, together["vocals"]) >= 110
    assert decibels(second["other"], together["other"]) >= 110


def test_network_without_a_requested_stem_does_not_run(separators: list[Separator]) -> None:
    calls: list[str] = []
    models = [separator.model for separator in separators[:2]]
    hooks = [
        model.model.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, model in zip(("first", "second"), models)
    ]
    bag = BagOfModels(models, stems=STEMS)
    Separator.from_model(bag, shifts=0, stems=["other"]).run(make_noise(2, 9000))
    for hook in hooks:
        hook.remove()
    assert set(calls) == {"second"}


def test_mistakes_are_named(separators: list[Separator]) -> None:
    models: Any = [separator.model for separator in separators[:2]]
    with pytest.raises(ValueError, match="differ in sources"):
        BagOfModels(models)
    with pytest.raises(ValueError, match="has the weight 1 for 'other', which it does not"):
        BagOfModels(models, [[1, 1], [1, 1]], stems=STEMS)
    with pytest.raises(ValueError, match="combine = 'best' must be one of mean, median"):
        Ensemble(tuple(models[1:]), combine="best")
    with pytest.raises(ValueError, match="the weights of stem 'drums' add up to 0"):
        BagOfModels(models, stems=("vocals", "drums"))


@pytest.mark.filterwarnings("ignore:A window was not provided")
def test_bag_file_may_mix_networks_of_all_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_module("pymss_core")
    repo = make_repo(tmp_path / "models")
    signature = next(path.stem for path in sorted(repo.glob("*.th")))
    config = {**CONFIGS["bs_roformer, one target"]}
    write_files({**config, "audio": {**config["audio"], "sample_rate": 8000}}, repo, "singer")
    (repo / "both.yaml").write_text(
        f"models: [{signature.partition('-')[0]}, singer]\n"
        "stems: [drums, bass, other, vocals]\n"
        "weights: [[1, 1, 1, 1], [0, 0, 0, 2]]\n"
    )
    write_song(tmp_path / "song.wav", 1)
    monkeypatch.chdir(tmp_path)
    assert main(["song.wav", "--repo", "models", "-n", "both", "-q"]) == 0
    written = {path.stem for path in (tmp_path / "separated/both/song").glob("*.wav")}
    assert written == {"drums", "bass", "other", "vocals"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("stems: vocals", "`stems` that are not a list"),
        ("stems: [a, a]", "`stems` that are not a list of different names"),
        ("combine: best", "combine = 'best': it must be mean, median, min or max"),
    ],
)
def test_mistakes_in_a_bag_file_are_named(lines: str, message: str, tmp_path: Path) -> None:
    from demucs_infer.repo import read_bag

    (tmp_path / "bag.yaml").write_text(f"models: [a, b]\n{lines}\n")
    with pytest.raises(CheckpointError, match=message):
        read_bag(tmp_path / "bag.yaml")
