"""Load each kind of file that upstream writes, without importing upstream."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from demucs_infer.checkpoints.reader import Architecture
from demucs_infer.demucs import Demucs
from demucs_infer.errors import CheckpointError, ModelLoadingError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.states import build, load_model, load_weights
from tests.helpers import malicious_checkpoints as malicious
from tests.helpers.networks import TINY, randomize
from tests.helpers.oracles import require_module, skip_or_fail

CLASSES: dict[str, type[nn.Module]] = {"Demucs": Demucs, "HDemucs": HDemucs, "HTDemucs": HTDemucs}

# ── files of upstream, loaded where upstream cannot be imported ──

LOAD_BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"demucs", "diffq", "omegaconf", "openunmix", "torchaudio"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import warnings, torch
from pathlib import Path
from demucs_infer.states import load_model
warnings.simplefilter("error")
folder = Path(sys.argv[1])
mix = torch.load(folder / "mix.pt", weights_only=True)
for file in sorted([*folder.glob("*.th"), *folder.glob("*.safetensors")]):
    network = load_model(file)
    assert not network.training
    assert all(one.dtype == torch.float32 for one in network.state_dict().values())
    with torch.inference_mode():
        torch.save(network(mix), folder / f"{file.name}.ours")
    torch.save(network.state_dict(), folder / f"{file.name}.state")
assert not {"demucs", "diffq", "omegaconf", "openunmix", "torchaudio"} & sys.modules.keys()
"""


def make_upstream_network(name: str) -> nn.Module:
    """Return a small network of upstream with random parameters."""
    module = require_module(f"demucs.{name.lower()}")
    return randomize(getattr(module, name)(**make_arguments(name)))


def make_arguments(name: str) -> dict[str, Any]:
    segment = {"segment": Fraction(11, 10)} if name == "HTDemucs" else {}
    return {**TINY[name], **segment}


def make_package(network: Any, state: dict[str, Any]) -> dict[str, Any]:
    args, kwargs = network._init_args_kwargs
    # Released files contain objects of foreign classes here.
    training = {"optim": {"lr": 3e-4}, "config": Namespace(a=1, b=[Path("x")])}
    return {
        "klass": type(network),
        "args": args,
        "kwargs": kwargs,
        "state": state,
        "training_args": training,
    }


def quantize(network: nn.Module, name: str) -> dict[str, Any]:
    diffq = require_module("diffq")
    options = {"DiffQuantizer": {"group_size": 8}, "UniformQuantizer": {"bits": 6}}[name]
    quantizer = getattr(diffq, name)(network, min_size=0.002, **options)
    state = quantizer.get_quantized_state()
    quantizer.detach()
    state["__quantized"] = True
    return dict(state)


def as_json(value: Any) -> Any:
    if isinstance(value, Fraction):
        parts = {"numerator": value.numerator, "denominator": value.denominator}
        return {"_type": "fraction", **parts}
    return value


def flatten_state(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Flatten a nested state as upstream's files on the Hub do."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.contiguous()
        return {"_tensor": key}
    if isinstance(value, dict):
        return {"_dict": [[key, flatten_state(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list):
        return {"_list": [flatten_state(item, tensors) for item in value]}
    if isinstance(value, tuple):
        return {"_tuple": [flatten_state(item, tensors) for item in value]}
    if isinstance(value, type):
        return {"_class": f"{value.__module__}.{value.__qualname__}"}
    return value


def write_safetensors(network: Any, state: dict[str, Any], path: Path) -> None:
    args, kwargs = network._init_args_kwargs
    klass = type(network)
    metadata = {
        "klass": f"{klass.__module__}.{klass.__qualname__}",
        "args": json.dumps(args),
        "kwargs": json.dumps({key: as_json(value) for key, value in kwargs.items()}),
    }
    if "__quantized" in state:
        tensors: dict[str, Tensor] = {}
        metadata["structure"] = json.dumps(flatten_state(state, tensors))
        save_file(tensors, path, metadata)
    else:
        save_file(state, path, metadata)


@pytest.fixture(scope="module")
def upstream_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write files with upstream, its output, and the output of this package in a new process."""
    states = require_module("demucs.states")
    hf = require_module("demucs.hf")
    folder = tmp_path_factory.mktemp("upstream")
    mix = 0.1 * torch.randn(1, 2, 8800, generator=torch.Generator().manual_seed(1))
    torch.save(mix, folder / "mix.pt")
    can_quantize = find_spec("diffq") is not None
    for name in CLASSES:
        network = make_upstream_network(name)
        kinds = {
            "full": states.get_state(network, None, half=False),
            "half": states.get_state(network, None, half=True),
        }
        if can_quantize:
            kinds["diffq"] = quantize(network, "DiffQuantizer")
            kinds["uniform"] = quantize(network, "UniformQuantizer")
        for kind, state in kinds.items():
            states.save_with_checksum(make_package(network, state), folder / f"{name}_{kind}.th")
            write_safetensors(network, state, folder / f"{name}_{kind}.safetensors")
    for file in [*folder.glob("*.th"), *folder.glob("*.safetensors")]:
        is_th = file.suffix == ".th"
        theirs = states.load_model(file) if is_th else hf.load_safetensors_model(file)
        with torch.inference_mode():
            torch.save(theirs.float().eval()(mix), folder / f"{file.name}.theirs")
        torch.save(theirs.state_dict(), folder / f"{file.name}.wanted")
    command = [sys.executable, "-c", LOAD_BLOCKED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", ["full", "half", "diffq", "uniform"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
def test_upstream_file_gives_the_same_network(
    upstream_files: Path, name: str, kind: str, suffix: str
) -> None:
    if kind in ("diffq", "uniform"):
        require_module("diffq")
    (file,) = upstream_files.glob(f"{name}_{kind}*{suffix}")
    ours = torch.load(f"{file}.state", weights_only=True)
    theirs = torch.load(f"{file}.wanted", weights_only=True)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours = torch.load(f"{file}.ours", weights_only=True)
    theirs = torch.load(f"{file}.theirs", weights_only=True)
    # The same weights in networks that may sum in another order: class B.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_demucs_and_demucs_infer_can_be_imported_together() -> None:
    """In either order, each name gives its own package."""
    require_module("demucs")
    for first, second in (("demucs", "demucs_infer"), ("demucs_infer", "demucs")):
        code = f"import {first}.htdemucs, {second}.htdemucs; " + (
            "import demucs.states, demucs_infer.states, demucs, demucs_infer; "
            "assert demucs.htdemucs.HTDemucs is not demucs_infer.htdemucs.HTDemucs; "
            "assert 'demucs_infer' not in demucs.__file__; "
            "assert 'demucs_infer' in demucs_infer.__file__"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


# ── files without an architecture ──


@pytest.fixture
def network() -> nn.Module:
    return randomize(Demucs(**TINY["Demucs"]))


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


WRAPPINGS = {
    "bare": lambda state: state,
    "lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    "parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "both": lambda state: {"state_dict": {f"model.module.{k}": v for k, v in state.items()}},
    "training": lambda state: {"state": state, "epoch": 3, "optimizer": {"lr": 0.1}},
}


@pytest.mark.parametrize("suffix", [".th", ".ckpt", ".pt"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_bare_state_dict_is_loaded_with_an_architecture(
    tmp_path: Path, network: nn.Module, wrapping: str, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save(WRAPPINGS[wrapping](network.state_dict()), path)
    found = load_model(path, architecture=Architecture("Demucs", kwargs=TINY["Demucs"]))
    assert have_equal_weights(found, network)
    assert not found.training
    assert have_equal_weights(load_weights(Demucs(**TINY["Demucs"]), path), network)


def test_bare_safetensors_are_loaded_into_a_network(tmp_path: Path, network: nn.Module) -> None:
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    assert have_equal_weights(
        load_weights(Demucs(**TINY["Demucs"]), tmp_path / "x.safetensors"), network
    )


def test_error_of_bare_state_dict_asks_for_its_architecture(
    tmp_path: Path, network: nn.Module
) -> None:
    torch.save(network.state_dict(), tmp_path / "x.th")
    with pytest.raises(CheckpointError, match="architecture"):
        load_model(tmp_path / "x.th")


def test_error_lists_mismatched_weights(tmp_path: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    first, second, *_ = state
    state["extra.weight"] = state.pop(first)
    state[second] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "x.th")
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, tmp_path / "x.th")
    message = str(caught.value)
    assert all(part in message for part in (first, second, "extra.weight", "(3, 3)"))
    assert all(part in message for part in ("1 missing", "1 unexpected", "1 differ"))


def test_strict_false_loads_the_weights_that_match(tmp_path: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    first, second, *_ = state
    del state[first]
    torch.save(state, tmp_path / "x.th")
    other = randomize(Demucs(**TINY["Demucs"]), seed=9)
    before = other.state_dict()[first].clone()
    with pytest.warns(UserWarning, match=first):
        load_weights(other, tmp_path / "x.th", strict=False)
    assert torch.equal(other.state_dict()[first], before)
    assert torch.equal(other.state_dict()[second], state[second])


@pytest.mark.parametrize("name", CLASSES)
def test_package_has_same_tensors_in_both_formats_of_torch(tmp_path: Path, name: str) -> None:
    """Before torch 1.6 a class was written as a persistent object with its source."""
    network = randomize(CLASSES[name](**TINY[name]))
    state = network.state_dict()
    make_package = {"klass": CLASSES[name], "args": (), "kwargs": TINY[name], "state": state}
    for is_zip in (True, False):
        path = tmp_path / f"{is_zip}.th"
        torch.save(make_package, path, _use_new_zipfile_serialization=is_zip)
        assert (path.read_bytes()[:2] == b"PK") is is_zip
    assert have_equal_weights(load_model(tmp_path / "False.th"), load_model(tmp_path / "True.th"))
    assert have_equal_weights(load_model(tmp_path / "False.th"), network)


# ── arguments of a network ──


def save_package(tmp_path: Path, network: nn.Module, **wrong: Any) -> Path:
    path = tmp_path / "x.th"
    whole = {"klass": Demucs, "args": (), "kwargs": TINY["Demucs"], "state": network.state_dict()}
    torch.save({**whole, **wrong}, path)
    return path


def test_obsolete_arguments_give_a_warning(tmp_path: Path, network: nn.Module) -> None:
    path = save_package(
        tmp_path, network, kwargs={**TINY["Demucs"], "auto_sparsity": True, "lr": None}
    )
    with pytest.warns(UserWarning, match="'auto_sparsity', 'lr'"):
        assert have_equal_weights(load_model(path), network)


def test_positional_arguments_are_bound(tmp_path: Path, network: nn.Module) -> None:
    rest = {key: value for key, value in TINY["Demucs"].items() if key != "sources"}
    path = save_package(tmp_path, network, args=(TINY["Demucs"]["sources"],), kwargs=rest)
    assert have_equal_weights(load_model(path), network)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"args": (["a"],)}, "duplicate arguments"),
        ({"kwargs": {}}, "sources"),
        ({"kwargs": {**TINY["Demucs"], "sources": []}}, "sources"),
        ({"kwargs": {**TINY["Demucs"], "sources": ["a", "a"]}}, "sources"),
        ({"kwargs": {**TINY["Demucs"], "segment": -1}}, "segment"),
        ({"kwargs": {**TINY["Demucs"], "segment": float("nan")}}, "segment"),
        ({"kwargs": {**TINY["Demucs"], "samplerate": 0}}, "samplerate"),
        ({"kwargs": {**TINY["Demucs"], "channels": float("inf")}}, "channels"),
        ({"kwargs": {**TINY["Demucs"], "channels": 8}}, "differ"),
        ({"kwargs": {**TINY["Demucs"], "channels": "many"}}, "Demucs cannot be built"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, network: nn.Module, wrong: dict[str, Any], word: str
) -> None:
    with pytest.raises(CheckpointError, match=word):
        load_model(save_package(tmp_path, network, **wrong))


def test_integer_weights_are_refused(tmp_path: Path, network: nn.Module) -> None:
    state = {name: weight.int() for name, weight in network.state_dict().items()}
    with pytest.raises(CheckpointError, match="expected floating point"):
        load_model(save_package(tmp_path, network, state=state))


def test_missing_file_is_a_model_loading_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadingError, match=r"nowhere\.th"):
        load_model(tmp_path / "nowhere.th")


def test_build_uses_neither_memory_nor_random_numbers() -> None:
    """The state of the global generator is unchanged."""
    before = torch.get_rng_state()
    for name in CLASSES:
        network = build(Architecture(f"demucs.{name.lower()}.{name}", kwargs=TINY[name]))
        assert all(parameter.is_meta for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_does_not_import_the_compiler(tmp_path: Path) -> None:
    """`normal_` on a meta tensor would import torch._dynamo, which takes seconds."""
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    kwargs, state = TINY["HTDemucs"], network.state_dict()
    torch.save({"klass": HTDemucs, "kwargs": kwargs, "state": state}, tmp_path / "x.th")
    code = (
        "import sys; from demucs_infer.states import load_model; load_model(sys.argv[1]); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.th")], check=True)


def test_former_name_of_hdemucs_is_supported() -> None:
    network = build(Architecture("demucs.wdemucs.WDemucs", kwargs=TINY["HDemucs"]))
    assert type(network) is HDemucs


def test_loaded_network_is_independent_of_its_file(tmp_path: Path, network: nn.Module) -> None:
    path = save_package(tmp_path, network)
    found = load_model(path)
    path.write_bytes(b"")  # weights that were still mapped would be lost
    assert have_equal_weights(found, network)
    with torch.no_grad():
        next(found.parameters()).add_(1)


# ── trusted files ──


def test_trust_gives_a_warning_and_executes_the_file(tmp_path: Path, network: nn.Module) -> None:
    canary = tmp_path / "canary"
    path = save_package(
        tmp_path, network, training_args=malicious.Call(os.system, f"touch {canary}")
    )
    assert have_equal_weights(load_model(path), network)
    assert not canary.exists()
    with pytest.warns(UserWarning, match="can run any code"):
        assert have_equal_weights(load_model(path, trust=True), network)
    assert canary.exists()


def test_trust_builds_only_networks_of_this_package(tmp_path: Path, network: nn.Module) -> None:
    path = save_package(tmp_path, network, klass=nn.Linear)
    with (
        pytest.warns(UserWarning, match="trust=True"),
        pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"),
    ):
        load_model(path, trust=True)


# ── torchaudio's HDemucs ──

TORCHAUDIO = """
import sys, torch
from torchaudio.models import HDemucs
sources, path = sys.argv[1].split(","), sys.argv[2]
network = HDemucs(sources, channels=8, depth=6).eval()
generator = torch.Generator().manual_seed(0)
for parameter in network.parameters():
    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
mix = torch.load(path + ".mix", weights_only=True)
torch.save(network.state_dict(), path)
with torch.inference_mode():
    torch.save(network(mix), path + ".out")
"""


@pytest.fixture
def torchaudio_environment() -> Iterator[dict[str, str]]:
    """Yield the environment of a process that can import torchaudio's Python code."""
    folder = os.environ.get("DEMUCS_INFER_ORACLES", str(Path(__file__).parents[2] / ".oracles"))
    if not (Path(folder) / "torchaudio").is_dir():
        skip_or_fail(f"torchaudio is not in {folder} (DEMUCS_INFER_ORACLES)")
    yield {**os.environ, "PYTHONPATH": folder}


def test_torchaudio_checkpoint_gives_the_same_output(
    tmp_path: Path, torchaudio_environment: dict[str, str]
) -> None:
    path = tmp_path / "hdemucs_high_trained.pt"
    mix = 0.1 * torch.randn(1, 2, 30_000, generator=torch.Generator().manual_seed(2))
    torch.save(mix, f"{path}.mix")
    names = "drums,bass,other,vocals"
    command = [sys.executable, "-W", "ignore", "-c", TORCHAUDIO, names, str(path)]
    subprocess.run(command, env=torchaudio_environment, check=True)
    network = load_model(path)
    with torch.inference_mode():
        ours = network(mix)
    theirs = torch.load(f"{path}.out", weights_only=True)
    # The same sums in another order, through a dozen layers: class B.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert list(getattr(network, "sources")) == names.split(",")  # noqa: B009 - nn.Module's types


def test_torchaudio_checkpoint_of_other_stems_needs_its_sources(
    tmp_path: Path, torchaudio_environment: dict[str, str]
) -> None:
    path = tmp_path / "mine.pt"
    torch.save(torch.zeros(1, 2, 30_000), f"{path}.mix")
    command = [sys.executable, "-W", "ignore", "-c", TORCHAUDIO, "voice,rest", str(path)]
    subprocess.run(command, env=torchaudio_environment, check=True)
    with pytest.raises(CheckpointError, match="sources"):
        load_model(path)
    kwargs = {"sources": ["voice", "rest"], "channels": 8}
    assert load_model(path, architecture=Architecture("HDemucs", kwargs=kwargs)) is not None


def test_checksum_in_upstream_names_is_the_start_of_the_sha256(upstream_files: Path) -> None:
    for file in upstream_files.glob("*.th"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert digest.startswith(file.stem.rpartition("-")[2])
