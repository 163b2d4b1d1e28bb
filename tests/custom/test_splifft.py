"""Test that configurations of the splifft package are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from demucs_infer import Config, ConfigError

MODEL: dict[str, Any] = {
    "identifier": "small",
    "model_type": "roformer",
    "model": {"chunk_size": 8000, "output_stem_names": ["vocals", "drums", "other"], "dim": 12},
}
DERIVED: dict[str, Any] = {
    "instrum": {"operation": "subtract", "stem_name": "mixture", "by_stem_name": "vocals"},
    "rest": {"operation": "sum", "stem_names": ["drums", "other"]},
}
FULL: dict[str, Any] = MODEL | {
    "transform": {"kind": "stft", "n_fft": 4096, "hop_length": 441, "conv_dtype": "float16"},
    "audio_io": {"target_sample_rate": 22050, "force_channels": 1},
    "inference": {
        "batch_size": 4,
        "requested_stems": ["vocals"],
        "force_weights_dtype": "float16",
        "use_autocast_dtype": "bfloat16",
        "model_device": "cpu",
        "io_device": None,
        "compile_model": {"fullgraph": True, "dynamic": False, "mode": "default"},
    },
    "normalization": {"enabled": True},
    "waveform_chunking": {
        "method": "overlap_add_windowed",
        "overlap_ratio": 0.75,
        "window_shape": "linear_fade",
        "padding_mode": "constant",
    },
    "sequence_chunking": None,
    "masking": {"add_sub_dtype": "float32", "out_dtype": None},
    "derived_stems": DERIVED,
    "output": {"stem_names": "all", "file_format": "wav", "bit_rate": 24},
    "experimental": {"note": 1},
}


def test_all_sections_are_translated() -> None:
    assert Config.from_dict(FULL) == Config.from_dict(
        MODEL
        | {
            "stft": {"n_fft": 4096, "hop_length": 441, "win_length": 2048},
            "audio": {"sample_rate": 22050, "channels": 1, "normalize": True},
            "inference": {
                "batch_size": 4,
                "weights_dtype": "float16",
                "precision": "bf16",
                "device": "cpu",
                "compile": True,
            },
            "chunking": {"overlap": 0.75, "window": "linear_fade", "padding": "constant"},
            "derived_stems": {"instrum": "mixture - vocals", "rest": "drums + other"},
            "output": {"stems": ["vocals"], "format": "wav", "bits": 24},
        }
    )


def test_file_is_read_as_it_is_and_written_in_our_format(tmp_path: Path) -> None:
    path = tmp_path / "splifft.json"
    path.write_text(json.dumps(FULL))
    config = Config.from_file(path, ["waveform_chunking.overlap_ratio=0.5"])
    assert config.overlap == 0.5
    assert Config.from_dict(config.to_dict()) == config


def test_omitted_sections_have_the_defaults() -> None:
    config = Config.from_dict(MODEL | {"waveform_chunking": {}, "audio_io": {}})
    assert config == Config.from_dict(MODEL)


@pytest.mark.parametrize(
    ("listed", "stems"),
    [
        (["drums"], ("drums",)),
        (["instrum", "drums"], ("instrum", "drums")),
    ],
    ids=["of the model", "derived"],
)
def test_only_listed_stems_are_returned(listed: list[str], stems: tuple[str, ...]) -> None:
    output = {"stem_names": listed}
    config = Config.from_dict(MODEL | {"masking": {}, "derived_stems": DERIVED, "output": output})
    assert config.output.stems == stems
    assert bool(config.derived_stems) == ("instrum" in stems)


def test_all_problems_are_reported_with_the_paths_of_the_file() -> None:
    data = FULL | {
        "model_type": 3,
        "audio_io": {"target_sample_rate": 0, "channels": 2},
        "inference": {"use_autocast_dtype": "float8", "compile_model": True, "batch_size": "many"},
        "normalisation": {},
        "waveform_chunking": {"overlap_ratio": 1, "method": "none", "window_shape": "han"},
        "transform": {"kind": "stft", "n_fft": 255, "win_length": 255},
        "sequence_chunking": {},
        "masking": 3,
        "derived_stems": {"x": {"operation": "add"}},
        "output": {"stem_names": [], "file_format": 3},
    }
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(data, source="file.json")
    first, *lines = str(caught.value).splitlines()
    assert first == "file.json: 16 problems"
    assert sorted(line.partition(":")[0].strip() for line in lines) == [
        "audio_io.channels",
        "audio_io.target_sample_rate",
        "derived_stems.x",
        "inference.batch_size",
        "inference.compile_model",
        "inference.use_autocast_dtype",
        "masking",
        "model_type",
        "normalisation",
        "output.file_format",
        "output.stem_names",
        "sequence_chunking",
        "transform",
        "waveform_chunking.method",
        "waveform_chunking.overlap_ratio",
        "waveform_chunking.window_shape",
    ]
    message = str(caught.value)
    assert "audio_io.channels: unknown key; did you mean 'force_channels'?" in message
    assert "normalisation: unknown key; did you mean 'normalization'?" in message
    assert "transform: n_fft must be even, got 255" in message


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("transform", {"kind": "mel"}, 'transform.kind: expected "stft", got "mel"'),
        ("derived_stems", [], r"derived_stems: expected an object, got \[\]"),
        (
            "derived_stems",
            {"x": DERIVED["instrum"] | {"by_stem_name": "bass"}},
            "derived_stems: .*no stem named 'bass'",
        ),
        ("inference", {"requested_stems": ["bass"]}, "inference.requested_stems: no stem named"),
        ("output", {"stem_names": ["bass"]}, "output.stem_names: no stem named 'bass'"),
    ],
)
def test_invalid_section_is_refused(section: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(MODEL | {"waveform_chunking": {}, section: value})
