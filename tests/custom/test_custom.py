"""Networks of other people: described, found, filled, and run by the same engine.

Shapes: B batch, S stems, C channels, W samples of a window, F bins, T frames.
"""

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from demucs_infer import (
    CheckpointError,
    Config,
    ConfigError,
    ModelLoadingError,
    ModelMetadata,
    ModelNotFound,
    ModelParamsLike,
    SeparationError,
    Separator,
    get_model,
    list_models,
    load_weights,
    model_info,
    register_model,
)
from demucs_infer.custom import registry
from demucs_infer.custom.adapter import (
    Stft,
    WaveformModel,
    apply_mask,
    create_w2w_model,
    model_floating_dtype,
    str_to_torch_dtype,
    to_model_device,
)
from demucs_infer.custom.build import build_network, load_network
from demucs_infer.custom.config import StftConfig
from demucs_infer.custom.metadata import Traits
from demucs_infer.optimized.compiled import compile_network
from tests.helpers.networks import noise

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class GainParams:
    chunk_size: int
    output_stem_names: tuple[str, ...]
    input_channels: int = 2


class Gain(nn.Module):
    """Each stem is the mix times its weight; the norm is only there to be counted."""

    def __init__(self, params: GainParams) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.rand(len(params.output_stem_names)))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, mix: Tensor) -> Tensor:
        return self.gains[:, None, None] * mix[:, None]


GAIN: ModelMetadata[GainParams] = ModelMetadata("gain", GainParams, Gain)
CONFIG: dict[str, Any] = {
    "model_type": "gain",
    "model": {"chunk_size": 1000, "output_stem_names": ["drums", "bass"]},
    "audio": {"sample_rate": 8000},
    "inference": {"device": "cpu"},
}


def state() -> dict[str, Tensor]:
    network = Gain(GainParams(1000, ("drums", "bass")))
    network.norm.num_batches_tracked += 7
    return network.state_dict() | {"gains": torch.tensor([0.25, 0.75])}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "gain.ckpt"
    torch.save(state(), path)
    return path


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    yield


# ── what a network says of itself ──


def test_parameters_are_known_by_their_names_alone() -> None:
    class Bare:
        chunk_size = 5
        output_stem_names = ["a"]

    assert isinstance(Bare(), ModelParamsLike)
    assert Traits.of(Bare()) == Traits(5, ("a",), "waveform", "waveform", 2, None)
    assert not isinstance(object(), ModelParamsLike)
    with pytest.raises(ConfigError, match="object has no chunk_size and no output_stem_names"):
        Traits.of(object())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_type", "mel"),
        ("output_type", "logits"),
        ("inference_archetype", "sequence_labeling"),
    ],
)
def test_what_does_not_become_sound_is_refused(name: str, value: str) -> None:
    params = type("Params", (), {"chunk_size": 5, "output_stem_names": ["a"], name: value})()
    with pytest.raises(ConfigError, match=f"model.{name}: '{value}' is not one of .* not become"):
        Traits.of(params)


def test_metadata_is_a_value_that_makes_networks() -> None:
    assert ModelMetadata("gain", GainParams, Gain) == GAIN
    assert isinstance(GAIN.model(GainParams(1000, ("a",))), Gain)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package on the path that nobody has imported."""
    folder = tmp_path / "away" / "away_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(
        "class Net: pass\nclass NetParams: pass\nclass Bare: pass\nclass LostParams: pass\n"
    )
    (folder / "broken.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield "away_package"
    for name in [name for name in sys.modules if name.startswith("away_package")]:
        del sys.modules[name]


def test_metadata_from_a_module(package: str) -> None:
    found: ModelMetadata[Any] = ModelMetadata.from_module(f"{package}.nets", "Net", model_type="n")
    same: ModelMetadata[Any] = ModelMetadata.from_module(
        ".nets", "Net", model_type="n", package=package
    )
    assert found == same
    assert (found.params.__name__, found.model.__name__) == ("NetParams", "Net")  # type: ignore[attr-defined]  # a class


@pytest.mark.parametrize(
    ("module", "name", "error", "message"),
    [
        ("{}.none", "Net", ValueError, "there is no module 'away_package.none': install"),
        ("no_such_package", "Net", ValueError, "there is no module 'no_such_package'"),
        ("{}.nets", "Bare", AttributeError, "module 'away_package.nets' has no class 'BareParams'"),
        ("{}.nets", "Lost", AttributeError, "module 'away_package.nets' has no class 'Lost'"),
        (".nets", "Net", ValueError, "'.nets' of package None cannot be found"),
        ("{}.broken", "Net", ModuleNotFoundError, "a_module_that_is_nowhere"),
    ],
)
def test_metadata_from_what_is_not_there(
    package: str, module: str, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ModelMetadata.from_module(module.format(package), name, model_type="n")


# ── found by name ──


def test_a_registered_function_is_a_model(checkpoint: Path) -> None:
    register_model(lambda: load_network(Config.from_dict(CONFIG), checkpoint, GAIN), "my-gain")
    assert list_models()["single"]["my-gain"].startswith("tests.custom.test_custom:")  # type: ignore[union-attr]  # a module
    assert isinstance(get_model("my-gain"), WaveformModel)
    info = model_info("my-gain")
    assert (info.files, info.stems, info.licence) == ((), None, "not stated")
    mix = noise(2, 5000)
    stems = Separator("my-gain", device="cpu").run(mix)
    # Two roundings of float32, and those of the overlap-add.
    torch.testing.assert_close(stems["drums"], 0.25 * mix, rtol=0, atol=1e-6)


def test_registering() -> None:
    register_model(GAIN)
    register_model(GAIN)  # a module that is imported twice
    assert registry.find_metadata("gain") is GAIN
    with pytest.raises(ValueError, match="'gain' is registered already"):
        register_model(ModelMetadata("gain", GainParams, WaveformModel))  # type: ignore[arg-type]  # any will do
    with pytest.raises(ValueError, match="'htdemucs' is a model of the catalogue: take another"):
        register_model(GAIN, "htdemucs")
    with pytest.raises(ValueError, match="needs a name"):
        register_model(lambda: nn.Identity())
    with pytest.raises(ValueError, match="neither a ModelMetadata nor a function"):
        register_model(3, "three")  # type: ignore[arg-type]  # what a caller may do


def test_a_name_that_stands_for_something_else(checkpoint: Path) -> None:
    register_model(GAIN)
    register_model(lambda: nn.Identity(), "identity")
    register_model(lambda: "text", "text")  # type: ignore[arg-type,return-value]  # what a caller may do
    with pytest.raises(ModelLoadingError, match="'gain' is a kind of network, without weights"):
        get_model("gain")
    with pytest.raises(ModelLoadingError, match="'text' gave a str, not a network"):
        get_model("text")
    with pytest.raises(ModelNotFound, match="no model named 'gian'. Did you mean 'gain'?"):
        get_model("gian")
    data = CONFIG | {"model_type": "identity"}
    with pytest.raises(ConfigError, match="'identity' is a network, and has its weights already"):
        Separator.from_pretrained(config=data, checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=r"no network is known as 'gone' \(there are: gain, "):
        Separator.from_pretrained(config=data | {"model_type": "gone"}, checkpoint=checkpoint)


def install(folder: Path, name: str, points: dict[str, str], code: str = "") -> None:
    """What an installer leaves behind of a package with entry points."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[demucs_infer.models]", *lines]))


LISTING = """
import sys
import demucs_infer
assert "torch" not in sys.modules
names = [name for name in demucs_infer.list_models()["single"] if name.startswith("model")]
assert names == [f"model{i}" for i in range(10)], names
assert demucs_infer.list_models()["single"]["model3"] == "package3:make"
assert not [name for name in sys.modules if name.startswith("package")]
network = demucs_infer.get_model("model3")
assert type(network).__name__ == "Linear" and not network.training
assert [name for name in sys.modules if name.startswith("package")] == ["package3"]
"""


def test_ten_packages_are_listed_and_none_is_imported(tmp_path: Path) -> None:
    code = "from torch import nn\ndef make(): return nn.Linear(1, 1)\n"
    for i in range(10):
        install(tmp_path, f"package{i}", {f"model{i}": f"package{i}:make"}, code)
    command = [sys.executable, "-c", LISTING]
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_packages_that_are_broken_or_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "torn", {"torn": "torn:gone", "three": "torn:three"}, "three = 3")
    install(tmp_path, "worn", {"worn": "worn:x", "twin": "worn:x"}, "raise RuntimeError('rust')")
    install(tmp_path, "born", {"twin": "born:x", "htdemucs": "born:x"})
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, message in {
        "torn": "'torn' of torn cannot be imported from torn:gone: AttributeError: .*'gone'",
        "worn": "'worn' of worn cannot be imported from worn:x: RuntimeError: rust",
        "twin": "'twin' is offered by (worn and born|born and worn): uninstall one of them",
        "three": "'three' of torn is a int, neither a ModelMetadata nor a function",
    }.items():
        with pytest.raises(ModelLoadingError, match=message):
            get_model(name)
    assert list_models()["single"]["torn"] == "torn:gone"
    assert "htdemucs" not in list_models()["single"]  # ours goes first


# ── filled ──


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lightning"])
def test_weights_are_found_behind_what_wrappers_add(
    tmp_path: Path, prefix: str, wrapped: bool
) -> None:
    named: dict[str, Any] = {f"{prefix}{name}": weight for name, weight in state().items()}
    torch.save({"state_dict": named, "epoch": 3} if wrapped else named, tmp_path / "x.ckpt")
    network = load_weights(Gain(GainParams(1000, ("a", "b"))), tmp_path / "x.ckpt")
    assert network.gains.tolist() == [0.25, 0.75]
    assert int(network.norm.num_batches_tracked) == 7  # type: ignore[arg-type]  # a buffer
    assert network.norm.num_batches_tracked.dtype == torch.int64  # type: ignore[union-attr]  # so too


def test_weights_that_are_not_those_of_the_network(tmp_path: Path) -> None:
    wrong = state() | {"gains": torch.zeros(3), "more": torch.zeros(1)}
    del wrong["norm.bias"]
    save_file(wrong, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Separator.from_pretrained(
            config=CONFIG, checkpoint=tmp_path / "x.safetensors", metadata=GAIN
        )
    assert "1 missing ('norm.bias'); 1 unexpected ('more'); 1 differ" in str(caught.value)


def test_a_count_is_not_taken_for_a_weight(tmp_path: Path) -> None:
    torch.save(state() | {"gains": torch.tensor([1, 2])}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="'gains' is torch.int64, not a real number"):
        load_weights(Gain(GainParams(1000, ("a", "b"))), tmp_path / "x.ckpt")
    counted = state()["norm.num_batches_tracked"].int()
    torch.save(state() | {"norm.num_batches_tracked": counted}, tmp_path / "y.ckpt")
    with pytest.raises(CheckpointError, match="'norm.num_batches_tracked' is torch.int32"):
        load_weights(Gain(GainParams(1000, ("a", "b"))), tmp_path / "y.ckpt")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the file ran')",)


def test_a_file_that_would_run_code_does_not(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": state() | {"gains": Bomb()}}, tmp_path / "x.ckpt", pickle_module=pickle
    )
    with pytest.raises(CheckpointError, match="exec"):
        Separator.from_pretrained(config=CONFIG, checkpoint=tmp_path / "x.ckpt", metadata=GAIN)


# ── from a configuration and a file ──


def test_from_pretrained(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG | {"derived_stems": {"rest": "mixture-drums"}}))
    register_model(GAIN)
    mix = noise(2, 12345)
    separator = Separator.from_pretrained(
        config=file, checkpoint=checkpoint, overrides=["inference.batch_size=3"]
    )
    stems = separator.run(mix)
    assert list(stems) == ["drums", "bass", "rest"]
    assert not separator.model.training
    assert (separator.samplerate, separator.audio_channels) == (8000, 2)
    for stem, gain in zip(stems, (0.25, 0.75, 0.75)):
        # Hann windows that are added and divided out again: a few roundings of float32.
        torch.testing.assert_close(stems[stem], gain * mix, rtol=0, atol=1e-6)


def test_what_is_said_goes_before_the_configuration(checkpoint: Path) -> None:
    separator = Separator.from_pretrained(
        config=CONFIG | {"output": {"stems": ["bass"]}},
        checkpoint=checkpoint,
        metadata=GAIN,
        stems=["drums"],
        overlap=0.125,
    )
    assert separator.stems == ("drums",)


def test_the_grid_is_the_configurations(checkpoint: Path) -> None:
    """A padded grid gives the ends as many windows as the middle, and so has more of them."""
    sizes = ["inference.chunk_size=1000", "inference.hop_size=250", "inference.batch_size=1"]
    totals = {}
    for profile in ("padded", "demucs"):
        separator = Separator.from_pretrained(
            config=CONFIG,
            checkpoint=checkpoint,
            metadata=GAIN,
            overrides=[*sizes, f"chunking.profile={profile}"],
        )
        events = list(separator.stream(noise(2, 2000)))
        totals[profile] = max(getattr(event, "total_batches", 0) or 0 for event in events)
    assert totals == {"padded": (2000 + 2 * 750 - 1000) // 250 + 1, "demucs": 2000 // 250}


def test_files_are_as_the_configuration_says(checkpoint: Path, tmp_path: Path) -> None:
    output = {"format": "flac", "bits": 24, "clip": "none", "stems": ["bass"]}
    separator = Separator.from_pretrained(
        config=CONFIG | {"output": output}, checkpoint=checkpoint, metadata=GAIN
    )
    mix = noise(2, 4000)
    found = separator.separate_to(mix, tmp_path / "a", sample_rate=8000)
    assert [path.name for path in found.paths.values() if path] == ["bass.flac"]
    other = separator.separate_to(mix, tmp_path / "b", "wav", sample_rate=8000)
    assert [path.name for path in other.paths.values() if path] == ["bass.wav"]


def test_building_draws_none_of_the_callers_numbers(checkpoint: Path) -> None:
    before = torch.get_rng_state()
    load_network(Config.from_dict(CONFIG), checkpoint, GAIN)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_configuration_for_another_kind(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="is for 'other', and the network is a 'gain'"):
        build_network(Config.from_dict(CONFIG | {"model_type": "other"}), GAIN)


def test_an_unknown_key_of_the_model_names_itself(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="model.depth: there is no such key"):
        Separator.from_pretrained(
            config=CONFIG, checkpoint=checkpoint, metadata=GAIN, overrides=["model.depth=3"]
        )


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_weights_of_half_the_size(checkpoint: Path, kind: str) -> None:
    separator = Separator.from_pretrained(
        config=CONFIG,
        checkpoint=checkpoint,
        metadata=GAIN,
        overrides=[f"inference.weights_dtype={kind}"],
    )
    assert model_floating_dtype(separator.model) == str_to_torch_dtype(kind)
    mix = noise(2, 3000)
    found = separator.run(mix)["bass"]
    assert found.dtype == torch.float32
    # 8 bits of mantissa at the least, on samples of at most 0.5.
    torch.testing.assert_close(found, 0.75 * mix, rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("told", "said", "backends"),
    [
        (None, {}, []),
        ("eager", {}, ["eager"]),
        ("eager", {"compile": False}, []),
        (None, {"compile": "eager"}, ["eager"]),
    ],
)
def test_a_compiled_network_answers_the_same(
    told: str | None, said: Any, backends: list[str], checkpoint: Path, monkeypatch: Any
) -> None:
    # "eager" is the backend that needs no C++ compiler: the graph is taken, and run as it is.
    seen: list[str] = []

    def watched(network: nn.Module, backend: str) -> nn.Module:
        seen.append(backend)
        return compile_network(network, backend)

    monkeypatch.setattr("demucs_infer.api.compiled", watched)
    separator = Separator.from_pretrained(
        config=CONFIG,
        checkpoint=checkpoint,
        metadata=GAIN,
        overrides=[f"inference.compile={told}"] if told else [],
        **said,
    )
    mix = noise(2, 3000)
    torch.testing.assert_close(separator.run(mix)["bass"], 0.75 * mix)
    assert seen == backends


# ── spectra ──

STFT = StftConfig(n_fft=256, hop_length=64)
MAGNITUDE = StftConfig(n_fft=256, hop_length=64, spectrum="magnitude")


def params(reads: str, answers: str) -> Any:
    names = {"chunk_size": 1024, "output_stem_names": ("a", "b")}
    return type("Params", (), {**names, "input_type": reads, "output_type": answers})()


class Ones(nn.Module):
    """A mask of ones, or twice what it is given; it remembers the shapes that it saw."""

    def __init__(self, doubles: bool = False) -> None:
        super().__init__()
        self.doubles = doubles
        self.seen: list[tuple[int, ...]] = []

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.seen = [tuple(each.shape) for each in inputs]
        last = inputs[-1]
        if self.doubles:
            return {"b": 2 * last, "a": last}
        ones = torch.ones_like(last)
        if last.shape[-1] == 2:
            ones[..., 1] = 0
        return {"a": ones, "b": ones}


@pytest.mark.parametrize("stft", [STFT, MAGNITUDE], ids=["parts", "magnitude"])
@pytest.mark.parametrize("reads", ["spectrogram", "waveform_and_spectrogram"])
def test_a_mask_of_ones_gives_the_mix(stft: StftConfig, reads: str) -> None:
    network = Ones()
    mix = noise(2, 1500)[None]
    answer = create_w2w_model(network, params(reads, "spectrogram_mask"), stft=stft)(mix)
    assert answer.shape == (1, 2, 2, 1500)
    # There and back through a transform of 256 points in float32.
    torch.testing.assert_close(answer[:, 0], mix, rtol=0, atol=1e-6)
    spectrum = (1, 2, 129, 24, *([2] if stft is STFT else []))
    assert network.seen == [*([(1, 2, 1500)] if "wave" in reads else []), spectrum]


@pytest.mark.parametrize("length", [5, 3000])
def test_a_network_reads_whole_windows_only(length: int) -> None:
    """The last chunk, or a track, may be too short for a single frame of the spectrum."""
    network, mix = Ones(), noise(2, length)
    wrapped = create_w2w_model(network, params("spectrogram", "spectrogram_mask"), stft=STFT)
    sizes: list[tuple[int, ...]] = []
    wrapped.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    stems = Separator.from_model(wrapped, device="cpu", shifts=0, normalize=False).run(mix)
    assert {size[-1] for size in sizes} == {1024}
    torch.testing.assert_close(stems["a"], mix, rtol=0, atol=2e-6)


def test_a_spectrum_that_is_answered_becomes_sound() -> None:
    mix = noise(2, 1024)[None]
    wrapped = create_w2w_model(Ones(doubles=True), params("spectrogram", "spectrogram"), stft=STFT)
    torch.testing.assert_close(wrapped(mix)[:, 1], 2 * mix, rtol=0, atol=1e-6)


def test_a_mask_needs_no_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.randn(3, 1, 5, 7, 2, generator=generator)
    mask = torch.randn(3, 4, 5, 7, 2, generator=generator)
    found = Stft(StftConfig(masking="real")).mask(spectrum, mask)
    same = Stft(StftConfig(masking="complex")).mask(spectrum, mask)
    # The same four products and two sums; fused multiplication may save one rounding.
    torch.testing.assert_close(found, same, rtol=0, atol=2e-6)
    wide = apply_mask(spectrum, mask, add_sub_dtype=torch.float64, out_dtype=torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), same, rtol=0, atol=2e-6)
    half = apply_mask(spectrum.half(), mask.half(), add_sub_dtype=torch.float32)
    assert half.dtype == torch.float16


@pytest.mark.parametrize("window", ["hann", "hamming", "ones"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("length", [1024, 1499])
def test_spectra_and_back(window: Any, normalized: bool, length: int) -> None:
    config = StftConfig(
        n_fft=256, hop_length=96, win_length=200, window=window, normalized=normalized
    )
    wave = noise(2, length)
    stft = Stft(config)
    # Where frames hardly overlap, the division by the windows' sum costs some digits.
    torch.testing.assert_close(stft.inverse(stft.forward(wave), length), wave, rtol=0, atol=1e-5)


def test_three_kinds_of_answer_are_the_same() -> None:
    class Answers(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, mix: Tensor, gain: float = 1.0) -> object:
            a, b = mix, gain * mix
            return {"dict": {"b": b, "a": a}, "list": [a, b]}.get(
                self.kind, torch.stack([a, b], dim=1)
            )

    mix = noise(2, 3000)
    found = []
    for kind in ("dict", "list", "tensor"):
        wrapped = create_w2w_model(Answers(kind), params("waveform", "waveform"), sample_rate=8000)
        separator = Separator.from_model(wrapped, device="cpu", normalize=False)
        found.append(separator.run(mix, model_kwargs={"gain": 3.0})["b"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], 3 * mix, rtol=0, atol=1e-6)


def test_an_answer_that_is_no_mask_is_named() -> None:
    wrapped = create_w2w_model(Ones(), params("spectrogram", "spectrogram_mask"), stft=STFT)
    wrapped.model.forward = lambda x: x  # type: ignore[method-assign]  # a network gone wrong
    with pytest.raises(SeparationError, match=r"not \(batch, stems, channels, bins, frames, 2 p"):
        wrapped(noise(2, 1024)[None])


def test_a_network_of_fewer_stems_than_it_says_is_named() -> None:
    network = Gain(GainParams(1000, ("a", "b", "c")))
    wrapped = create_w2w_model(network, GainParams(1000, ("a", "b")), sample_rate=8000)
    with pytest.raises(SeparationError, match="with 2 stems: a, b"):
        Separator.from_model(wrapped, device="cpu").run(noise(2, 2000))


def test_a_mono_network_hears_the_mean() -> None:
    wrapped = create_w2w_model(
        Gain(GainParams(1000, ("a", "b"))), GainParams(1000, ("a", "b"), 1), sample_rate=8000
    )
    wrapped.model.load_state_dict(state())
    mix = noise(2, 3000)
    stems = Separator.from_model(wrapped, device="cpu", normalize=False).run(mix)
    torch.testing.assert_close(stems["b"], 0.75 * mix.mean(0, keepdim=True), rtol=0, atol=1e-6)


class Told(Gain):
    sources = ("x", "y")
    samplerate = 16000
    audio_channels = 1


@pytest.mark.parametrize(
    ("network", "reads", "answers", "stft", "chunk", "message"),
    [
        (Gain, "spectrogram", "waveform", None, 1024, "stft: is missing, for a network from spec"),
        (Gain, "waveform", "spectrogram_mask", None, 1024, "stft: is missing"),
        (Gain, "waveform", "waveform", STFT, 1024, "stft: the network neither reads nor answers"),
        (Gain, "spectrogram", "spectrogram", MAGNITUDE, 1024, "stft.spectrum: magnitudes have no"),
        (Gain, "spectrogram", "spectrogram", STFT, 128, "stft.n_fft: 256 is too long for a window"),
        (Told, "waveform", "waveform", None, 1024, "audio.sample_rate: 44100 is not .* 16000"),
        (Told, "waveform", "waveform", None, 1024, "audio.channels: 2 is not the network's 1"),
        (Told, "waveform", "waveform", None, 1024, r"output_stem_names: \['a', 'b'\] is not .*'x'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_runs(
    network: Any, reads: str, answers: str, stft: StftConfig | None, chunk: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create_w2w_model(
            network(GainParams(1000, ("a", "b"))),
            params(reads, answers),
            stft=stft,
            chunk_size=chunk,
        )


def test_a_rate_of_the_parameters_must_be_the_one_that_is_heard() -> None:
    told = params("waveform", "waveform")
    told.sample_rate = 32000
    with pytest.raises(ConfigError, match="44100 is not the 32000 of the model's parameters"):
        create_w2w_model(nn.Identity(), told)


def test_kinds_of_numbers() -> None:
    assert model_floating_dtype(nn.Linear(1, 1).half()) == torch.float16
    assert model_floating_dtype(nn.Identity()) is None
    counted = nn.Module()
    counted.counts = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    assert model_floating_dtype(counted) is None
    moved = {"model_device": "cpu", "model_floating_dtype": torch.float16}
    assert to_model_device(torch.zeros(1, dtype=torch.int64), **moved).dtype == torch.int64  # type: ignore[arg-type]  # by name
    assert to_model_device(torch.zeros(1), **moved).dtype == torch.float16  # type: ignore[arg-type]  # by name
    assert str_to_torch_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(TypeError, match="not by 16"):
        str_to_torch_dtype(16)
    with pytest.raises(ValueError, match="torch has no dtype 'float12'"):
        str_to_torch_dtype("float12")
    with pytest.raises(TypeError, match="torch.nn is not a dtype"):
        str_to_torch_dtype("nn")


def test_networks_of_a_bag_must_want_the_same(checkpoint: Path) -> None:
    from demucs_infer import BagOfModels

    one = load_network(Config.from_dict(CONFIG), checkpoint, GAIN)
    other = load_network(Config.from_dict(CONFIG, ["chunking.window=ones"]), checkpoint, GAIN)
    with pytest.raises(ValueError, match="differ in how they are to be run"):
        Separator.from_model(BagOfModels([one, other]), device="cpu")
