"""Test that files of torch are read as torch reads them, and malicious ones have no effect."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demucs_infer.checkpoints.lazy_tensor import LazyTensor
from demucs_infer.checkpoints.reader import read_package
from demucs_infer.checkpoints.torch_file import Placeholder, read_torch_file
from demucs_infer.errors import CheckpointError
from tests.helpers import malicious_checkpoints as malicious

MAX_BYTES = 1.5e9

LOAD_ALL = """
import json, resource, sys, warnings
from pathlib import Path
from demucs_infer.errors import CheckpointError
from demucs_infer.states import load_model
warnings.simplefilter("ignore")
results = {}
for path in map(Path, sys.argv[1:]):
    try:
        load_model(path)
    except CheckpointError as error:
        results[path.name] = str(error)
    except BaseException as error:
        results[path.name] = f"!! {type(error).__name__}: {error}"
    else:
        results[path.name] = "!! loaded"
peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024
print(json.dumps({"results": results, "peak": peak}))
"""


@pytest.fixture(scope="module")
def load_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Load all malicious files in one new process."""
    folder = tmp_path_factory.mktemp("malicious")
    canary = folder / "canary"
    files = malicious.write_files(folder, canary)
    command = [sys.executable, "-c", LOAD_ALL, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "canary": canary.exists()}


def test_there_are_many_malicious_files() -> None:
    assert len(malicious.FILES) > 60


@pytest.mark.parametrize("name", malicious.FILES)
def test_malicious_file_gives_a_one_line_error(name: str, load_results: dict[str, Any]) -> None:
    message = load_results["results"][name]
    assert not message.startswith("!!"), message
    assert name in message, "the error names the file"
    assert "\n" not in message
    assert len(message) < 1000


def test_no_malicious_file_executes_anything(load_results: dict[str, Any]) -> None:
    assert not load_results["canary"]


def test_no_malicious_file_takes_much_memory(load_results: dict[str, Any]) -> None:
    assert load_results["peak"] < MAX_BYTES


def test_error_contains_the_name_that_a_file_requests(load_results: dict[str, Any]) -> None:
    for name in ("call_klass.th", "call_kwargs.th", "call_state.th", "klass_system.th"):
        assert "system" in load_results["results"][name]
    assert "subprocess.Popen" in load_results["results"]["klass.safetensors"]


REASONS = {
    "shape.th": "does not fit",
    "stride.th": "does not fit",
    "offset.th": "does not fit",
    "stride_negative.th": "does not fit",
    "storage.th": "truncated or forged",
    "bomb.th": "compressed",
    "method.th": "compressed",
    "unpacked.th": "compressed",
    "outside.th": "lies outside the file",
    "nested_known.th": "nested more than 16 deep",
    "nested_json.safetensors": "nested ",  # the parser of JSON refuses it, or what follows it
    "depth.th": "out of range: depth",
    "shared.th": "tensors overlap",
    "steps.th": "more than 300000 instructions",
    "laughs.th": "more than 4096 values",
    "nested_key.th": "key of a dictionary",
    "overlap.safetensors": "overlap",
    "zip64_locator.th": "zip directory is damaged",
    "zip64_entry.th": "outside the file",
    "call_module.th": "persistent object is not",
    "module_text.th": "persistent object is not",
}


@pytest.mark.parametrize("name", REASONS)
def test_malicious_file_is_refused_for_its_own_reason(
    name: str, load_results: dict[str, Any]
) -> None:
    """The error is the intended one, not a later failure."""
    assert REASONS[name] in load_results["results"][name]


def test_malicious_pickle_is_executed_by_python(tmp_path: Path) -> None:
    """Python's own reader executes these files, so they are not harmless by accident."""
    canary = tmp_path / "canary"
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    file = tmp_path / "call.pkl"
    file.write_bytes(malicious.FILES["call_bare.th"](canary))
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    assert canary.exists()


def test_tensors_equal_those_that_torch_saved(tmp_path: Path) -> None:
    base = torch.randn(6, 5)
    content = {
        "plain": base,
        "turned": base.t(),
        "slice": base[2:5, 1:3],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "whole": torch.arange(7),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(content, tmp_path / "x.th")
    found = read_torch_file(tmp_path / "x.th")
    assert isinstance(found, dict)
    for name, expected in content.items():
        weight = found[name]
        assert isinstance(weight, LazyTensor)
        assert torch.equal(weight.read(), expected.detach()), name
        assert weight.dtype == expected.dtype


VALUES = {
    "numbers": [0, 1, -1, 255, 256, 2**31, -(2**63), 10**30, 1.5, -0.0],
    "words": ["", "é", "x" * 300, b"abc"],
    "nothing": [None, True, False],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "fraction": Fraction(39, 5),
    "ordered": OrderedDict(a=1, b=[{}]),
    "size": torch.Size([2, 3]),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_plain_values_are_read_unchanged(tmp_path: Path, protocol: int, legacy: bool) -> None:
    same = VALUES["words"]
    content = {**VALUES, "again": same}
    path = tmp_path / "x.th"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = read_torch_file(path)
    if protocol < 3:  # bytes were text in disguise then; nothing in a checkpoint is either
        assert isinstance(found, dict)
        found["words"][-1] = b"abc"
        found["again"][-1] = b"abc"
    assert found == content


def test_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    base = torch.randn(50)
    content = {"a": base[:10], "b": base.half(), "c": base[20:]}
    path = tmp_path / "x.th"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    found = read_torch_file(path)
    assert isinstance(found, dict)
    for name, expected in content.items():
        assert torch.equal(found[name].read(), expected)


def test_object_of_an_unknown_class_is_a_placeholder(tmp_path: Path) -> None:
    class Config:
        pass

    Config.__module__, Config.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    program = malicious.dumps(
        {"x": malicious.Call(malicious.GlobalName("omegaconf.dictconfig", "DictConfig"), {"a": 1})}
    )
    (tmp_path / "x.th").write_bytes(malicious.make_archive(program))
    found = read_torch_file(tmp_path / "x.th")
    assert isinstance(found, dict)
    assert isinstance(found["x"], Placeholder)
    assert found["x"].name == "omegaconf.dictconfig.DictConfig"
    assert "omegaconf" not in sys.modules


def test_unknown_escape_in_a_string_is_damage(tmp_path: Path) -> None:
    (tmp_path / "x.th").write_bytes(b"\x80\x02" + rb"S'\o'" + b"\n.")
    with pytest.raises(CheckpointError, match="damaged pickle"):
        read_torch_file(tmp_path / "x.th")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_file_raises_only_checkpoint_errors(tmp_path: Path, data: st.DataObject) -> None:
    """Wrong bytes give a value or a `CheckpointError`, never another error."""
    file = io.BytesIO()
    content = {"w": torch.zeros(3), "l": [1, "a", (2.0, None)], "f": Fraction(1, 3)}
    torch.save(content, file, _use_new_zipfile_serialization=data.draw(st.booleans()))
    raw = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.th"
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, 40]))])
    with contextlib.suppress(CheckpointError):
        read_torch_file(path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=40))
def test_arbitrary_opcodes_raise_only_checkpoint_errors(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "any.th"
    path.write_bytes(malicious.make_archive(b"\x80\x02" + program + b"."))
    with contextlib.suppress(CheckpointError):
        read_torch_file(path)


def test_package_never_unpickles_unless_trusted() -> None:
    """No module uses a reader that can execute code, except for trusted files."""
    root = Path(__file__).parents[2] / "demucs_infer"
    for path in root.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "sys.modules[" not in text
        assert "pickle.load" not in text
        if path != root / "checkpoints/reader.py":
            assert "torch.load" not in text
            assert "weights_only=False" not in text
    trusted = (root / "checkpoints/reader.py").read_text("utf-8")
    assert trusted.count("weights_only=False") == trusted.count("torch.load(") == 1
    assert "def _unpickle_trusted" in trusted.split("torch.load(")[0].split("\n\n\n")[-1]
    for path in (root / "states.py", *(root / "checkpoints").glob("*.py")):
        assert "importlib" not in path.read_text("utf-8")


def test_call_in_a_pickle_is_a_placeholder(tmp_path: Path) -> None:
    program = pickle.dumps(malicious.Call(print, "hello"), protocol=4)
    (tmp_path / "x.th").write_bytes(malicious.make_archive(program))
    found = read_torch_file(tmp_path / "x.th")
    assert isinstance(found, Placeholder)
    assert found.is_call
    assert found.name == "builtins.print"


def test_header_of_safetensors_is_utf_8_alone(tmp_path: Path) -> None:
    """`json` detects UTF-16 by zeros, and imports a codec for it."""
    header = "{}".encode("utf-16-le")
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="its header is not valid JSON"):
        read_package(tmp_path / "x.safetensors")
