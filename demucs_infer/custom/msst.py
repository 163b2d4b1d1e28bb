"""Translate configuration files of Music-Source-Separation-Training to the format of `Config`.

They are YAML files with the sections `audio`, `model` (or a section that `model` names), `training`
and `inference`. Stems are the same as with that tool: windows of `chunk_size` samples start every
`chunk_size // num_overlap` samples, fade over a tenth of their length, and read the track reflected
at its ends; those of htdemucs are averaged without fades. Keys that only training needs are
ignored, and so is `inference.batch_size`, which depends on the machine and not on the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from demucs_infer.checkpoints.bounded_yaml import YamlLimits, load_yaml
from demucs_infer.checkpoints.mistaken_files import describe_mistaken_file
from demucs_infer.custom.community import PREFIX, detect_type
from demucs_infer.custom.json_schema import INVALID, SchemaReader, describe_value, to_plain_data
from demucs_infer.custom.translation import Translation
from demucs_infer.errors import ConfigError

LIMITS = YamlLimits(num_bytes=2**18, num_events=20_000, depth=12)
"""Limits for configurations; published ones have less than 16 KB and 1000 events."""

_NETWORK_SECTIONS = ("audio", "model", "training", "kwargs")
_KEYS = {
    "audio": ("chunk_size", "dim_t", "hop_length", "num_channels", "sample_rate"),
    "training": ("channels", "instruments", "samplerate", "segment", "target_instrument"),
    "inference": ("chunk_size", "dim_t", "normalize", "num_overlap", "overlap_size"),
}
"""Keys that are read, in addition to those of the sections for the network."""


def find_pair(name: str, repo: str | os.PathLike[str] | None) -> tuple[Path, Path] | None:
    """Return `NAME.yaml` and `NAME.ckpt` of a folder; None if there are no such files."""
    if repo is None:
        return None
    checkpoint = Path(repo) / f"{name}.ckpt"
    config = checkpoint.with_suffix(".yaml")
    return (config, checkpoint) if checkpoint.is_file() and config.is_file() else None


def read_yaml(path: Path) -> Mapping[str, object]:
    """Read a YAML file of plain values, whose content must be a table."""
    try:
        with path.open("rb") as stream:
            content = stream.read(LIMITS.num_bytes + 1)
        if mistake := describe_mistaken_file(content):
            raise ConfigError(f"it is {mistake}")
        data = load_yaml(content, LIMITS, tuples=True)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a table, got {describe_value(data)}")
    if not is_msst(data):
        raise ConfigError(
            f"{path}: expected a configuration of Music-Source-Separation-Training, with a section "
            "`training`; a configuration in the format of demucs-infer is a JSON file"
        )
    return data


def is_msst(data: Mapping[str, object]) -> bool:
    """Return whether `data` has the section that only these files have."""
    return "training" in data


def find_unknown_overrides(data: Mapping[str, object], overrides: Sequence[str]) -> list[str]:
    """Return a problem for each override of a key that `data` lacks and that is not read."""
    known = {"model", "model_type", *_KEYS, *data}
    known |= {f"{section}.{key}" for section, keys in _KEYS.items() for key in keys}
    for section, table in data.items():
        known |= {f"{section}.{key}" for key in table} if isinstance(table, Mapping) else set()
    problems = []
    for override in overrides:
        path = override.partition("=")[0].strip()
        section, _, key = path.partition(".")
        if path in known or (key and section in ("model", "kwargs", data.get("model"))):
            continue
        if ".".join(path.split(".")[:2]) in known:  # a key of a table in a section
            continue
        close = get_close_matches(path, sorted(known), 1)
        problems.append(f"{path}: there is no such key{f'; {close[0]}?' if close else ''}")
    return problems


def translate(data: Mapping[str, object], name: str = "") -> Translation:
    """Translate and validate a configuration; `name` becomes its `identifier`."""
    reader = _Reader(data)
    model_type = reader.read_type()
    stems, target = reader.read_stems()
    sections = reader.read_network_sections()
    rate, chunk, hop = reader.read_sizes(is_demucs=model_type == "htdemucs")
    channels = reader.read_channels(model_type)
    if "roformer" in model_type or "conformer" in model_type:
        reader.check_count(1 if target else len(stems))
    normalize = reader.get("inference.normalize", bool, False)
    if reader.problems:
        return Translation({}, reader.problems)
    result = Translation({"model_type": f"{PREFIX}{model_type}"})
    if name:
        result.data["identifier"] = name
    for key, value in {
        "model.chunk_size": chunk,
        "model.output_stem_names": [target] if target else stems,
        "model.input_channels": channels,
        "model.sections": to_plain_data(sections),  # tuples as lists, as in every configuration
        "audio.sample_rate": rate,
        "audio.channels": channels,
        "audio.normalize": normalize,
        "inference.hop_size": hop,
        "chunking.profile": "msst",
        "chunking.window": "ones" if model_type == "htdemucs" else "edge_fade",
        "chunking.padding": "constant" if model_type == "htdemucs" else "reflect",
    }.items():
        result.add(key, key, value)
    if target is not None:
        _add_rest(result, target, stems)
    return result


def _add_rest(result: Translation, target: str, stems: Sequence[str]) -> None:
    """Add the mixture minus the target: under the name of the other stem, if there is only one."""
    others = [stem for stem in stems if stem != target]
    if others:
        name = others[0] if len(others) == 1 else f"minus_{target}"
        result.data["derived_stems"] = {name: f"mixture - {target}"}


class _Reader:
    """Read values of a file by their paths, and collect the problems."""

    def __init__(self, data: Mapping[str, object]) -> None:
        self._data = data
        self._schema = SchemaReader()
        for section in ("audio", "training", "inference"):
            if not isinstance(data.get(section, {}), Mapping):
                text = f"expected a table, got {describe_value(data[section])}"
                self._schema.add_problem(section, text)

    @property
    def problems(self) -> list[str]:
        return self._schema.problems

    def get(self, path: str, kind: Any, default: Any = None, minimum: int | None = None) -> Any:
        """Return a value; `default` if it is missing, null or reported as a problem."""
        section, _, key = path.partition(".")
        table = self._data.get(section)
        value = table.get(key) if isinstance(table, Mapping) else None
        if value is None:
            return default
        result = self._schema.read(kind, value, path)
        if result is INVALID:
            return default
        if minimum is not None and result < minimum:  # type: ignore[operator]
            self._schema.add_problem(path, f"must be at least {minimum}, got {result}")
            return default
        return result

    def read_type(self) -> str:
        """Return the type of the network, as it is declared or detected from the keys."""
        try:
            return detect_type(self._data)
        except ConfigError as error:
            self._schema.add_problem("", str(error))
            return ""

    def read_stems(self) -> tuple[list[str], str | None]:
        """Return all instruments, and the one that the network separates, or None for all."""
        stems = self.get("training.instruments", list[str], [])
        target = self.get("training.target_instrument", str)
        if not stems and not self.problems:
            self._schema.add_problem("training.instruments", "required: a list of stems")
        for stem in {stem for stem in stems if stems.count(stem) > 1}:
            self._schema.add_problem("training.instruments", f"duplicate entry {stem!r}")
        return stems, target or None

    def check_count(self, expected: int) -> None:
        """Compare the number of stems of a RoFormer with that of the instruments."""
        count = self.get("model.num_stems", int, 1, 1)
        if count != expected and not self.problems:
            text = f"must be {expected}, as follows from the section training, got {count}"
            self._schema.add_problem("model.num_stems", text)

    def read_network_sections(self) -> dict[str, object]:
        """Return the sections from which the network is built, and check their values."""
        model = self._data.get("model")
        if not isinstance(model, str | Mapping | None):
            self._schema.add_problem("model", f"expected a table, got {describe_value(model)}")
        named = [model] if isinstance(model, str) else []
        sections = {
            name: self._data[name] for name in (*_NETWORK_SECTIONS, *named) if name in self._data
        }
        training = sections.get("training")
        if isinstance(training, Mapping):  # the rest of it is for training only
            keys = ("instruments", "target_instrument", "samplerate", "channels", "segment")
            sections["training"] = {
                "target_instrument": None,
                **{key: training[key] for key in keys if key in training},
            }
        for section, value in sections.items():
            for problem in _find_values(value, section):
                self.problems.append(problem)
        return sections

    def read_sizes(self, *, is_demucs: bool) -> tuple[int, int, int]:
        """Return sample rate, window and hop."""
        if is_demucs:
            rate = self.get("training.samplerate", int, 44100, 1000)
            chunk = int(rate * self.get("training.segment", float, 0.0, 0))
            missing = "training.segment"
        else:
            rate = self.get("audio.sample_rate", int, 44100, 1000)
            chunk = self.get("inference.chunk_size", int, 0, 1)
            chunk = chunk or self.get("audio.chunk_size", int, 0, 1)
            if not chunk:  # in the oldest configurations
                frames = self.get("inference.dim_t", int, 0, 2) or self.get("audio.dim_t", int, 0)
                chunk = self.get("audio.hop_length", int, 0, 1) * max(0, frames - 1)
            missing = "audio.chunk_size"
        if not chunk and not self.problems:
            self._schema.add_problem(missing, "required key is missing")
        overlap = self.get("inference.overlap_size", int, None, 0)
        if overlap is not None:
            hop = chunk - overlap
        else:
            hop = chunk // self.get("inference.num_overlap", int, 2, 1)
        if chunk and hop < 1:
            self._schema.add_problem(
                "inference", f"the overlap must be less than the window of {chunk} samples"
            )
        return rate, chunk, hop

    def read_channels(self, model_type: str) -> int:
        """Return the channels of the network."""
        default = self.get("audio.num_channels", int, 2, 1)
        if "roformer" in model_type or "conformer" in model_type:
            return 2 if self.get("model.stereo", bool, False) else 1
        # Bandit networks have one input channel, and take those of the audio one by one.
        paths = {"htdemucs": "training.channels", "scnet": "model.audio_channels"}
        if model_type not in paths:
            return int(default)
        return int(self.get(paths[model_type], int, 2, 1))


_SMALL = re.compile(r"depth|layers|heads|num_(?!overlap)|^n_(?!fft)|growth|_blocks|expansion|mult$")
_MAX_SMALL, _MAX_NUMBER, _MAX_TEXT = 1024, 10**7, 200


def _find_values(value: object, path: str) -> list[str]:
    """Return a problem for each value that is not plain, or far too large for any network."""
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            return [f"{path}: expected names, got the key {describe_value(bad[0])}"]
        return [line for key, item in value.items() for line in _find_values(item, f"{path}.{key}")]
    if isinstance(value, list | tuple):
        return [line for item in value for line in _find_values(item, path)][:1]
    if isinstance(value, str):
        return [] if len(value) <= _MAX_TEXT else [f"{path}: text of {len(value)} characters"]
    if value is None or isinstance(value, bool):
        return []
    if not isinstance(value, int | float):
        return [f"{path}: expected a number, a text or a list, got {describe_value(value)}"]
    limit = _MAX_SMALL if _SMALL.search(path.rpartition(".")[2]) else _MAX_NUMBER
    return [] if abs(value) <= limit else [f"{path}: must be at most {limit}, got {value}"]
