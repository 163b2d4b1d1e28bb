"""Every setting of `options.py` is valid, and every front end has it or says why not."""

import inspect
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from demucs_infer.api import Changes, OwnChanges, Separator
from demucs_infer.cli.main import main
from demucs_infer.cli.parser import make_parser
from demucs_infer.custom.config import Config
from demucs_infer.errors import ConfigError
from demucs_infer.options import (
    NAMES,
    OPTIONS,
    PARTS,
    InputChanges,
    InputOptions,
    Option,
    OutputChanges,
    OutputOptions,
    Request,
    SeparationOptions,
    StemOptions,
    list_options,
)
from tests.helpers.cli_process import write_song
from tests.helpers.networks import ScaleModel

FRONT_ENDS = ("python", "cli", "http", "config")
EVERY = [pytest.param(option, id=name) for name, option in OPTIONS.items()]


def names_of(part: type) -> set[str]:
    return {option.name for option in list_options(part)}


def part_of(option: Option) -> str:
    return next(name for name, part in PARTS.items() if option.name in names_of(part))


# ── the declarations ──


def test_every_name_stands_in_one_part() -> None:
    names = [option.name for part in PARTS.values() for option in list_options(part)]
    assert len(names) == len(set(names)) == len(OPTIONS)
    assert tuple(names) == NAMES


def test_every_field_of_a_part_is_a_setting() -> None:
    assert {field.name: field.default_factory for field in fields(Request)}.keys() == PARTS.keys()
    for name, part in PARTS.items():
        assert isinstance(getattr(Request(), name), part)
        assert [field.name for field in fields(part)] == [o.name for o in list_options(part)]


@pytest.mark.parametrize("option", EVERY)
def test_default_is_valid(option: Option) -> None:
    option.check(option.default)
    for front_end in FRONT_ENDS:
        option.limited_to(front_end).check(option.default)


@pytest.mark.parametrize("option", EVERY)
def test_invalid_value_is_reported_with_what_is_expected(option: Option) -> None:
    expected = re.escape(f"{option.name} = <object object at") + r".*must be "
    with pytest.raises(ValueError, match=expected + re.escape(option.expectation)):
        Request().replace({option.name: object()})


@pytest.mark.parametrize(
    ("name", "expectation"),
    [
        pytest.param("shifts", "an integer, 0 or more", id="lower-limit"),
        pytest.param("overlap", "a number in [0, 1)", id="open-interval"),
        pytest.param("segment", "a number above 0", id="exclusive-lower-limit"),
        pytest.param("quality", "an integer, 0 to 10", id="interval"),
        pytest.param("batch_size", "'auto' or an integer, 1 or more", id="word-or-number"),
        pytest.param("precision", "one of fp32, bf16, fp16, auto", id="choices"),
        pytest.param("bits", "one of 16, 24, 32, source", id="numbers-and-word"),
        pytest.param("split", "True or False", id="switch"),
        pytest.param("compile", "True or False or a string", id="switch-or-word"),
        pytest.param("stems", "a tuple of strings", id="list"),
    ],
)
def test_expectation_describes_type_choices_and_limits(name: str, expectation: str) -> None:
    assert OPTIONS[name].expectation == expectation


@pytest.mark.parametrize("option", EVERY)
def test_reasons_and_limits_are_of_front_ends_that_exist(option: Option) -> None:
    setting = option.setting
    assert {*setting.not_in, *setting.limits, *setting.excluded} <= set(FRONT_ENDS)
    assert all(reason.strip() for reason in setting.not_in.values())
    assert not setting.limits.keys() & setting.not_in.keys()
    assert not setting.excluded.keys() & setting.not_in.keys()
    assert setting.help
    assert option.default is not True or setting.no_help or not option.is_in("cli")


def test_value_that_is_similar_to_a_choice_gets_advice() -> None:
    with pytest.raises(ValueError, match=r"; did you mean mp3\?$"):
        Request().replace({"format": "mp33"})


def test_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown setting 'overlapp'"):
        Request().replace({"overlapp": 0.5})


def test_flags_are_unique() -> None:
    flags = [flag for option in OPTIONS.values() for flag in option.flags]
    flags += [flag for option in OPTIONS.values() for flag in option.setting.shortcuts]
    assert len(flags) == len(set(flags))


# ── Python ──


def test_keywords_of_python_are_the_settings() -> None:
    upstream = {"progress", "callback", "callback_arg"}
    own = names_of(SeparationOptions) | names_of(StemOptions)
    assert Changes.__annotations__.keys() | OwnChanges.__annotations__.keys() == own | upstream
    positional = inspect.signature(Separator.__init__).parameters.keys()
    assert own <= positional | OwnChanges.__annotations__.keys()
    assert not positional & OwnChanges.__annotations__.keys()
    assert InputChanges.__annotations__.keys() == names_of(InputOptions)
    # `format` has a place of its own in `separate_to`.
    assert OutputChanges.__annotations__.keys() | {"format"} == names_of(OutputOptions)


@pytest.mark.parametrize("option", EVERY)
def test_python_accepts_the_setting_or_says_why_not(option: Option, tmp_path: Path) -> None:
    separator = Separator.from_model(ScaleModel(), device="cpu")
    changes: dict[str, Any] = {option.name: option.default}

    def use() -> None:
        part = part_of(option)
        if part in ("separation", "stems"):
            Separator.from_model(ScaleModel(), **changes)
            separator.update_parameter(**changes)
        elif part == "input":
            separator.open_audio(torch.zeros(2, 100), **changes)
        else:
            separator.separate_to(torch.zeros(2, 100), tmp_path, **changes)

    if option.is_in("python"):
        use()
    else:
        with pytest.raises(TypeError, match=option.name):
            use()


# ── the command line ──


@pytest.mark.parametrize("option", EVERY)
def test_command_has_a_flag_or_says_why_not(option: Option) -> None:
    actions = [action for action in make_parser()._actions if action.dest == option.name]
    flags = {flag for action in actions for flag in action.option_strings}
    expected = {*option.flags, *option.setting.shortcuts} if option.is_in("cli") else set()
    assert flags == expected


def test_command_starts_from_the_defaults() -> None:
    args = make_parser().parse_args([])
    defaults = {name: value for part in asdict(Request()).values() for name, value in part.items()}
    for name, option in OPTIONS.items():
        if option.is_in("cli"):
            value = getattr(args, name)
            assert (tuple(value) if isinstance(value, list) else value) == defaults[name], name


# ── HTTP ──


@pytest.mark.parametrize("option", EVERY)
def test_server_has_a_parameter_or_says_why_not(option: Option) -> None:
    schemas = pytest.importorskip("demucs_infer.server.schemas")
    query = {parameter["name"] for parameter in schemas.AUDIO["parameters"]}
    form = schemas.AUDIO["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    expected = option.is_in("http")
    assert (option.name in schemas.RequestSchema.model_fields) == expected
    assert (option.name in query) == expected
    assert (option.name in form) == expected


# ── the configuration of a network ──


def configure(option: Option) -> Config:
    value = list(option.default) if isinstance(option.default, tuple) else option.default
    model = {"chunk_size": 100, "output_stem_names": ["a", "b"]}
    data = {"model_type": "x", "model": model, "options": {option.name: value}}
    return Config.from_dict(data)


@pytest.mark.parametrize("option", EVERY)
def test_configuration_accepts_the_setting_or_says_why_not(option: Option) -> None:
    if not option.is_in("config"):
        with pytest.raises(ConfigError, match=re.escape(option.setting.not_in["config"])):
            configure(option)
        return
    config = configure(option)
    part = part_of(option)
    options = {"input": config.input_options, "output": config.output_options}
    values = config.settings if part not in options else asdict(options[part])  # type: ignore[call-overload]
    assert values[option.name] == option.default


# ── the manifest ──


def test_manifest_has_every_setting_that_changes_stems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demucs_infer.batch.manifest import read_manifest

    write_song(tmp_path / "song.wav", 0.2)
    monkeypatch.chdir(tmp_path)
    assert main(["song.wav", "-n", "tiny", "-d", "cpu", "-q", "--overlap", "0.5"]) == 0
    manifest = read_manifest(tmp_path / "separated/tiny/song/stems.json")
    assert manifest is not None
    expected = Request().replace({"overlap": 0.5, "device": "cpu"}).stem_settings()
    assert manifest["recipe"]["settings"] == {
        name: list(value) if isinstance(value, tuple) else value for name, value in expected.items()
    }
    assert expected.keys() == {n for n, option in OPTIONS.items() if option.setting.changes_stems}
