"""Test that configurations are parsed strictly and all problems are reported with paths."""

import json
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NewType, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demucs_infer import Config, ConfigError
from demucs_infer.custom.config import (
    AudioConfig,
    ChunkingConfig,
    InferenceConfig,
    LazyModelConfig,
    OutputConfig,
    StftConfig,
    apply_overrides,
)
from demucs_infer.custom.json_schema import SchemaReader, json_schema, validate

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = [
    EXAMPLES / "ext_project/hpss_example/config.json",
    EXAMPLES / "open_unmix/open_unmix_example/config.json",
]

SMALL: dict[str, Any] = {
    "model_type": "gain",
    "model": {"chunk_size": 8000, "output_stem_names": ["drums", "bass"]},
}


def with_value(path: str, value: object) -> dict[str, object]:
    return apply_overrides(SMALL, [f"{path}={json.dumps(value)}"])


# ── valid configurations ──


def test_omitted_keys_have_defaults() -> None:
    config = Config.from_dict(SMALL)
    assert config == Config(
        model_type="gain", model=LazyModelConfig(8000, ("drums", "bass")), audio=AudioConfig()
    )
    assert (config.chunk_size, config.overlap, config.rules) == (8000, 0.5, ())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parts[-3])
def test_example_files_survive_a_round_trip(file: Path) -> None:
    config = Config.from_file(file)
    data = config.to_dict()
    assert Config.from_dict(json.loads(json.dumps(data))) == config
    assert Config.from_dict(data).to_dict() == data


def test_seconds_are_converted_at_the_sample_rate_of_the_network() -> None:
    lines = ["inference.chunk_size_seconds=6.0", "inference.hop_size_seconds=3.0"]
    config = Config.from_dict(SMALL, [*lines, "audio.sample_rate=16000"])
    assert (config.chunk_size, config.overlap) == (96000, 0.5)


def test_inference_section_may_repeat_the_sample_rate() -> None:
    section = {"fs": 16000, "chunk_size_seconds": 6.0, "hop_size_seconds": 3.0, "batch_size": 4}
    data = SMALL | {"inference": section, "audio": {"sample_rate": 16000}}
    config = Config.from_dict(data)
    assert (config.chunk_size, config.overlap, config.inference.batch_size) == (96000, 0.5, 4)


@given(st.integers(1, 10**7), st.data())
def test_overlap_of_a_hop_size_results_in_that_hop(chunk: int, data: st.DataObject) -> None:
    hop = data.draw(st.integers(1, chunk))
    config = Config.from_dict(SMALL, [f"inference.chunk_size={chunk}", f"inference.hop_size={hop}"])
    # The engine truncates, so the fraction must not fall short by its last bit.
    assert int((1 - config.overlap) * chunk) == hop


def test_derived_stems_keep_their_order() -> None:
    config = Config.from_dict(SMALL | {"derived_stems": {"z": "drums+bass", "a": "mixture - z"}})
    assert config.rules == ("z=drums+bass", "a=mixture - z")


def test_settings_contain_the_separator_options() -> None:
    lines = ["inference.shifts=2", "inference.precision=bf16", 'output.stems=["bass"]']
    parameters = Config.from_dict(SMALL, [*lines, "audio.normalize=true"]).settings
    assert (parameters["shifts"], parameters["precision"], parameters["stems"]) == (
        2,
        "bf16",
        ("bass",),
    )
    assert (parameters["profile"], parameters["window"], parameters["padding"]) == (
        "padded",
        "hann",
        "reflect",
    )
    assert parameters["normalize"] is True


# ── invalid configurations ──

INVALID = [
    ("model_typ", 1, "model_typ: unknown key; did you mean 'model_type'?"),
    ("inference.batchsize", 1, "inference.batchsize: unknown key; did you mean 'batch_size'?"),
    ("model_type", 3, "model_type: expected a string, got 3"),
    ("model", [], r"model: expected an object \(LazyModelConfig\), got \[\]"),
    ("model.chunk_size", 0, "model.chunk_size: must be at least 1, got 0"),
    ("model.chunk_size", 8000.0, "model.chunk_size: expected an integer, got 8000.0"),
    ("model.chunk_size", True, "model.chunk_size: expected an integer, got true"),
    ("model.output_stem_names", [], "model.output_stem_names: must have at least one entry"),
    ("model.output_stem_names", ["a", "a"], "model.output_stem_names: duplicate entry 'a'"),
    (
        "model.output_stem_names",
        ["a", 3],
        r"model.output_stem_names\[1\]: expected a string, got 3",
    ),
    ("model.output_stem_names", ["mixture"], "'mixture' and '' are not valid stem names"),
    ("audio.sample_rate", -1, "audio.sample_rate: must be at least 1, got -1"),
    ("audio.channels", "two", 'audio.channels: expected an integer, got "two"'),
    ("audio.normalize", 1, "audio.normalize: expected true or false, got 1"),
    ("inference.batch_size", "many", 'batch_size: expected an integer or "auto", got "many"'),
    ("inference.batch_size", 0, "inference.batch_size: must be at least 1, got 0"),
    ("inference.precision", "fp8", 'precision: expected one of "fp32", "bf16", .*, got "fp8"'),
    ("inference.chunk_size_seconds", 0, "inference.chunk_size_seconds: must be above 0, got 0.0"),
    (
        "inference.chunk_size_seconds",
        1e-9,
        "chunk_size_seconds: must be at least one sample, got 1e-09",
    ),
    (
        "inference.hop_size",
        8001,
        "inference.hop_size: must be at most the window of 8000 .* got 8001",
    ),
    (
        "inference.hop_size_seconds",
        1e-9,
        "hop_size_seconds: must be at least one sample, got 1e-09",
    ),
    ("inference", {"hop_size": 3, "hop_size_seconds": 1}, "inference: hop_size and hop_size_sec"),
    ("inference.fs", 16000, "inference.fs: must equal audio.sample_rate .44100., got 16000"),
    ("inference.fs", 0, "inference.fs: must be at least 1, got 0"),
    ("chunking.overlap", 1, "chunking.overlap: must be below 1, got 1.0"),
    ("chunking.overlap", float("nan"), "chunking.overlap: expected a number, got NaN"),
    ("chunking.overlap", 0.99999, "chunking.overlap: 0.99999 of 8000 samples leaves a hop of 0"),
    ("chunking.window", "han", "chunking.window: .* did you mean 'hann'?"),
    ("derived_stems", {"x": "mixture-vocals"}, "derived_stems: .*no stem named 'vocals'"),
    ("derived_stems", {"x": "drums *"}, "derived_stems: .*has a syntax error"),
    ("derived_stems", {"bass": "drums"}, "derived_stems: .*'bass' is taken"),
    ("derived_stems", {"x": 1}, "derived_stems.x: expected a string, got 1"),
    ("output.stems", ["voice"], "output.stems: no stem named 'voice'"),
    ("output.format", "wv", "output: .*'wv' must be one of: wav"),
    ("output.bits", 13, "output: .*bits = 13"),
    ("stft.n_fft", 255, "stft: n_fft must be even, got 255"),
    ("stft.hop_length", 1024, "stft: hop_length must be below half the window of 2048 .* got 1024"),
    ("stft.win_length", 4096, "stft: win_length must be at most n_fft .2048., got 4096"),
]


@pytest.mark.parametrize(("path", "value", "message"), INVALID)
def test_invalid_value_is_reported_with_its_path(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(with_value(path, value))


def test_all_problems_are_reported_in_one_error() -> None:
    data = {
        "model": {"chunk_size": "long", "output_stem_names": ["a", "b"]},
        "inference": {"hop_size": 5, "speed": 11},
        "chunking": {"overlap": -0.1, "padding": "mirror"},
        "derived_stems": {"c": "a - d"},
    }
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(data, source="mine.json")
    first, *lines = str(caught.value).splitlines()
    assert first == "mine.json: 5 problems"
    # Rules are validated only if the stems are valid; here `model` is not.
    assert [line.partition(":")[0].strip() for line in lines] == [
        "model_type",
        "model.chunk_size",
        "inference.speed",
        "chunking.overlap",
        "chunking.padding",
    ]


def test_hop_size_and_overlap_are_mutually_exclusive() -> None:
    data = SMALL | {"inference": {"hop_size": 4000}, "chunking": {"overlap": 0.5}}
    with pytest.raises(
        ConfigError, match=r"chunking\.overlap: excludes inference\.hop_size: omit one"
    ):
        Config.from_dict(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InferenceConfig(batch_size=0), "batch_size: must be at least 1, got 0"),
        (lambda: ChunkingConfig(overlap=2.0), "overlap: must be below 1, got 2.0"),
        (lambda: LazyModelConfig(0, ("a",)), "chunk_size: must be at least 1, got 0"),
        (lambda: OutputConfig(stems=()), "stems: must have at least one entry"),
        (lambda: StftConfig(n_fft=0), "n_fft: must be at least 2, got 0"),
        (
            lambda: Config(
                model_type="x", model=LazyModelConfig(8, ("a",)), derived_stems={"b": "c"}
            ),
            "derived_stems: .*no stem named 'c'",
        ),
    ],
)
def test_constructors_validate_their_arguments(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ('{"model_type": "a", "model_type": "b"}', "is not valid JSON: duplicate keys: model_type"),
        ("[" * 100_000, "is not valid JSON"),
        (" " * (2**20 + 1), "at most 1048576 bytes"),
    ],
    ids=["truncated", "list", "duplicate-key", "deeply-nested", "too-long"],
)
def test_invalid_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.from_file(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.json: No such file"):
        Config.from_file(tmp_path / "none.json")


# ── the model section ──

Samples = NewType("Samples", int)


class Kind(Enum):
    WIDE = "wide"
    DEEP = "deep"


@dataclass
class Block:
    width: int
    rates: tuple[float, ...] = (1.0,)


@dataclass
class Params:
    chunk_size: Samples
    output_stem_names: tuple[str, ...]
    blocks: list[Block]
    kind: Kind = Kind.WIDE
    act: Literal["relu", "tanh"] = "relu"
    dropout: Optional[float] = None  # noqa: UP045 - other packages use it
    shape: tuple[int, str] = (1, "x")
    names: dict[str, float] = field(default_factory=dict)


def model_section(**rest: object) -> LazyModelConfig:
    data = SMALL | {"model": {**SMALL["model"], "blocks": [{"width": 3}], **rest}}
    return Config.from_dict(data).model


def test_to_concrete_converts_to_the_annotated_types() -> None:
    rest = {"kind": "deep", "shape": [2, "y"], "names": {"a": 1}, "dropout": 1}
    params = model_section(blocks=[{"width": 3, "rates": [1, 2.5]}], **rest).to_concrete(Params)
    assert params == Params(
        chunk_size=Samples(8000),
        output_stem_names=("drums", "bass"),
        blocks=[Block(3, (1.0, 2.5))],
        kind=Kind.DEEP,
        dropout=1.0,
        shape=(2, "y"),
        names={"a": 1.0},
    )


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"width": 3}, "model.width: unknown key"),
        ({"blocks": [{"width": "w"}]}, r'model.blocks\[0\].width: expected an integer, got "w"'),
        ({"blocks": [{}]}, r"model.blocks\[0\].width: required key is missing"),
        ({"blocks": {"width": 3}}, r'model.blocks: expected a list, got {"width": 3}'),
        ({"kind": "tall"}, 'model.kind: expected one of "wide", "deep", got "tall"'),
        ({"act": "gelu"}, 'model.act: expected one of .*, got "gelu"'),
        ({"dropout": "no"}, 'model.dropout: expected a number, got "no"'),
        ({"shape": [1]}, r"model.shape: expected a list of 2, got \[1\]"),
        ({"names": {"a": "b"}}, 'model.names.a: expected a number, got "b"'),
        ({"names": 3}, "model.names: expected an object, got 3"),
    ],
)
def test_to_concrete_refuses_what_does_not_match_the_class(
    rest: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        model_section(**rest).to_concrete(Params)


def test_to_concrete_reports_errors_of_the_class() -> None:
    @dataclass
    class Odd:
        chunk_size: int
        output_stem_names: tuple[str, ...]
        blocks: object

        def __post_init__(self) -> None:
            raise ValueError("chunk_size must be odd")

    with pytest.raises(ConfigError, match="model: chunk_size must be odd"):
        model_section().to_concrete(Odd)
    with pytest.raises(ConfigError, match="model: int is not a dataclass"):
        model_section().to_concrete(int)


def test_chunk_size_derived_by_the_class_is_compared() -> None:
    @dataclass
    class Hops:
        hops: int
        output_stem_names: tuple[str, ...]
        blocks: object

        @property
        def chunk_size(self) -> int:
            return 100 * self.hops

    assert model_section(hops=80).to_concrete(Hops).chunk_size == 8000
    with pytest.raises(ConfigError, match="model.chunk_size: Hops derives 700, got 8000"):
        model_section(hops=7).to_concrete(Hops)


def test_unsupported_annotation_is_reported() -> None:
    reader = SchemaReader()
    reader.read(complex, 1, "a")
    assert reader.problems == ["a: unsupported type: complex"]


# ── overrides ──


def test_overrides_are_parsed_as_json_or_text_and_create_objects() -> None:
    before = json.dumps(SMALL)
    lines = ["inference.batch_size=2", "identifier = mine", "model.a.b=[1]", "model.on=true"]
    data = apply_overrides(SMALL, lines)
    assert data["inference"] == {"batch_size": 2}
    assert data["identifier"] == "mine"
    assert data["model"]["a"] == {"b": [1]}  # type: ignore[index]
    assert data["model"]["on"] is True  # type: ignore[index]
    assert json.dumps(SMALL) == before


@pytest.mark.parametrize("line", ["inference.batch_size", "a..b=1", "=1", ".a=1", "a.=1"])
def test_malformed_override_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match="must look like 'inference.batch_size=2'"):
        Config.from_dict(SMALL, [line])


def test_overrides_are_validated_like_the_file() -> None:
    with pytest.raises(ConfigError, match="a: unknown key"):
        Config.from_dict(SMALL, ["a.b.c=e"])
    with pytest.raises(ConfigError, match="model_type is 'gain', not an object"):
        Config.from_dict(SMALL, ["model_type.x=1"])
    with pytest.raises(ConfigError, match="must be a list of strings"):
        Config.from_dict(SMALL, "inference.shifts=1")


def test_load_accepts_data_paths_and_instances(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    line = ["inference.shifts=3"]
    for source in (SMALL, path, str(path), Config.from_dict(SMALL)):
        assert Config.load(source, line).inference.shifts == 3
        assert Config.load(source).inference.shifts == 0


# ── the schema ──


def test_json_schema_accepts_and_refuses_the_same_as_the_reader() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    described = Config.json_schema()
    jsonschema.Draft202012Validator.check_schema(described)
    validator = jsonschema.Draft202012Validator(described)
    for file in FILES:
        validator.validate(json.loads(file.read_text()))
        validator.validate(Config.from_file(file).to_dict())
    # A schema validates single values; relations between them are validated by `Config` only.
    single = [case for case in INVALID if "unknown key" in case[2] or "expected " in case[2]]
    single = [case for case in single if "NaN" not in case[2] and "8000.0" not in case[2]]
    assert len(single) > 10
    for path, value, _ in single:
        assert not validator.is_valid(with_value(path, value)), path


def test_json_schema_of_parameters_lists_required_keys() -> None:
    described = json_schema(Params)
    assert described["required"] == ["chunk_size", "output_stem_names", "blocks"]
    assert described["properties"]["blocks"]["items"]["properties"]["width"] == {"type": "integer"}
    assert described["additionalProperties"] is False


def test_validate_refuses_values_that_could_not_be_read() -> None:
    with pytest.raises(ConfigError, match="Block: width: expected an integer, got null"):
        validate(Block(None))  # type: ignore[arg-type]  # the error under test


def test_file_of_many_keys_gives_a_short_error_soon(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    pairs = [f'"{number}":1' for number in [*range(50_000), 7]]
    path.write_text(f"{{{','.join(pairs)}}}")
    start = time.process_time()
    with pytest.raises(ConfigError, match="duplicate keys: 7$"):
        Config.load(path)
    path.write_text(f"{{{','.join(pairs[:-1])}}}")
    with pytest.raises(ConfigError, match="50002 problems") as error:
        Config.load(path)
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 10_000
