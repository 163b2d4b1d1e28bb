"""Precedence of flags, variables, file and defaults; every invalid setting is named."""

from pathlib import Path
from typing import Any

import pytest

from demucs_infer.cli import serve
from demucs_infer.cli.main import main
from demucs_infer.errors import ConfigError
from demucs_infer.server.settings import ServerSettings, load_settings


def test_precedence_of_flag_variable_file_and_default(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("max_bytes = 1\nmax_queue = 1\nmax_instances = 1\nmodels = ['a', 'b']\n")
    environ = {"DEMUCS_INFER_MAX_BYTES": "2", "DEMUCS_INFER_MAX_QUEUE": "2"}
    found = load_settings({"max_bytes": 3, "port": None}, environ, file)
    assert (found.max_bytes, found.max_queue, found.max_instances) == (3, 2, 1)
    assert found.port == ServerSettings().port and found.models == ("a", "b")


def test_variable_of_the_cache_outranks_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("cache_dir = '/of/the/file'\ndata_dir = '/data/of/the/file'\n")
    general, own = {"DEMUCS_INFER_CACHE": "/general"}, {"DEMUCS_INFER_CACHE_DIR": "/own"}
    settings = load_settings({}, general, file)
    assert (settings.cache_dir, settings.data_dir) == (Path("/general"), Path("/data/of/the/file"))
    assert load_settings({}, {**general, **own}, file).cache_dir == Path("/own")
    assert load_settings({"cache_dir": Path("/flag")}, {**general, **own}, file).cache_dir == Path(
        "/flag"
    )


def test_vertex_variables_and_their_precedence(tmp_path: Path) -> None:
    environ = {
        "AIP_HTTP_PORT": "7080",
        "AIP_PREDICT_ROUTE": "/a",
        "AIP_HEALTH_ROUTE": "/b",
        "AIP_STORAGE_URI": "",
    }
    found = load_settings({"predict_route": "/mine"}, environ)
    assert (found.host, found.port) == ("0.0.0.0", 7080)
    assert (found.predict_route, found.health_route) == ("/mine", "/b")
    assert not found.is_exposed and found.repo is None
    bucket = {**environ, "AIP_STORAGE_URI": "gs://bucket/models"}
    with pytest.raises(ConfigError, match="AIP_STORAGE_URI.*mount"):
        load_settings({}, bucket)
    assert load_settings({"repo": tmp_path}, bucket).repo == tmp_path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_BYTES", "abc"),
        ("MAX_BYTES", "0"),
        ("MAX_BYTES", "1.5"),
        ("PORT", "70000"),
        ("MAX_DURATION_SECONDS", "nan"),
        ("MAX_DURATION_SECONDS", "inf"),
        ("WARMUP", "perhaps"),
        ("REPO", "/there/is/no/such/folder"),
        ("REPO", "gs://bucket/models"),
        ("API_KEYS", "short"),
        ("CORS_ORIGINS", "*"),
        ("PREDICT_ROUTE", "predict"),
        ("PREDICT_ROUTE", "/{id}"),
        ("HEALTH_ROUTE", "/predict"),
        ("DATA_DIR", __file__),
        ("CACHE_DIR", f"{__file__}/below"),
        ("BASE_PATH", "stems/"),
        ("DEVICES", ","),
    ],
)
def test_invalid_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){name}"):
        load_settings({}, {f"DEMUCS_INFER_{name}": value})


def test_invalid_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    for text in ("max_byte = 1", "max_bytes = 'x'", "max_bytes = "):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"server\.toml"):
            load_settings({}, {}, file)
    with pytest.raises(ConfigError, match="missing"):
        load_settings({}, {}, tmp_path / "missing.toml")


def test_invalid_variable_ends_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEMUCS_INFER_MAX_BYTES", "abc")
    assert main(["serve"]) != 0
    assert "DEMUCS_INFER_MAX_BYTES" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--port", "x"], ["--max-queue", "many"], ["--wrong"], ["--api-key", ""]]
)
def test_invalid_flag_is_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serve.make_parser().parse_args(words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_every_setting_has_flag_with_help_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUCS_INFER_CACHE", str(Path.home() / "cache"))
    parser = serve.make_parser()
    text = parser.format_help()
    from dataclasses import fields

    helps = {action.dest: action.help or "" for action in parser._actions}
    for one in fields(ServerSettings):
        flag = "--api-key" if one.name == "api_keys" else f"--{one.name.replace('_', '-')}"
        assert flag in text
        assert "(default: " in helps[one.name], flag
    assert "None" not in text
    assert helps["max_bytes"].endswith("(default: 536870912)")
    assert helps["page"].endswith("(default: yes)")
    assert helps["data_dir"].endswith("(default: ~/cache/server)")


@pytest.mark.parametrize(
    ("settings", "exposed"),
    [
        ({"host": "127.0.0.1"}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "10.1.2.3"}, True),
        ({"host": "my.host"}, True),
        ({"host": "0.0.0.0", "api_keys": ("12345678",)}, False),
        ({"host": "0.0.0.0", "public": True}, False),
    ],
)
def test_exposed_server_without_key_is_detected(settings: dict[str, Any], exposed: bool) -> None:
    assert ServerSettings(**settings).is_exposed is exposed


def test_repr_hides_api_keys() -> None:
    assert "12345678" not in repr(ServerSettings(api_keys=("12345678",)))


def test_request_takes_times_and_percentages_as_text() -> None:
    from demucs_infer.server.schemas import parse_request

    settings = parse_request({"start": "1:30", "duration": "15", "overlap": "50%"}).settings
    assert (settings["start"], settings["duration"], settings["overlap"]) == (90, 15, 0.5)


def test_api_keys_are_read_from_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the studio\nthe first key\n\nthe second key\n")
    found = load_settings({"api_keys_file": file, "api_keys": ("the third key",)}, {})
    assert found.api_keys == ("the third key", "the first key", "the second key")
    assert not ServerSettings(host="0.0.0.0", api_keys_file=file).is_exposed


@pytest.mark.parametrize("text", ["", "# none", "short", None])
def test_file_without_valid_keys_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match="api_keys"):
        ServerSettings(api_keys_file=tmp_path / "keys")
