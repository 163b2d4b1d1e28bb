"""The image and the compose file: paths and variables exist, and nothing runs as root."""

import re
from dataclasses import fields

import yaml

from demucs_infer.cli.models import make_parser as models_parser
from demucs_infer.cli.parser import COMMANDS
from demucs_infer.server.settings import PREFIX, ServerSettings
from tests.helpers.cli_process import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
KNOWN = {f"{PREFIX}{one.name.upper()}" for one in fields(ServerSettings)} | {f"{PREFIX}CACHE"}


def test_image_is_slim_and_not_root() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert all(base.endswith("-slim") for base in bases) and len(bases) == 2
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root)\w+$", last, re.MULTILINE) and "HEALTHCHECK" in last
    assert "ARG MODELS" in DOCKERFILE and 'CMD ["serve"]' in last and "serve" in COMMANDS
    assert models_parser().parse_args(["pull", "htdemucs"]).name == ["htdemucs"]


def test_copied_files_exist_and_are_not_ignored() -> None:
    sent = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == sent and all((ROOT / name).exists() for name in names)


def test_variables_are_settings() -> None:
    assert set(re.findall(rf"{PREFIX}\w+", DOCKERFILE)) <= KNOWN
    for service in COMPOSE["services"].values():
        assert set(service["environment"]) <= KNOWN
        assert service["read_only"] and service["ports"] == ["127.0.0.1:8080:8080"]
        assert set(service["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    assert COMPOSE["services"]["cuda"]["deploy"]["resources"]["reservations"]["devices"]


def test_compose_is_not_declared_public_and_has_limits() -> None:
    """A server whose port is opened without a key must warn."""
    for service in COMPOSE["services"].values():
        assert "DEMUCS_INFER_PUBLIC" not in service["environment"]
        assert service["mem_limit"] and service["pids_limit"]
        # A volume there would hide the models of a rebuilt image.
        assert not any(volume.endswith(":/models") for volume in service["volumes"])
