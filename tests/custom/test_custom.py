"""Test that custom networks are described, registered, loaded and run.

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
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class GainParams:
    chunk_size: int
    output_stem_names: tuple[str, ...]
    input_channels: int = 2


class Gain(nn.Module):
    """Each stem is the mixture times its weight; the norm provides an integer buffer."""

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
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    yield


# ── metadata ──


def test_parameters_class_needs_no_base_class() -> None:
    class Bare:
        chunk_size = 5
        output_stem_names = ["a"]

    assert isinstance(Bare(), ModelParamsLike)
    assert Traits.from_params(Bare()) == Traits(5, ("a",), "waveform", "waveform", 2, None)
    assert not isinstance(object(), ModelParamsLike)
    with pytest.raises(ConfigError, match="object has no chunk_size and no output_stem_names"):
        Traits.from_params(object())


@dataclass(frozen=True)
class DerivedParams(ModelParamsLike):
    chunk_size: int
    output_stem_names: tuple[str, ...]
    depth: int
    width: int = 3


@dataclass
class ComputedParams(ModelParamsLike):
    hops: int
    output_stem_names: tuple[str, ...]

    @property
    def chunk_size(self) -> int:
        return 100 * self.hops


def test_parameters_class_may_inherit_from_the_protocol() -> None:
    section = Config.from_dict(CONFIG, ["model.depth=2"]).model
    assert section.to_concrete(DerivedParams) == DerivedParams(1000, ("drums", "bass"), 2)
    assert Traits.from_params(DerivedParams(5, ("a",), depth=2)).chunk_size == 5
    with pytest.raises(ConfigError, match="model.depth: required key is missing"):
        Config.from_dict(CONFIG).model.to_concrete(DerivedParams)
    computed = Config.from_dict(CONFIG, ["model.hops=10"]).model.to_concrete(ComputedParams)
    assert (computed.chunk_size, isinstance(computed, ModelParamsLike)) == (1000, True)


def test_missing_attributes_of_a_derived_class_are_reported() -> None:
    class Incomplete(ModelParamsLike):
        output_stem_names = ("a",)

    with pytest.raises(ConfigError, match="Incomplete has no chunk_size"):
        Traits.from_params(Incomplete())  # type: ignore[abstract]  # the error under test


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_type", "mel"),
        ("output_type", "logits"),
        ("inference_archetype", "sequence_labeling"),
    ],
)
def test_types_that_are_not_audio_are_refused(name: str, value: str) -> None:
    params = type("Params", (), {"chunk_size": 5, "output_stem_names": ["a"], name: value})()
    with pytest.raises(ConfigError, match=f"model.{name}: expected one of .*, got '{value}'"):
        Traits.from_params(params)


def test_metadata_is_comparable_and_creates_networks() -> None:
    assert ModelMetadata("gain", GainParams, Gain) == GAIN
    assert isinstance(GAIN.model(GainParams(1000, ("a",))), Gain)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Create a package on the path that is not imported yet."""
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


def test_metadata_from_module(package: str) -> None:
    metadata: ModelMetadata[Any] = ModelMetadata.from_module(
        f"{package}.nets", "Net", model_type="n"
    )
    relative: ModelMetadata[Any] = ModelMetadata.from_module(
        ".nets", "Net", model_type="n", package=package
    )
    assert metadata == relative
    assert (metadata.params.__name__, metadata.model.__name__) == ("NetParams", "Net")  # type: ignore[attr-defined]  # a class


@pytest.mark.parametrize(
    ("module", "name", "error", "message"),
    [
        ("{}.none", "Net", ValueError, "no module 'away_package.none': install"),
        ("no_such_package", "Net", ValueError, "no module 'no_such_package'"),
        ("{}.nets", "Bare", AttributeError, "module 'away_package.nets' has no class 'BareParams'"),
        ("{}.nets", "Lost", AttributeError, "module 'away_package.nets' has no class 'Lost'"),
        (".nets", "Net", ValueError, "cannot find module '.nets' of package None"),
        ("{}.broken", "Net", ModuleNotFoundError, "a_module_that_is_nowhere"),
    ],
)
def test_metadata_from_missing_module_or_class(
    package: str, module: str, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ModelMetadata.from_module(module.format(package), name, model_type="n")


# ── registry ──


def test_registered_function_provides_a_model(checkpoint: Path) -> None:
    register_model(lambda: load_network(Config.from_dict(CONFIG), checkpoint, GAIN), "my-gain")
    assert list_models()["single"]["my-gain"].startswith("tests.custom.test_custom:")  # type: ignore[union-attr]  # a module
    assert isinstance(get_model("my-gain"), WaveformModel)
    info = model_info("my-gain")
    assert (info.files, info.stems, info.license) == ((), None, "not stated")
    mix = make_noise(2, 5000)
    stems = Separator("my-gain", device="cpu").run(mix)
    # Two roundings of float32, and those of the overlap-add.
    torch.testing.assert_close(stems["drums"], 0.25 * mix, rtol=0, atol=1e-6)


def test_register_model_refuses_conflicts() -> None:
    register_model(GAIN)
    register_model(GAIN)  # a module that is imported twice
    assert registry.find_metadata("gain") is GAIN
    with pytest.raises(ValueError, match="'gain' is already registered"):
        register_model(ModelMetadata("gain", GainParams, WaveformModel))  # type: ignore[arg-type]  # any class
    with pytest.raises(ValueError, match="'htdemucs' is a model of the catalog: choose another"):
        register_model(GAIN, "htdemucs")
    with pytest.raises(ValueError, match="needs a name"):
        register_model(lambda: nn.Identity())
    with pytest.raises(ValueError, match="expected a ModelMetadata or a function"):
        register_model(3, "three")  # type: ignore[arg-type]  # the error under test


def test_registered_function_provides_metadata(checkpoint: Path) -> None:
    calls = []

    def create_metadata() -> ModelMetadata[GainParams]:
        calls.append("called")
        return GAIN

    register_model(create_metadata, "gain")
    assert list_models()["single"]["gain"].endswith("create_metadata")  # type: ignore[union-attr]  # a module
    assert calls == []
    separator = Separator.from_pretrained(config=CONFIG, checkpoint=checkpoint)
    mix = make_noise(2, 3000)
    torch.testing.assert_close(separator.run(mix)["bass"], 0.75 * mix, rtol=0, atol=1e-6)
    assert calls == ["called"]
    with pytest.raises(ModelLoadingError, match="'gain' is a type of network without weights"):
        get_model("gain")


def test_entry_point_may_be_a_function_that_returns_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def create():\n    from tests.custom.test_custom import GAIN\n    return GAIN\n"
    install(tmp_path, "deferred", {"gain": "deferred:create"}, code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_network(Config.from_dict(CONFIG)).sources == ["drums", "bass"]


def test_name_of_the_wrong_kind_is_refused(checkpoint: Path) -> None:
    register_model(GAIN)
    register_model(lambda: nn.Identity(), "identity")
    register_model(lambda: "text", "text")  # type: ignore[arg-type,return-value]  # the error under test
    with pytest.raises(ModelLoadingError, match="'gain' is a type of network without weights"):
        get_model("gain")
    with pytest.raises(
        ModelLoadingError, match="'text' must return a network or a ModelMetadata, got str"
    ):
        get_model("text")
    with pytest.raises(ModelNotFound, match="no model named 'gian'. Did you mean 'gain'?"):
        get_model("gian")
    data = CONFIG | {"model_type": "identity"}
    with pytest.raises(ConfigError, match="'identity' is a network with weights"):
        Separator.from_pretrained(config=data, checkpoint=checkpoint)
    with pytest.raises(ModelLoadingError, match="a network or a ModelMetadata, got str"):
        Separator.from_pretrained(config=data | {"model_type": "text"}, checkpoint=checkpoint)
    with pytest.raises(
        ConfigError, match=r"no network is registered as 'gone' \(registered: gain, "
    ):
        Separator.from_pretrained(config=data | {"model_type": "gone"}, checkpoint=checkpoint)


def install(folder: Path, name: str, points: dict[str, str], code: str = "") -> None:
    """Write the files of an installed package with entry points."""
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


def test_listing_imports_no_package(tmp_path: Path) -> None:
    code = "from torch import nn\ndef make(): return nn.Linear(1, 1)\n"
    for i in range(10):
        install(tmp_path, f"package{i}", {f"model{i}": f"package{i}:make"}, code)
    command = [sys.executable, "-c", LISTING]
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_broken_and_conflicting_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "torn", {"torn": "torn:gone", "three": "torn:three"}, "three = 3")
    install(tmp_path, "worn", {"worn": "worn:x", "twin": "worn:x"}, "raise RuntimeError('rust')")
    install(tmp_path, "born", {"twin": "born:x", "htdemucs": "born:x"})
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, message in {
        "torn": "model 'torn' of torn from torn:gone: AttributeError: .*'gone'",
        "worn": "model 'worn' of worn from worn:x: RuntimeError: rust",
        "twin": "'twin' is registered by (worn and born|born and worn): uninstall one of them",
        "three": "'three' of torn must be a ModelMetadata or a function, got int",
    }.items():
        with pytest.raises(ModelLoadingError, match=message):
            get_model(name)
    assert list_models()["single"]["torn"] == "torn:gone"
    assert "htdemucs" not in list_models()["single"]  # the catalog takes precedence


# ── weights ──


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lightning"])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    named: dict[str, Any] = {f"{prefix}{name}": weight for name, weight in state().items()}
    torch.save({"state_dict": named, "epoch": 3} if wrapped else named, tmp_path / "x.ckpt")
    network = load_weights(Gain(GainParams(1000, ("a", "b"))), tmp_path / "x.ckpt")
    assert network.gains.tolist() == [0.25, 0.75]
    assert int(network.norm.num_batches_tracked) == 7  # type: ignore[arg-type]  # a buffer
    assert network.norm.num_batches_tracked.dtype == torch.int64  # type: ignore[union-attr]  # a buffer


@pytest.mark.parametrize("kind", ["plain", "half"])
def test_state_dict_transform_renames_and_changes_weights(tmp_path: Path, kind: str) -> None:
    saved = {f"model.old_{name}": weight for name, weight in state().items()}
    if kind == "half":
        saved["model.old_gains"] = saved["model.old_gains"].half()
    torch.save({"state_dict": saved | {"model.old_extra": torch.zeros(3)}}, tmp_path / "x.ckpt")

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        assert weights["old_extra"].tolist() == [0, 0, 0]  # prefixes are removed before
        renamed = {name.removeprefix("old_"): weight for name, weight in weights.items()}
        del renamed["extra"]
        return renamed | {"gains": 2 * renamed["gains"]}

    network = load_weights(
        Gain(GainParams(1000, ("a", "b"))), tmp_path / "x.ckpt", state_dict_transform=rename
    )
    assert network.gains.tolist() == [0.5, 1.5]
    assert network.gains.dtype == torch.float32
    assert int(network.norm.num_batches_tracked) == 7  # type: ignore[arg-type]  # a buffer


def test_transformed_weights_must_match_the_network(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.ckpt")
    network = Gain(GainParams(1000, ("a", "b")))
    with pytest.raises(CheckpointError, match="1 missing .'gains'.; 1 unexpected .'gain'."):
        load_weights(
            network,
            tmp_path / "x.ckpt",
            state_dict_transform=lambda weights: {
                name.replace("gains", "gain"): weight for name, weight in weights.items()
            },
        )
    with pytest.raises(CheckpointError, match="'gains' is torch.int64"):
        load_weights(
            network,
            tmp_path / "x.ckpt",
            state_dict_transform=lambda weights: weights | {"gains": torch.tensor([1, 2])},
        )


def test_load_weights_moves_the_network_to_the_device(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.ckpt")
    network = Gain(GainParams(1000, ("a", "b")))
    for device in ("cpu", torch.device("cpu")):
        assert load_weights(network, tmp_path / "x.ckpt", device).gains.device.type == "cpu"
    moved = load_weights(network, tmp_path / "x.ckpt", device="meta")
    assert moved is network
    assert {weight.device.type for weight in moved.state_dict().values()} == {"meta"}


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    wrong = state() | {"gains": torch.zeros(3), "more": torch.zeros(1)}
    del wrong["norm.bias"]
    save_file(wrong, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Separator.from_pretrained(
            config=CONFIG, checkpoint=tmp_path / "x.safetensors", metadata=GAIN
        )
    assert "1 missing ('norm.bias'); 1 unexpected ('more'); 1 differ" in str(caught.value)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    torch.save(state() | {"gains": torch.tensor([1, 2])}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="'gains' is torch.int64: expected floating point"):
        load_weights(Gain(GainParams(1000, ("a", "b"))), tmp_path / "x.ckpt")
    counted = state()["norm.num_batches_tracked"].int()
    torch.save(state() | {"norm.num_batches_tracked": counted}, tmp_path / "y.ckpt")
    with pytest.raises(CheckpointError, match="'norm.num_batches_tracked' is torch.int32"):
        load_weights(Gain(GainParams(1000, ("a", "b"))), tmp_path / "y.ckpt")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the file ran')",)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": state() | {"gains": Bomb()}}, tmp_path / "x.ckpt", pickle_module=pickle
    )
    with pytest.raises(CheckpointError, match="exec"):
        Separator.from_pretrained(config=CONFIG, checkpoint=tmp_path / "x.ckpt", metadata=GAIN)


# ── from_pretrained ──


def test_from_pretrained_separates(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG | {"derived_stems": {"rest": "mixture-drums"}}))
    register_model(GAIN)
    mix = make_noise(2, 12345)
    separator = Separator.from_pretrained(
        config=file, checkpoint=checkpoint, overrides=["inference.batch_size=3"]
    )
    stems = separator.run(mix)
    assert list(stems) == ["drums", "bass", "rest"]
    assert not separator.model.training
    assert (separator.samplerate, separator.audio_channels) == (8000, 2)
    for stem, gain in zip(stems, (0.25, 0.75, 0.75)):
        # Overlap-add of Hann windows: a few roundings of float32.
        torch.testing.assert_close(stems[stem], gain * mix, rtol=0, atol=1e-6)


def test_arguments_override_the_configuration(checkpoint: Path) -> None:
    separator = Separator.from_pretrained(
        config=CONFIG | {"output": {"stems": ["bass"]}},
        checkpoint=checkpoint,
        metadata=GAIN,
        stems=["drums"],
        overlap=0.125,
    )
    assert separator.stems == ("drums",)


def test_configured_profile_determines_the_number_of_windows(checkpoint: Path) -> None:
    """A padded grid covers the ends with as many windows as the middle, so it has more."""
    sizes = ["inference.chunk_size=1000", "inference.hop_size=250", "inference.batch_size=1"]
    totals = {}
    for profile in ("padded", "demucs"):
        separator = Separator.from_pretrained(
            config=CONFIG,
            checkpoint=checkpoint,
            metadata=GAIN,
            overrides=[*sizes, f"chunking.profile={profile}"],
        )
        events = list(separator.stream(make_noise(2, 2000)))
        totals[profile] = max(getattr(event, "total_batches", 0) or 0 for event in events)
    assert totals == {"padded": (2000 + 2 * 750 - 1000) // 250 + 1, "demucs": 2000 // 250}


def test_configured_output_format_is_the_default(checkpoint: Path, tmp_path: Path) -> None:
    output = {"format": "flac", "bits": 24, "clip": "none", "stems": ["bass"]}
    separator = Separator.from_pretrained(
        config=CONFIG | {"output": output}, checkpoint=checkpoint, metadata=GAIN
    )
    mix = make_noise(2, 4000)
    result = separator.separate_to(mix, tmp_path / "a", sample_rate=8000)
    assert [path.name for path in result.paths.values() if path] == ["bass.flac"]
    wav_result = separator.separate_to(mix, tmp_path / "b", "wav", sample_rate=8000)
    assert [path.name for path in wav_result.paths.values() if path] == ["bass.wav"]


def test_building_keeps_the_global_random_state(checkpoint: Path) -> None:
    before = torch.get_rng_state()
    load_network(Config.from_dict(CONFIG), checkpoint, GAIN)
    assert torch.equal(torch.get_rng_state(), before)


def test_metadata_of_another_model_type_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="has 'other', but the metadata 'gain'"):
        build_network(Config.from_dict(CONFIG | {"model_type": "other"}), GAIN)


def test_unknown_model_key_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="model.depth: unknown key"):
        Separator.from_pretrained(
            config=CONFIG, checkpoint=checkpoint, metadata=GAIN, overrides=["model.depth=3"]
        )


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_weights_dtype_converts_the_weights(checkpoint: Path, kind: str) -> None:
    separator = Separator.from_pretrained(
        config=CONFIG,
        checkpoint=checkpoint,
        metadata=GAIN,
        overrides=[f"inference.weights_dtype={kind}"],
    )
    assert model_floating_dtype(separator.model) == str_to_torch_dtype(kind)
    mix = make_noise(2, 3000)
    stem = separator.run(mix)["bass"]
    assert stem.dtype == torch.float32
    # At least 8 bits of mantissa, on samples of at most 0.5.
    torch.testing.assert_close(stem, 0.75 * mix, rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("configured", "arguments", "backends"),
    [
        (None, {}, []),
        ("eager", {}, ["eager"]),
        ("eager", {"compile": False}, []),
        (None, {"compile": "eager"}, ["eager"]),
    ],
)
def test_compiled_network_returns_the_same(
    configured: str | None, arguments: Any, backends: list[str], checkpoint: Path, monkeypatch: Any
) -> None:
    # The "eager" backend needs no C++ compiler.
    used_backends: list[str] = []

    def record_backend(network: nn.Module, backend: str) -> nn.Module:
        used_backends.append(backend)
        return compile_network(network, backend)

    monkeypatch.setattr("demucs_infer.separator_state.compile_network", record_backend)
    separator = Separator.from_pretrained(
        config=CONFIG,
        checkpoint=checkpoint,
        metadata=GAIN,
        overrides=[f"inference.compile={configured}"] if configured else [],
        **arguments,
    )
    mix = make_noise(2, 3000)
    torch.testing.assert_close(separator.run(mix)["bass"], 0.75 * mix)
    assert used_backends == backends


# ── spectra ──

STFT = StftConfig(n_fft=256, hop_length=64)
MAGNITUDE = StftConfig(n_fft=256, hop_length=64, spectrum="magnitude")


def params(input_type: str, output_type: str) -> Any:
    names = {"chunk_size": 1024, "output_stem_names": ("a", "b")}
    return type("Params", (), {**names, "input_type": input_type, "output_type": output_type})()


class Ones(nn.Module):
    """Return a mask of ones, or twice the input; record the shapes of the inputs."""

    def __init__(self, doubles: bool = False) -> None:
        super().__init__()
        self.doubles = doubles
        self.input_shapes: list[tuple[int, ...]] = []

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.input_shapes = [tuple(x.shape) for x in inputs]
        last = inputs[-1]
        if self.doubles:
            return {"b": 2 * last, "a": last}
        ones = torch.ones_like(last)
        if last.shape[-1] == 2:
            ones[..., 1] = 0
        return {"a": ones, "b": ones}


@pytest.mark.parametrize("stft", [STFT, MAGNITUDE], ids=["parts", "magnitude"])
@pytest.mark.parametrize("input_type", ["spectrogram", "waveform_and_spectrogram"])
def test_mask_of_ones_returns_the_mixture(stft: StftConfig, input_type: str) -> None:
    network = Ones()
    mix = make_noise(2, 1500)[None]
    stems = create_w2w_model(network, params(input_type, "spectrogram_mask"), stft=stft)(mix)
    assert stems.shape == (1, 2, 2, 1500)
    # A transform of 256 points and its inverse in float32.
    torch.testing.assert_close(stems[:, 0], mix, rtol=0, atol=1e-6)
    spectrum = (1, 2, 129, 24, *([2] if stft is STFT else []))
    assert network.input_shapes == [*([(1, 2, 1500)] if "wave" in input_type else []), spectrum]


@pytest.mark.parametrize("length", [5, 3000])
def test_network_receives_whole_windows_only(length: int) -> None:
    """The last chunk, or a track, may be shorter than one frame of the spectrum."""
    network, mix = Ones(), make_noise(2, length)
    wrapped = create_w2w_model(network, params("spectrogram", "spectrogram_mask"), stft=STFT)
    sizes: list[tuple[int, ...]] = []
    wrapped.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    stems = Separator.from_model(wrapped, device="cpu", shifts=0, normalize=False).run(mix)
    assert {size[-1] for size in sizes} == {1024}
    torch.testing.assert_close(stems["a"], mix, rtol=0, atol=2e-6)


def test_spectrogram_output_is_converted_to_audio() -> None:
    mix = make_noise(2, 1024)[None]
    wrapped = create_w2w_model(Ones(doubles=True), params("spectrogram", "spectrogram"), stft=STFT)
    torch.testing.assert_close(wrapped(mix)[:, 1], 2 * mix, rtol=0, atol=1e-6)


def test_apply_mask_equals_complex_multiplication() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.randn(3, 1, 5, 7, 2, generator=generator)
    mask = torch.randn(3, 4, 5, 7, 2, generator=generator)
    product = Stft(StftConfig(masking="real")).mask(spectrum, mask)
    expected = Stft(StftConfig(masking="complex")).mask(spectrum, mask)
    # The same four products and two sums; a fused multiply-add may skip one rounding.
    torch.testing.assert_close(product, expected, rtol=0, atol=2e-6)
    wide = apply_mask(spectrum, mask, add_sub_dtype=torch.float64, out_dtype=torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=0, atol=2e-6)
    half = apply_mask(spectrum.half(), mask.half(), add_sub_dtype=torch.float32)
    assert half.dtype == torch.float16


def test_apply_mask_accepts_its_dtypes_by_position() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.randn(3, 1, 5, 7, 2, generator=generator).half()
    mask = torch.randn(3, 4, 5, 7, 2, generator=generator).half()
    product = apply_mask(spectrum, mask, torch.float32, torch.float64)
    assert product.dtype == torch.float64
    assert torch.equal(
        product, apply_mask(spectrum, mask, add_sub_dtype=torch.float32, out_dtype=torch.float64)
    )


@pytest.mark.parametrize("window", ["hann", "hamming", "ones"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("length", [1024, 1499])
def test_stft_round_trip(window: Any, normalized: bool, length: int) -> None:
    config = StftConfig(
        n_fft=256, hop_length=96, win_length=200, window=window, normalized=normalized
    )
    wave = make_noise(2, length)
    stft = Stft(config)
    # With little overlap, dividing by the sum of the windows loses some digits.
    torch.testing.assert_close(stft.inverse(stft.forward(wave), length), wave, rtol=0, atol=1e-5)


def test_preprocess_and_postprocess_wrap_the_network() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float16))

        def forward(self, mix: Tensor, gain: Tensor) -> Tensor:
            assert mix.dtype == gain.dtype == torch.float16
            return mix * gain * self.weight

    def preprocess(mix: Tensor) -> tuple[Tensor, Tensor]:
        assert mix.dtype == torch.float32
        return mix, torch.full((1,), 0.5)

    def postprocess(output: Tensor, mix: Tensor, gain: Tensor) -> dict[str, Tensor]:
        assert gain.tolist() == [0.5]
        return {"b": mix - output, "a": output}

    wrapped = create_w2w_model(
        TwoInputs(),
        params("waveform", "waveform"),
        sample_rate=8000,
        preprocess=preprocess,
        postprocess=postprocess,
    )
    mix = make_noise(2, 3000)
    stems = Separator.from_model(wrapped, device="cpu", normalize=False).run(mix)
    assert [stems[name].dtype for name in stems] == 2 * [torch.float32]
    # 11 bits of mantissa in float16, on samples of at most 0.5.
    torch.testing.assert_close(stems["a"], 0.5 * mix, rtol=0, atol=5e-4)
    torch.testing.assert_close(stems["b"], 0.5 * mix, rtol=0, atol=5e-4)


def test_preprocess_receives_spectra_and_postprocess_returns_masks() -> None:
    wrapped = create_w2w_model(
        nn.Identity(),
        params("spectrogram", "spectrogram_mask"),
        stft=MAGNITUDE,
        preprocess=torch.log1p,
        postprocess=lambda output, *inputs: [torch.ones_like(output), 0 * inputs[0]],
    )
    mix = make_noise(2, 1500)[None]
    stems = wrapped(mix)
    torch.testing.assert_close(stems[:, 0], mix, rtol=0, atol=1e-6)
    assert not stems[:, 1].any()


def test_dict_list_and_tensor_outputs_are_equivalent() -> None:
    class OutputKind(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, mix: Tensor, gain: float = 1.0) -> object:
            a, b = mix, gain * mix
            return {"dict": {"b": b, "a": a}, "list": [a, b]}.get(
                self.kind, torch.stack([a, b], dim=1)
            )

    mix = make_noise(2, 3000)
    stems = []
    for kind in ("dict", "list", "tensor"):
        wrapped = create_w2w_model(
            OutputKind(kind), params("waveform", "waveform"), sample_rate=8000
        )
        separator = Separator.from_model(wrapped, device="cpu", normalize=False)
        stems.append(separator.run(mix, model_kwargs={"gain": 3.0})["b"])
    assert torch.equal(stems[0], stems[1])
    assert torch.equal(stems[0], stems[2])
    torch.testing.assert_close(stems[0], 3 * mix, rtol=0, atol=1e-6)


def test_output_of_the_wrong_shape_is_refused() -> None:
    wrapped = create_w2w_model(Ones(), params("spectrogram", "spectrogram_mask"), stft=STFT)
    wrapped.model.forward = lambda x: x  # type: ignore[method-assign]  # the error under test
    with pytest.raises(
        SeparationError, match=r"expected \(batch, stems, channels, bins, frames, 2 p"
    ):
        wrapped(make_noise(2, 1024)[None])


def test_wrong_number_of_stems_is_refused() -> None:
    network = Gain(GainParams(1000, ("a", "b", "c")))
    wrapped = create_w2w_model(network, GainParams(1000, ("a", "b")), sample_rate=8000)
    with pytest.raises(SeparationError, match="with 2 stems: a, b"):
        Separator.from_model(wrapped, device="cpu").run(make_noise(2, 2000))


def test_mono_network_receives_the_channel_mean() -> None:
    wrapped = create_w2w_model(
        Gain(GainParams(1000, ("a", "b"))), GainParams(1000, ("a", "b"), 1), sample_rate=8000
    )
    wrapped.model.load_state_dict(state())
    mix = make_noise(2, 3000)
    stems = Separator.from_model(wrapped, device="cpu", normalize=False).run(mix)
    torch.testing.assert_close(stems["b"], 0.75 * mix.mean(0, keepdim=True), rtol=0, atol=1e-6)


def test_plain_module_is_refused_with_the_way_to_wrap_it() -> None:
    network = Gain(GainParams(1000, ("a", "b")))
    message = r"Gain has no sources, .*: wrap it with .*create_w2w_model\(module, params\)"
    with pytest.raises(ValueError, match=message):
        Separator.from_model(network, device="cpu")


class GainWithAttributes(Gain):
    sources = ("x", "y")
    samplerate = 16000
    audio_channels = 1


@pytest.mark.parametrize(
    ("network", "input_type", "output_type", "stft", "chunk", "message"),
    [
        (Gain, "spectrogram", "waveform", None, 1024, "stft: required for a network from spec"),
        (Gain, "waveform", "spectrogram_mask", None, 1024, "stft: required"),
        (Gain, "waveform", "waveform", STFT, 1024, "stft: not used by a network from waveform"),
        (
            Gain,
            "spectrogram",
            "spectrogram",
            MAGNITUDE,
            1024,
            "stft.spectrum: a magnitude has no phase",
        ),
        (
            Gain,
            "spectrogram",
            "spectrogram",
            STFT,
            128,
            "stft.n_fft: .* window of 128 samples, got 256",
        ),
        (
            GainWithAttributes,
            "waveform",
            "waveform",
            None,
            1024,
            "audio.sample_rate: .* 16000, got 44100",
        ),
        (
            GainWithAttributes,
            "waveform",
            "waveform",
            None,
            1024,
            "audio.channels: the network has 1, got 2",
        ),
        (
            GainWithAttributes,
            "waveform",
            "waveform",
            None,
            1024,
            r"names: the network has \['x', 'y'\], got \['a', 'b'\]",
        ),
    ],
)
def test_inconsistent_network_is_refused_before_it_runs(
    network: Any,
    input_type: str,
    output_type: str,
    stft: StftConfig | None,
    chunk: int,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        create_w2w_model(
            network(GainParams(1000, ("a", "b"))),
            params(input_type, output_type),
            stft=stft,
            chunk_size=chunk,
        )


def test_sample_rate_of_the_parameters_must_match() -> None:
    model_params = params("waveform", "waveform")
    model_params.sample_rate = 32000
    with pytest.raises(ConfigError, match="parameters have 32000, got 44100"):
        create_w2w_model(nn.Identity(), model_params)


def test_dtype_helpers() -> None:
    assert model_floating_dtype(nn.Linear(1, 1).half()) == torch.float16
    assert model_floating_dtype(nn.Identity()) is None
    integer_model = nn.Module()
    integer_model.counts = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    assert model_floating_dtype(integer_model) is None
    target = {"model_device": "cpu", "model_floating_dtype": torch.float16}
    assert to_model_device(torch.zeros(1, dtype=torch.int64), **target).dtype == torch.int64  # type: ignore[arg-type]  # by name
    assert to_model_device(torch.zeros(1), **target).dtype == torch.float16  # type: ignore[arg-type]  # by name
    assert str_to_torch_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(TypeError, match="name of a dtype such as 'float16', got 16"):
        str_to_torch_dtype(16)
    with pytest.raises(ValueError, match="torch has no dtype 'float12'"):
        str_to_torch_dtype("float12")
    with pytest.raises(TypeError, match="torch.nn is not a dtype"):
        str_to_torch_dtype("nn")


def test_members_of_a_bag_must_have_the_same_options(checkpoint: Path) -> None:
    from demucs_infer import BagOfModels

    hann = load_network(Config.from_dict(CONFIG), checkpoint, GAIN)
    ones = load_network(Config.from_dict(CONFIG, ["chunking.window=ones"]), checkpoint, GAIN)
    with pytest.raises(ValueError, match="have different default settings"):
        Separator.from_model(BagOfModels([hann, ones]), device="cpu")


def test_plain_module_is_run_with_metadata(checkpoint: Path) -> None:
    mix, network = make_noise(2, 4000), Gain(GainParams(1000, ("a", "b")))
    params = GainParams(1000, ("a", "b"))
    separator = Separator.from_model(network, metadata=params, device="cpu", normalize=False)
    assert (separator.stems, separator.samplerate) == (("a", "b"), 44100)
    torch.testing.assert_close(separator.run(mix)["b"], network.gains[1] * mix, rtol=0, atol=1e-6)
    config = CONFIG | {"derived_stems": {"rest": "mixture-drums"}, "output": {"format": "flac"}}
    configured = Separator.from_model(network, metadata=config, device="cpu", shifts=2)
    assert (configured.stems, configured.samplerate) == (("drums", "bass", "rest"), 8000)
    loaded = Separator.from_pretrained(config=CONFIG, checkpoint_path=checkpoint, metadata=GAIN)
    assert loaded.samplerate == 8000


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (object(), "object has no chunk_size and no output_stem_names"),
        (GAIN, r"parameters of this 'gain' are unknown .*metadata=GainParams\(...\)"),
        ({"model_type": "gain"}, "model: required key is missing"),
    ],
    ids=["no parameters", "metadata without parameters", "incomplete configuration"],
)
def test_unusable_metadata_is_refused(metadata: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Separator.from_model(Gain(GainParams(1000, ("a", "b"))), metadata=metadata)


@pytest.mark.parametrize("names", [(), ("checkpoint", "checkpoint_path")])
def test_one_checkpoint_is_required(names: tuple[str, ...], checkpoint: Path) -> None:
    paths: dict[str, Any] = dict.fromkeys(names, checkpoint)
    with pytest.raises(ValueError, match=f"got {len(names)} of `checkpoint` and"):
        Separator.from_pretrained(config=CONFIG, metadata=GAIN, **paths)


def test_protocol_of_stem_selection_is_public() -> None:
    from demucs_infer import SupportsStemSelection
    from demucs_infer.htdemucs import HTDemucs

    assert isinstance(HTDemucs(**TINY["HTDemucs"]), SupportsStemSelection)
    assert not isinstance(Gain(GainParams(1000, ("a", "b"))), SupportsStemSelection)
