"""A configuration is read strictly: everything wrong with it is said at once, with its place."""

import json
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
from demucs_infer.custom.json_schema import SchemaReader, check, schema

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = [
    EXAMPLES / "ext_project/hpss_example/config.json",
    EXAMPLES / "open_unmix/open_unmix_example/config.json",
]

SMALL: dict[str, Any] = {
    "model_type": "gain",
    "model": {"chunk_size": 8000, "output_stem_names": ["drums", "bass"]},
}


def changed(path: str, value: object) -> dict[str, object]:
    return apply_overrides(SMALL, [f"{path}={json.dumps(value)}"])


# ── what is right ──


def test_what_is_left_out_has_its_default() -> None:
    config = Config.from_dict(SMALL)
    assert config == Config(
        model_type="gain", model=LazyModelConfig(8000, ("drums", "bass")), audio=AudioConfig()
    )
    assert (config.chunk_size, config.overlap, config.rules) == (8000, 0.5, ())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parts[-3])
def test_a_file_goes_round_and_stays_what_it_is(file: Path) -> None:
    config = Config.from_file(file)
    data = config.to_dict()
    assert Config.from_dict(json.loads(json.dumps(data))) == config
    assert Config.from_dict(data).to_dict() == data


def test_seconds_are_samples_at_the_rate_of_the_network() -> None:
    lines = ["inference.chunk_size_seconds=6.0", "inference.hop_size_seconds=3.0"]
    config = Config.from_dict(SMALL, [*lines, "audio.sample_rate=16000"])
    assert (config.chunk_size, config.overlap) == (96000, 0.5)


@given(st.integers(1, 10**7), st.data())
def test_a_hop_is_the_hop_that_comes_out(chunk: int, data: st.DataObject) -> None:
    hop = data.draw(st.integers(1, chunk))
    config = Config.from_dict(SMALL, [f"inference.chunk_size={chunk}", f"inference.hop_size={hop}"])
    # The engine truncates, so the fraction must not fall short by its last bit.
    assert int((1 - config.overlap) * chunk) == hop


def test_derived_stems_keep_their_order() -> None:
    config = Config.from_dict(SMALL | {"derived_stems": {"z": "drums+bass", "a": "mixture - z"}})
    assert config.rules == ("z=drums+bass", "a=mixture - z")


def test_parameters_are_those_of_a_separator() -> None:
    lines = ["inference.shifts=2", "inference.precision=bf16", 'output.stems=["bass"]']
    told = Config.from_dict(SMALL, [*lines, "audio.normalize=true"]).parameters
    assert (told["shifts"], told["precision"], told["stems"]) == (2, "bf16", ("bass",))
    assert (told["profile"], told["window"], told["padding"]) == ("padded", "hann", "reflect")
    assert told["normalize"] is True


# ── what is wrong ──

WRONG = [
    ("model_typ", 1, "model_typ: there is no such key; did you mean 'model_type'?"),
    ("inference.batchsize", 1, "inference.batchsize: there is no such key; did you mean 'batch_"),
    ("model_type", 3, "model_type: 3 is not text"),
    ("model", [], r"model: \[\] is not a table of LazyModelConfig"),
    ("model.chunk_size", 0, "model.chunk_size: 0 must be at least 1"),
    ("model.chunk_size", 8000.0, "model.chunk_size: 8000.0 is not an integer"),
    ("model.chunk_size", True, "model.chunk_size: true is not an integer"),
    ("model.output_stem_names", [], "model.output_stem_names: is empty: name at least one"),
    ("model.output_stem_names", ["a", "a"], "model.output_stem_names: 'a' is named more than once"),
    ("model.output_stem_names", ["a", 3], r"model.output_stem_names\[1\]: 3 is not text"),
    ("model.output_stem_names", ["mixture"], "'mixture' and '' cannot be stems"),
    ("audio.sample_rate", -1, "audio.sample_rate: -1 must be at least 1"),
    ("audio.channels", "two", 'audio.channels: "two" is not an integer'),
    ("audio.normalize", 1, "audio.normalize: 1 is not true or false"),
    ("inference.batch_size", "many", 'inference.batch_size: "many" is not an integer or "auto"'),
    ("inference.batch_size", 0, "inference.batch_size: 0 must be at least 1"),
    ("inference.precision", "fp8", 'inference.precision: "fp8" is not one of "fp32", "bf16"'),
    ("inference.chunk_size_seconds", 0, "inference.chunk_size_seconds: 0.0 must be above 0"),
    ("inference.chunk_size_seconds", 1e-9, "inference.chunk_size_seconds: 1e-09 s are no sample"),
    ("inference.hop_size", 8001, "inference.hop_size: a hop of 8001 samples leaves gaps"),
    ("inference.hop_size_seconds", 1e-9, "inference.hop_size_seconds: 1e-09 is not one sample"),
    ("inference", {"hop_size": 3, "hop_size_seconds": 1}, "inference: hop_size and hop_size_sec"),
    ("chunking.overlap", 1, "chunking.overlap: 1.0 must be below 1"),
    ("chunking.overlap", float("nan"), "chunking.overlap: NaN is not a number"),
    ("chunking.overlap", 0.99999, "chunking.overlap: 0.99999 of 8000 samples leaves none"),
    ("chunking.window", "han", "chunking.window: .* did you mean 'hann'?"),
    ("derived_stems", {"x": "mixture-vocals"}, "derived_stems: .*no stem named 'vocals'"),
    ("derived_stems", {"x": "drums *"}, "derived_stems: .*cannot be read"),
    ("derived_stems", {"bass": "drums"}, "derived_stems: .*'bass' is taken"),
    ("derived_stems", {"x": 1}, "derived_stems.x: 1 is not text"),
    ("output.stems", ["voice"], "output.stems: no stem named 'voice'"),
    ("output.format", "wv", "output: .*'wv' must be one of: wav"),
    ("output.bits", 13, "output: .*bits = 13"),
    ("stft.n_fft", 255, "stft: n_fft = 255 must be even"),
    ("stft.hop_length", 1024, "stft: hop_length = 1024 must be below half the window of 2048"),
    ("stft.win_length", 4096, "stft: win_length = 4096 must be at most"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_what_is_wrong_is_named_by_its_path(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(changed(path, value))


def test_all_problems_are_said_at_once() -> None:
    data = {
        "model": {"chunk_size": "long", "output_stem_names": ["a", "b"]},
        "inference": {"hop_size": 5, "speed": 11},
        "chunking": {"overlap": -0.1, "padding": "mirror"},
        "derived_stems": {"c": "a - d"},
    }
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(data, what="mine.json")
    first, *lines = str(caught.value).splitlines()
    assert first == "mine.json: 5 problems"
    # The rule is judged only where the stems are known; here `model` could not be read.
    assert [line.partition(":")[0].strip() for line in lines] == [
        "model_type",
        "model.chunk_size",
        "inference.speed",
        "chunking.overlap",
        "chunking.padding",
    ]


def test_what_sections_say_twice_is_a_problem() -> None:
    data = SMALL | {"inference": {"hop_size": 4000}, "chunking": {"overlap": 0.5}}
    with pytest.raises(ConfigError, match=r"chunking\.overlap: hop_size of inference says it too"):
        Config.from_dict(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InferenceConfig(batch_size=0), "batch_size: 0 must be at least 1"),
        (lambda: ChunkingConfig(overlap=2.0), "overlap: 2.0 must be below 1"),
        (lambda: LazyModelConfig(0, ("a",)), "chunk_size: 0 must be at least 1"),
        (lambda: OutputConfig(stems=()), "stems: is empty"),
        (lambda: StftConfig(n_fft=0), "n_fft: 0 must be at least 2"),
        (
            lambda: Config(
                model_type="x", model=LazyModelConfig(8, ("a",)), derived_stems={"b": "c"}
            ),
            "derived_stems: .*no stem named 'c'",
        ),
    ],
)
def test_an_object_that_exists_is_valid(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, not a table"),
        ('{"model_type": "a", "model_type": "b"}', "is not JSON: model_type stands in it twice"),
        ("[" * 100_000, "is not JSON"),
        (" " * (2**20 + 1), "more than 1048576 bytes"),
    ],
    ids=["cut", "list", "twice", "deep", "long"],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.from_file(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.json: No such file"):
        Config.from_file(tmp_path / "none.json")


# ── the model's own section ──

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
    dropout: Optional[float] = None  # noqa: UP045 - other people's packages write it so
    shape: tuple[int, str] = (1, "x")
    names: dict[str, float] = field(default_factory=dict)


def lazy(**rest: object) -> LazyModelConfig:
    data = SMALL | {"model": {**SMALL["model"], "blocks": [{"width": 3}], **rest}}
    return Config.from_dict(data).model


def test_the_rest_waits_for_the_class_of_parameters() -> None:
    rest = {"kind": "deep", "shape": [2, "y"], "names": {"a": 1}, "dropout": 1}
    params = lazy(blocks=[{"width": 3, "rates": [1, 2.5]}], **rest).to_concrete(Params)
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
        ({"width": 3}, "model.width: there is no such key"),
        ({"blocks": [{"width": "w"}]}, r'model.blocks\[0\].width: "w" is not an integer'),
        ({"blocks": [{}]}, r"model.blocks\[0\].width: is missing"),
        ({"blocks": {"width": 3}}, r'model.blocks: {"width": 3} is not a list'),
        ({"kind": "tall"}, 'model.kind: "tall" is not one of "wide", "deep"'),
        ({"act": "gelu"}, 'model.act: "gelu" is not one of'),
        ({"dropout": "no"}, 'model.dropout: "no" is not a number'),
        ({"shape": [1]}, r"model.shape: \[1\] is not a list of 2"),
        ({"names": {"a": "b"}}, 'model.names.a: "b" is not a number'),
        ({"names": 3}, "model.names: 3 is not a table"),
    ],
)
def test_what_the_class_does_not_take(rest: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lazy(**rest).to_concrete(Params)


def test_the_class_has_the_last_word() -> None:
    @dataclass
    class Odd:
        chunk_size: int
        output_stem_names: tuple[str, ...]
        blocks: object

        def __post_init__(self) -> None:
            raise ValueError("chunk_size must be odd")

    with pytest.raises(ConfigError, match="model: chunk_size must be odd"):
        lazy().to_concrete(Odd)
    with pytest.raises(ConfigError, match="model: int is not a dataclass"):
        lazy().to_concrete(int)


def test_a_size_that_the_class_works_out_is_compared() -> None:
    @dataclass
    class Hops:
        hops: int
        output_stem_names: tuple[str, ...]
        blocks: object

        @property
        def chunk_size(self) -> int:
            return 100 * self.hops

    assert lazy(hops=80).to_concrete(Hops).chunk_size == 8000
    with pytest.raises(ConfigError, match="model.chunk_size: 8000 is not the 700 it comes to"):
        lazy(hops=7).to_concrete(Hops)


def test_what_json_cannot_say() -> None:
    reader = SchemaReader()
    reader.value(complex, 1, "a")
    assert reader.problems == ["a: complex is nothing that JSON can say"]


# ── overrides ──


def test_overrides_are_json_or_text_and_make_tables() -> None:
    before = json.dumps(SMALL)
    lines = ["inference.batch_size=2", "identifier = mine", "model.a.b=[1]", "model.on=true"]
    data = apply_overrides(SMALL, lines)
    assert data["inference"] == {"batch_size": 2}
    assert data["identifier"] == "mine"
    assert data["model"]["a"] == {"b": [1]}  # type: ignore[index]
    assert data["model"]["on"] is True  # type: ignore[index]
    assert json.dumps(SMALL) == before


@pytest.mark.parametrize("line", ["inference.batch_size", "a..b=1", "=1", ".a=1", "a.=1"])
def test_an_override_that_cannot_be_read(line: str) -> None:
    with pytest.raises(ConfigError, match="must look like 'inference.batch_size=2'"):
        Config.from_dict(SMALL, [line])


def test_an_override_is_judged_as_the_file_is() -> None:
    with pytest.raises(ConfigError, match="a: there is no such key"):
        Config.from_dict(SMALL, ["a.b.c=e"])
    with pytest.raises(ConfigError, match="model_type is 'gain', and has no keys"):
        Config.from_dict(SMALL, ["model_type.x=1"])
    with pytest.raises(ConfigError, match="must be a list of lines"):
        Config.from_dict(SMALL, "inference.shifts=1")


def test_overrides_change_whatever_holds_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    line = ["inference.shifts=3"]
    for source in (SMALL, path, str(path), Config.from_dict(SMALL)):
        assert Config.of(source, line).inference.shifts == 3
        assert Config.of(source).inference.shifts == 0


# ── the schema ──


def test_the_schema_takes_what_we_take_and_refuses_what_we_refuse() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    described = Config.json_schema()
    jsonschema.Draft202012Validator.check_schema(described)
    validator = jsonschema.Draft202012Validator(described)
    for file in FILES:
        validator.validate(json.loads(file.read_text()))
        validator.validate(Config.from_file(file).to_dict())
    # A schema sees one value at a time: what values mean together is ours alone.
    alone = [case for case in WRONG if ": " in case[2] and "there is no such key" in case[2]]
    alone += [case for case in WRONG if " is not " in case[2] and "NaN" not in case[2]]
    alone = [case for case in alone if "one sample" not in case[2] and "8000.0" not in case[2]]
    for path, value, _ in alone:
        assert not validator.is_valid(changed(path, value)), path


def test_the_schema_of_parameters_says_what_is_required() -> None:
    described = schema(Params)
    assert described["required"] == ["chunk_size", "output_stem_names", "blocks"]
    assert described["properties"]["blocks"]["items"]["properties"]["width"] == {"type": "integer"}
    assert described["additionalProperties"] is False


def test_check_refuses_what_could_not_be_read() -> None:
    with pytest.raises(ConfigError, match="Block: width: null is not an integer"):
        check(Block(None))  # type: ignore[arg-type]  # what a caller may do
