"""Load mutated checkpoints, bags and configurations; nothing may be executed or opened.

Every loading may end with a network or with an error of the package's tree; it may import nothing,
open no other file, start no process, and take at most 10 s and 2 GB.
"""

import io
import json
import random
import shutil
import struct
import sys
import tempfile
import threading
import traceback
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from demucs_infer.checkpoints.reader import Architecture
from demucs_infer.custom.config import Config
from demucs_infer.demucs import Demucs
from demucs_infer.errors import DemucsError
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.pretrained import get_model
from demucs_infer.states import load_model, serialize_model
from tests.chaos.fork_runner import run_cases
from tests.chaos.mutation import (
    choose,
    mutate_bytes,
    mutate_json,
    mutate_legacy,
    mutate_safetensors,
    mutate_yaml,
    mutate_zip,
    splice,
)
from tests.chaos.report import Limits, Report
from tests.helpers.malicious_checkpoints import SMALL
from tests.helpers.networks import TINY, randomize

FORBIDDEN = ("exec", "compile", "import", "open", "os.", "subprocess.", "socket.", "ctypes.")
FORBIDDEN += ("pickle.", "marshal.", "code.__new__", "shutil.", "glob.", "tempfile.", "pty.")


@dataclass(frozen=True)
class Seed:
    """A valid file, and how it is mutated and read."""

    name: str
    suffix: str
    kind: str
    data: bytes


def make_seeds() -> list[Seed]:
    """Return small valid files of every layout."""
    network = randomize(Demucs(**SMALL))
    package = serialize_model(network, {"epochs": 3, "note": [1, ("a", None)]})
    transformer = randomize(HTDemucs(**TINY["HTDemucs"]))
    big = serialize_model(transformer, {})
    lightning = {"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}
    seeds = []
    for name, content in {
        "package": package,
        "quantized": {**package, "state": _quantize(network)},
        "uniform": {**package, "state": _quantize(network, bits=5)},
        "lightning": lightning,
        "weights": network.state_dict(),
    }.items():
        seeds.append(Seed(name, ".th", "zip", _save(content)))
        seeds.append(Seed(f"{name}-legacy", ".th", "legacy", _save(content, legacy=True)))
    metadata = {"klass": "demucs.demucs.Demucs", "args": "[]", "kwargs": json.dumps(SMALL)}
    seeds += [
        Seed("package", ".safetensors", "safetensors", _save_safetensors(network, metadata)),
        Seed("weights", ".safetensors", "safetensors", _save_safetensors(network, {})),
        Seed("transformer", ".th", "zip", _save(big)),
        Seed(
            "bag",
            ".yaml",
            "yaml",
            b"models:\n- 9d0a6f1c\n- 9d0a6f1c\nweights:\n- [1, 0]\n- [0, 1.0]\n",
        ),
        Seed("bag-segment", ".yaml", "yaml", b"models: ['9d0a6f1c']\nsegment: 44\n"),
        Seed("config", ".json", "json", json.dumps(_example_config()).encode()),
    ]
    return seeds


def _example_config() -> dict[str, object]:
    folder = Path(__file__).parents[2] / "examples/ext_project/hpss_example"
    return Config.load(folder / "config.json").to_dict()


def _quantize(network: Any, bits: int | None = None) -> dict[str, Any]:
    import copy

    import diffq

    network = copy.deepcopy(network)
    if bits is None:
        quantizer = diffq.DiffQuantizer(network, min_size=0.0001, group_size=4)
    else:
        quantizer = diffq.UniformQuantizer(network, min_size=0.0001, bits=bits)
    return {**quantizer.get_quantized_state(), "__quantized": True}


def _save(content: Any, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def _save_safetensors(network: Any, metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for name, weight in network.state_dict().items():
        data = weight.numpy().tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


class Fuzzer:
    """Makes the case of a number, and loads it."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.seed = limits.seed
        self.canary = folder.parent / "canary"
        self.seeds = make_seeds()
        self._events: list[str] = []
        self._is_armed = False
        self._is_hooked = False
        (folder / "9d0a6f1c.th").write_bytes(self.seeds[0].data)

    def make(self, number: int) -> tuple[Seed, bytes]:
        """Return the seed and the mutated file of a case."""
        rng = random.Random(f"{self.seed}:{number}")
        seed: Seed = choose(rng, self.seeds)
        if seed.name == "transformer" and rng.random() < 0.7:  # it takes longer
            seed = self.seeds[0]
        roll = rng.random()
        if roll < 0.15:
            return seed, mutate_bytes(seed.data, rng)
        if roll < 0.17:
            return seed, splice(seed.data, choose(rng, self.seeds).data, rng)
        return seed, self.mutate(seed.kind, seed.data, rng)

    def mutate(self, kind: str, data: bytes, rng: random.Random) -> bytes:
        """Return a file mutated by the structure of its kind."""
        match kind:
            case "zip":
                return mutate_zip(data, rng, str(self.canary))
            case "legacy":
                return mutate_legacy(data, rng, str(self.canary))
            case "safetensors":
                return mutate_safetensors(data, rng)
            case "yaml":
                return mutate_yaml(data, rng)
        return mutate_json(data, rng)

    def describe(self, number: int) -> str:
        """Return how to make a case again."""
        seed, data = self.make(number)
        name = f"{seed.name}{seed.suffix}, {len(data)} bytes"
        return f"--seed {self.seed} --first {number} --count 1 ({name})"

    def warm_up(self) -> None:
        """Load every seed, so that nothing is left to import."""
        for seed in self.seeds:
            path = self.folder / f"case{seed.suffix}"
            path.write_bytes(seed.data)
            self._load(path)
            path.unlink()
        for number in range(300):
            self.run(number, is_armed=False)

    def _load(self, path: Path) -> None:
        if path.suffix == ".json":
            Config.load(path)
        elif path.suffix == ".yaml":
            get_model(path.stem, self.folder)
        else:
            load_model(path, architecture=Architecture("Demucs", kwargs=SMALL))

    def run(self, number: int, *, is_armed: bool = True) -> str:
        """Load the file of a case, and return the outcome."""
        return self.load(*self.make(number), is_armed=is_armed)

    def load(self, seed: Seed, data: bytes, *, is_armed: bool = True) -> str:
        """Load a file that was made from a seed, and return the outcome."""
        path = self.folder / f"case{seed.suffix}"
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        path.write_bytes(data)
        if is_armed and not self._is_hooked:
            sys.addaudithook(self._audit)  # of the forked process: it cannot be removed
            self._is_hooked = True
        self._events.clear()
        self._is_armed = is_armed
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._load(path)
            outcome = "loaded"
        except DemucsError as error:
            self._is_armed = False
            outcome = f"refused: {type(error).__name__}"
            if len(str(error)) > 5000 or "\n" in str(error) and seed.suffix != ".json":
                outcome = f"!message {type(error).__name__}: {len(str(error))} characters"
        except BaseException as error:
            self._is_armed = False
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name} line {frame.lineno}"
            outcome = f"!exception {type(error).__name__} in {place}: {error}"
        finally:
            self._is_armed = False
            path.unlink(missing_ok=True)
        if self._events:
            outcome = f"!audit {self._events[0]}: {self._events}"
        if self.canary.exists():
            self.canary.unlink()
            outcome = f"!executed code: {seed.name}"
        return outcome

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_armed or not event.startswith(FORBIDDEN):
            return
        if threading.current_thread() is not threading.main_thread():
            return
        if event in ("os.listdir", "os.scandir") and str(arguments[0]) == str(self.folder):
            return  # of the folder that was asked for
        if event in ("compile", "exec") and _is_annotation(sys._getframe(1)):
            return
        if (
            event == "open"
            and str(arguments[0]).startswith(f"{self.folder}/")
            and arguments[1] in ("rb", "r")
        ):
            return
        self._events.append(f"{event} {str(arguments)[:200]}")


def _is_annotation(frame: FrameType | None) -> bool:
    """Return whether the annotation of a dataclass of our own is evaluated."""
    while frame is not None:
        if frame.f_code.co_filename == typing.__file__:
            return True
        frame = frame.f_back
    return False


def run(limits: Limits) -> Report:
    """Load mutated files until the limits are reached."""
    report = Report("checkpoints", limits.seed)
    top = Path(tempfile.mkdtemp(prefix="chaos-checkpoints-"))
    folder = top / "models"
    folder.mkdir()
    torch.set_num_threads(1)
    try:
        fuzzer = Fuzzer(folder, limits)
        fuzzer.warm_up()
        run_cases(report, limits, fuzzer.run, fuzzer.describe)
    finally:
        shutil.rmtree(top)
    return report
