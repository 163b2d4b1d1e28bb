"""Translate configuration files of the splifft package to the format of `Config`.

Results are the same as with splifft as far as the formats allow. Keys that only affect the speed or
the rounding are ignored: `transform.conv_dtype` and the dtypes of `masking` (spectra are float32
here), the keys in `inference.compile_model`, and `experimental`. Models that do not return audio
(with `sequence_chunking`, or a transform other than "stft") are rejected.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from demucs_infer.custom.json_schema import describe_value, suggest_name
from demucs_infer.custom.translation import Translation

_SECTIONS: dict[str, dict[str, str | None]] = {
    "audio_io": {"target_sample_rate": "audio.sample_rate", "force_channels": "audio.channels"},
    "inference": {
        "batch_size": "inference.batch_size",
        "requested_stems": "output.stems",
        "force_weights_dtype": "inference.weights_dtype",
        "use_autocast_dtype": "inference.precision",
        "model_device": "inference.device",
        "io_device": "inference.io_device",
        "compile_model": "inference.compile",
    },
    "normalization": {"enabled": "audio.normalize"},
    "waveform_chunking": {
        "method": None,
        "overlap_ratio": "chunking.overlap",
        "window_shape": "chunking.window",
        "padding_mode": "chunking.padding",
    },
    "transform": {
        "kind": None,
        "n_fft": "stft.n_fft",
        "hop_length": "stft.hop_length",
        "win_length": "stft.win_length",
        "window_shape": "stft.window",
        "normalized": "stft.normalized",
        "conv_dtype": None,
    },
    "masking": {"add_sub_dtype": None, "out_dtype": None},
    "output": {
        "stem_names": "output.stems",
        "file_format": "output.format",
        "bit_rate": "output.bits",
    },
}
_UNCHANGED = ("identifier", "model_type", "model")
_OTHER = ("derived_stems", "sequence_chunking", "experimental")
_FIXED = {"waveform_chunking.method": "overlap_add_windowed", "transform.kind": "stft"}
_DEFAULT_IF_NULL = ("model_device", "io_device", "use_autocast_dtype", "compile_model")
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_OWN_SECTIONS = {*_SECTIONS, "sequence_chunking", "experimental"} - {"inference", "output"}


def is_splifft(data: Mapping[str, object]) -> bool:
    """Return whether `data` has a section that only splifft has."""
    return not _OWN_SECTIONS.isdisjoint(data)


def translate(data: Mapping[str, object]) -> Translation:
    """Translate a configuration of splifft; values are validated by `Config`."""
    result = Translation({key: copy.deepcopy(data[key]) for key in _UNCHANGED if key in data})
    names = (*_UNCHANGED, *_SECTIONS, *_OTHER)
    for key in data:
        if key not in names:
            result.problems.append(f"{key}: unknown key{suggest_name(key, names)}")
    for section, keys in _SECTIONS.items():
        values = data.get(section)
        if isinstance(values, Mapping):
            _translate_section(result, section, keys, values)
        elif values is not None:
            text = f"expected an object, got {describe_value(values)}"
            result.problems.append(f"{section}: {text}")
    if data.get("sequence_chunking") is not None:
        result.problems.append(
            "sequence_chunking: models that do not return audio are not supported"
        )
    _translate_derived_stems(result, data.get("derived_stems"))
    _select_stems(result)
    return result


def _translate_section(
    result: Translation,
    section: str,
    keys: Mapping[str, str | None],
    values: Mapping[str, object],
) -> None:
    if section == "transform":
        if values.get("kind") != "stft":
            kind = describe_value(values.get("kind"))
            result.problems.append(f'transform.kind: expected "stft", got {kind}')
            return
        result.add("transform.win_length", "stft.win_length", 2048)  # its default, not n_fft
    for key, value in values.items():
        path = f"{section}.{key}"
        target = keys.get(key)
        if key not in keys:
            result.problems.append(f"{path}: unknown key{suggest_name(key, keys)}")
        elif path in _FIXED and value != _FIXED[path]:
            text = f'expected "{_FIXED[path]}", got {describe_value(value)}'
            result.problems.append(f"{path}: {text}")
        elif target is not None and not (value is None and key in _DEFAULT_IF_NULL):
            _translate_value(result, path, target, value)


def _translate_value(result: Translation, path: str, target: str, value: object) -> None:
    if path == "inference.use_autocast_dtype":
        if not isinstance(value, str) or value not in _PRECISIONS:
            listing = ", ".join(map(describe_value, _PRECISIONS))
            text = f"expected one of {listing}, got {describe_value(value)}"
            result.problems.append(f"{path}: {text}")
            return
        value = _PRECISIONS[value]
    elif path == "inference.compile_model":
        if not isinstance(value, Mapping):
            text = f"expected an object, got {describe_value(value)}"
            result.problems.append(f"{path}: {text}")
            return
        value = True
    elif path == "output.stem_names" and value == "all":
        return
    result.add(path, target, value)


def _translate_derived_stems(result: Translation, rules: object) -> None:
    """Write rules as terms: `{"operation": "subtract", ...}` becomes `a - b`."""
    if rules is None:
        return
    if not isinstance(rules, Mapping):
        text = f"expected an object, got {describe_value(rules)}"
        result.problems.append(f"derived_stems: {text}")
        return
    for name, rule in rules.items():
        terms = _rule_terms(rule)
        if terms is None:
            result.problems.append(
                f"derived_stems.{name}: expected "
                '{"operation": "subtract", "stem_name": ..., "by_stem_name": ...} or '
                f'{{"operation": "sum", "stem_names": [...]}}, got {describe_value(rule)}'
            )
        else:
            result.add(f"derived_stems.{name}", f"derived_stems.{name}", terms)


def _rule_terms(rule: object) -> str | None:
    """Return a rule as terms; None if it is malformed."""
    if not isinstance(rule, Mapping):
        return None
    operation, keys = rule.get("operation"), set(rule) - {"operation"}
    operands: object = None
    if operation == "subtract" and keys == {"stem_name", "by_stem_name"}:
        operands = [rule["stem_name"], rule["by_stem_name"]]
    elif operation == "sum" and keys == {"stem_names"}:
        operands = rule["stem_names"]
    if not isinstance(operands, list | tuple) or not operands:
        return None
    if not all(isinstance(operand, str) and operand for operand in operands):
        return None
    return (" - " if operation == "subtract" else " + ").join(operands)


def _select_stems(result: Translation) -> None:
    """Remove the derived stems if the stems to write are listed and none of them is derived."""
    output, derived = result.data.get("output"), result.data.get("derived_stems")
    if result.paths.get("output.stems") != "output.stem_names" or not isinstance(output, dict):
        return
    stems: Sequence[object] = output["stems"] if isinstance(output["stems"], list) else ()
    if isinstance(derived, dict) and stems and not any(name in derived for name in stems):
        del result.data["derived_stems"]
