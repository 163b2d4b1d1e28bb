"""Test that each mistake with the two files of a network of the community is one clear error."""

import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from demucs_infer import CheckpointError, ConfigError, ModelNotFound, Separator
from demucs_infer.cli.main import main
from demucs_infer.custom.community import choose_rules
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import load, write_song
from tests.helpers.community import CONFIGS, decibels, write_files
from tests.helpers.oracles import require_module

PAIR = "--config a.yaml --checkpoint a.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with two pairs, files that are none, and songs."""
    require_module("pymss_core")
    folder = tmp_path_factory.mktemp("mistakes")
    config, checkpoint = write_files(CONFIGS["bs_roformer, one target"], folder, "a")
    write_files(CONFIGS["mdx23c, two stems"], folder, "b")
    data = yaml.load(config.read_text("utf-8"), Loader=yaml.UnsafeLoader)
    for key in ("training", "model", "audio"):
        rest = {name: value for name, value in data.items() if name != key}
        (folder / f"no_{key}.yaml").write_text(yaml.dump(rest), "utf-8")
    (folder / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:50_000])
    (folder / "empty.ckpt").touch()
    for name in ("page.ckpt", "page.yaml"):
        (folder / name).write_text("<!DOCTYPE html>\n<html><body>Sign in</body></html>", "utf-8")
    (folder / "lfs.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    write_song(folder / "song.wav", 0.3, rate=44100)
    write_song(folder / "mono48.wav", 0.3, rate=48000, channels=1)
    (folder / "songs.txt").write_text("song.wav\n")
    return folder


MISTAKES = {
    "weights of another network": (
        "--config a.yaml --checkpoint b.ckpt",
        "is it the file for this configuration?",
    ),
    "weights that are cut": ("--config a.yaml --checkpoint cut.ckpt", "truncated file"),
    "empty weights": ("--config a.yaml --checkpoint empty.ckpt", "the file is empty"),
    "web page as weights": ("--config a.yaml --checkpoint page.ckpt", "it is a web page"),
    "web page as configuration": ("--config page.yaml --checkpoint a.ckpt", "it is a web page"),
    "pointer of Git LFS": ("--config a.yaml --checkpoint lfs.ckpt", "git lfs pull"),
    "configuration as weights": (
        "--config a.yaml --checkpoint a.yaml",
        "not written by torch.save",
    ),
    "swapped": (
        "--config a.ckpt --checkpoint a.yaml",
        "a.ckpt is a file of weights: --config is the YAML",
    ),
    "no training": ("--config no_training.yaml --checkpoint a.ckpt", "with a section `training`"),
    "no model": ("--config no_model.yaml --checkpoint a.ckpt", "cannot detect the type"),
    "no audio": ("--config no_audio.yaml --checkpoint a.ckpt", "audio.chunk_size: required"),
    "only weights": ("--checkpoint a.ckpt", "--checkpoint needs --config"),
    "only configuration": (
        "--config a.yaml",
        "--config needs --checkpoint, the file of the weights",
    ),
    "pair and folder": (f"{PAIR} --repo .", "--config excludes --repo"),
    "pair and name": (f"{PAIR} -n htdemucs", "not allowed with argument --config"),
    "configuration that is missing": (
        "--config c.yaml --checkpoint a.ckpt",
        "--config c.yaml: no such file",
    ),
    "weights that are missing": (
        "--config a.yaml --checkpoint c.ckpt",
        "checkpoint not found: c.ckpt",
    ),
    "weights as name": ("-n a.ckpt", "or --config and --checkpoint"),
    "configuration as name": (
        "-n a.yaml",
        "a.yaml is a configuration: a custom network is --config",
    ),
    "configuration as track": ("a.yaml", "a.yaml is not a track: a custom network is --config"),
    "weights as track": ("a.ckpt", "a.ckpt is not a track"),
    "unknown type": (f"{PAIR} --model-type roformer", "expected one of bs_roformer, "),
    "type of another network": (
        f"{PAIR} --model-type scnet",
        "SCNet cannot be built from these values",
    ),
    "type without a pair": ("--model-type scnet", "--model-type needs --config"),
    "number of overlaps": (f"{PAIR} --overlap 4", "'4' must be a number in [0, 1)"),
    "stem of another network": (
        f"{PAIR} --stems drums",
        "no stem named 'drums'; available: vocals, other",
    ),
    "stem in capitals": (
        f"{PAIR} --stems Vocals",
        "no stem named 'Vocals'; available: vocals, other",
    ),
    "only stem and the others": (
        f"{PAIR} --two-stems vocals",
        "--other-method 'add' needs other stems, but 'vocals' is the only one",
    ),
    "key without a section": (
        f"{PAIR} --set num_overlap=8",
        "num_overlap: there is no such key; inference.num_overlap?",
    ),
    "misspelled key": (
        f"{PAIR} --set inference.num_overlp=8",
        "there is no such key; inference.num_overlap?",
    ),
    "key of the network": (f"{PAIR} --set model.dims=8", "cannot be built from these values: "),
    "value of a wrong type": (
        f"{PAIR} --set inference.num_overlap=x",
        "inference.num_overlap: expected an integer",
    ),
    "half precision without a GPU": (f"{PAIR} --precision fp16", "needs a GPU"),
    "misspelled name in a folder": ("--repo . -n aa", "no model named 'aa'"),
    "weights alone in a folder": (
        "--repo . -n cut",
        "needs its configuration beside it, as cut.yaml",
    ),
    "bag by names of a folder": ("--repo . -n a+b", "`stems` of a bag in a folder matches them"),
    "misspelled name of the catalog": ("-n scnet_larg", "Did you mean 'scnet_large'"),
    "bag by names": ("-n scnet_large+htdemucs", "write a bag with the key `stems`"),
    "chain without a stem": ("--repo . -n a --then b", "expected STEM=MODEL"),
    "chain from an unknown stem": (
        "--repo . -n a --then voice=b",
        "no stem 'voice' to separate again: choose one of vocals, other",
    ),
    "chain to an unknown model": ("--repo . -n a --then vocals=c", "no model named 'c'"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_is_one_clear_error(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[kind]
    monkeypatch.chdir(folder)
    try:
        code = main(["song.wav", *shlex.split(words), "-q", "-o", "out"])
    except SystemExit as error:
        code = int(str(error))
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if "error: " in line]
    assert code in (2, 4) and len(errors) == 1, output.err
    assert message in errors[0]
    assert "Traceback" not in output.err and not Path("out").exists()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(f"mono48.wav {PAIR}", id="mono track at another rate"),
        pytest.param(f"song.wav {PAIR} -j 8", id="many jobs"),
        pytest.param(
            f"song.wav {PAIR} --set model.depth=1 --set inference.overlap_size=100", id="keys"
        ),
        pytest.param("song.wav --repo . -n b --segment 0.3", id="segment that MDX23C needs longer"),
        pytest.param("song.wav --repo . -n a --then vocals=b", id="chain of two pairs"),
        pytest.param("song.wav --repo . -s a", id="pair as a signature"),
        pytest.param("song.wav --repo . -n a --then other=a", id="chain of one pair twice"),
        pytest.param(f"batch songs.txt {PAIR}", id="batch of a pair"),
        pytest.param("batch songs.txt --repo . -n a --then vocals=b", id="batch of a chain"),
    ],
)
def test_unusual_but_valid_command_succeeds(
    words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main([*shlex.split(words), "-q", "-o", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("*.wav"))) in (2, 3)


def test_missing_extra_is_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "pymss_core", None)
    with pytest.raises(SystemExit):
        main(["song.wav", *shlex.split(PAIR)])
    assert "pip install 'pymss-core>=" in capsys.readouterr().err


def test_second_model_of_a_chain_is_in_the_folder_or_the_catalog(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = ["song.wav", "--repo", ".", "-n", "a", "--then", "vocals=tiny", "-q"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    stems = {path.stem for path in tmp_path.rglob("*.wav")}
    assert stems == {"other", "drums", "bass", "vocals_other", "vocals"}


def test_mistakes_in_python_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ModelNotFound, match="Did you mean 'scnet_large'"):
        Separator("scnet_larg")
    with pytest.raises(CheckpointError, match="Separator.from_pretrained"):
        Separator("a.ckpt")
    with pytest.raises(ConfigError, match=r"model\.dims|dims"):
        Separator.from_pretrained(config="a.yaml", checkpoint="a.ckpt", overrides=["model.dims=1"])


def test_python_derives_the_rest_only_if_it_is_requested(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    track = make_noise(2, 9000)
    for stems, expected in (
        (None, ["vocals", "other"]),
        (["vocals"], ["vocals"]),
        (["other"], ["other"]),
    ):
        separator = Separator.from_pretrained(config="a.yaml", checkpoint="a.ckpt", stems=stems)
        assert list(separator.run(track).stems) == expected
        assert list(Separator("a", ".", stems=stems).run(track).stems) == expected
        separator = Separator("a", ".", stems=["other"])
        separator.update_parameter(stems=stems)
        assert separator.stems == tuple(expected)


def test_rest_is_derived_unless_all_stems_are_those_of_the_network() -> None:
    rules = ("other=mixture - vocals",)
    for stems, expected in ((None, rules), (["vocals"], ()), (["other"], rules), (["x"], rules)):
        assert choose_rules(rules, ["vocals"], stems) == expected


def test_second_network_of_a_chain_has_the_settings_and_stems_of_its_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = ["song.wav", "--repo", ".", "-n", "b", "--then", "vocals=a", "--float32", "-q"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    outer = Separator("b", ".").run("song.wav").stems
    inner = Separator("a", ".").run(outer["vocals"], sample_rate=44100).stems
    expected = {"other": outer["other"], "vocals": inner["vocals"], "vocals_other": inner["other"]}
    written = {path.stem: load(path) for path in tmp_path.rglob("*.wav")}
    assert written.keys() == expected.keys()
    for name, stem in expected.items():
        assert decibels(stem, torch.from_numpy(written[name].T)) >= 100
