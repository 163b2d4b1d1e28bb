"""Test that networks of the community give the stems of their own tool.

pymss is the other implementation of that tool's separation: it has networks and overlap-add of its
own, and reads the same files.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import demucs
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from demucs_infer import CheckpointError, Config, ConfigError, ModelLoadingError, Separator
from demucs_infer.cli.main import main
from demucs_infer.custom.build import load_network
from demucs_infer.engine.pipeline import Block, TensorTrack
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import write_song
from tests.helpers.community import CONFIGS, RARE_CONFIGS, decibels, write_files
from tests.helpers.oracles import import_oracle, require_module


@pytest.fixture(scope="module")
def pymss() -> Iterator[Any]:
    """Return the other implementation, which leaves upstream's package without a path."""
    path = demucs.__path__
    yield import_oracle("pymss")
    demucs.__path__ = path


def silent_logger() -> Any:
    import logging

    logger = logging.getLogger("tests.pymss")
    logger.propagate = False
    return logger


@pytest.mark.filterwarnings("ignore:A window was not provided")  # by the other implementation
@pytest.mark.parametrize("kind", CONFIGS)
def test_stems_are_those_of_the_other_implementation(kind: str, pymss: Any, tmp_path: Path) -> None:
    config, checkpoint = write_files(CONFIGS[kind], tmp_path)
    other = pymss.MSSeparator(
        "auto", str(checkpoint), str(config), device="cpu", store_dirs={}, logger=silent_logger()
    )
    separator = Separator.from_pretrained(config=config, checkpoint=checkpoint)
    chunk = round(separator.model.segment * 44100)
    for length in (44100, chunk, round(3.3 * chunk)):
        for channels in (1, 2):
            track = make_noise(channels, length)
            expected = other.separate(track.numpy(), pbar=False)
            actual = separator.run(track, sample_rate=44100).stems
            assert set(actual) == set(expected)
            for name, stem in expected.items():
                # A stem of a mono track is the mean of its two channels there.
                mine = actual[name].mean(0, keepdim=True) if channels == 1 else actual[name]
                assert decibels(torch.from_numpy(stem.T), mine) >= 110


@pytest.mark.parametrize("kind", RARE_CONFIGS)
def test_stems_of_rare_types_are_those_of_the_other_implementation(
    kind: str, pymss: Any, tmp_path: Path
) -> None:
    config, checkpoint = write_files(RARE_CONFIGS[kind], tmp_path)
    other = pymss.MSSeparator(
        "auto", str(checkpoint), str(config), device="cpu", store_dirs={}, logger=silent_logger()
    )
    separator = Separator.from_pretrained(config=config, checkpoint=checkpoint)
    assert separator.audio_channels == 2
    for channels in (1, 2):
        track = make_noise(channels, 20_000)
        expected = other.separate(track.numpy(), pbar=False)
        actual = separator.run(track, sample_rate=44100).stems
        assert set(actual) == set(expected)
        for name, stem in expected.items():
            mine = actual[name].mean(0, keepdim=True) if channels == 1 else actual[name]
            if kind == "bandit":  # the other implementation has the mask of the first for both
                stem, mine = stem[:, :1], mine[:1]
            assert decibels(torch.from_numpy(stem.T), mine) >= 110


@pytest.mark.parametrize("kind", ["bandit", "bandit_v2"])
def test_channels_of_bandit_are_separated_one_by_one(kind: str, tmp_path: Path) -> None:
    require_module("pymss_core")
    config, checkpoint = write_files(RARE_CONFIGS[kind], tmp_path)
    separator = Separator.from_pretrained(config=config, checkpoint=checkpoint)
    track = make_noise(2, 10_000)
    together = separator.run(track, sample_rate=44100).stems
    for channel in range(2):
        alone = separator.run(track[channel : channel + 1], sample_rate=44100).stems
        for name, stem in together.items():
            assert decibels(alone[name][0], stem[channel]) >= 110


KIND = "bs_roformer, one target"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    require_module("pymss_core")
    return write_files(CONFIGS[KIND], tmp_path_factory.mktemp("files"))


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": weight for name, weight in state.items()}


FORMS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "bare": (".th", lambda state: state),
    "state_dict, as Lightning saves it": (
        ".ckpt",
        lambda state: {"epoch": 3, "state_dict": add_prefix(state, "model.")},
    ),
    "model_state_dict": (".pt", lambda state: {"model_state_dict": add_prefix(state, "module.")}),
    "model": (".ckpt", lambda state: {"model": add_prefix(state, "net.")}),
    "state, compiled": (".ckpt", lambda state: {"state": add_prefix(state, "_orig_mod.module.")}),
    "safetensors": (".safetensors", lambda state: state),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_is_unwrapped(form: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    config, checkpoint = files
    state = torch.load(checkpoint, weights_only=True)
    suffix, wrap = FORMS[form]
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({name: weight.clone() for name, weight in state.items()}, path)
    else:
        torch.save(wrap(state), path)
    network = load_network(Config.from_file(config), path)
    loaded = network.model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in state.items())


def test_half_precision_is_loaded_as_float32(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, checkpoint = files
    state = torch.load(checkpoint, weights_only=True)
    torch.save({name: weight.half() for name, weight in state.items()}, tmp_path / "half.ckpt")
    loaded = load_network(Config.from_file(config), tmp_path / "half.ckpt").model.state_dict()
    assert all(torch.equal(loaded[name], weight.half().float()) for name, weight in state.items())


def test_other_weights_are_one_clear_error(files: tuple[Path, Path], tmp_path: Path) -> None:
    config = Config.from_file(files[0], ["model.depth=2"])
    with pytest.raises(CheckpointError, match="its weights do not match the network: .* missing"):
        load_network(config, files[1])
    with pytest.raises(ConfigError, match="BS-RoFormer cannot be built from these values: .*band"):
        load_network(Config.from_file(files[0], ["model.freqs_per_bands=[1,2]"]), files[1])


def test_network_larger_than_its_file_is_not_built(files: tuple[Path, Path]) -> None:
    config = Config.from_file(files[0], ["model.dim=1000000", "model.depth=1000"])
    with pytest.raises(CheckpointError, match="too small for this network"):
        load_network(config, files[1])


def test_missing_library_is_named(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymss_core", None)
    with pytest.raises(ModelLoadingError, match="pip install 'pymss-core>="):
        Config.from_file(files[0])


def test_memory_does_not_grow_with_the_track(files: tuple[Path, Path]) -> None:
    config, checkpoint = files
    separator = Separator.from_pretrained(config=config, checkpoint=checkpoint)
    held = []
    for event in separator.stream_blocks(TensorTrack(make_noise(2, 30 * 8820))):
        if isinstance(event, Block):
            held.append(event.stems.shape[-1])
    assert max(held) <= 8820 and sum(held) == 30 * 8820


def test_bytes_do_not_depend_on_jobs(files: tuple[Path, Path]) -> None:
    config, checkpoint = files
    cores = torch.get_num_threads()  # from here on, each window has one thread
    track = make_noise(2, 44100)
    first, second = (
        Separator.from_pretrained(config=config, checkpoint=checkpoint, jobs=jobs)
        .run(track, sample_rate=44100)
        .stems
        for jobs in (cores, 2 * cores)
    )
    assert all(torch.equal(stem, second[name]) for name, stem in first.items())


@pytest.mark.filterwarnings("ignore:precision='bf16' is slower", "ignore:A window was not provided")
@pytest.mark.parametrize("kind", CONFIGS)
def test_stems_in_bf16_are_close(kind: str, tmp_path: Path) -> None:
    require_module("pymss_core")
    config, checkpoint = write_files(CONFIGS[kind], tmp_path)
    track = make_noise(2, 10_000)
    exact, rounded = (
        Separator.from_pretrained(config=config, checkpoint=checkpoint, precision=precision)
        .run(track, sample_rate=44100)
        .stems
        for precision in ("fp32", "bf16")
    )
    assert not all(torch.equal(stem, rounded[name]) for name, stem in exact.items())
    for name, stem in exact.items():
        assert decibels(stem, rounded[name]) >= 40


def test_command_writes_both_stems(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, checkpoint = files
    monkeypatch.chdir(tmp_path)
    write_song(tmp_path / "song.wav", 1)
    words = ["song.wav", "--config", str(config), "--checkpoint", str(checkpoint), "-q"]
    assert main([*words, "--model-type", "bs_roformer"]) == 0
    folder = tmp_path / "separated/model/song"
    assert {path.name for path in folder.iterdir()} == {"vocals.wav", "other.wav", "stems.json"}
    for stem in ("vocals", "other"):
        assert main([*words, "--stems", stem, "-o", stem]) == 0
        assert [path.stem for path in Path(stem, "model/song").glob("*.wav")] == [stem]
    with pytest.raises(SystemExit):
        main([*words, "--model-type", "swin_upernet"])
