"""The image and the compose file: paths and variables exist, and nothing runs as root."""

import re
import sys
from dataclasses import fields

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from demucs_infer.cli.models import make_parser as models_parser
from demucs_infer.cli.parser import COMMANDS
from demucs_infer.server.settings import PREFIX, ServerSettings
from tests.helpers.cli_process import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
KNOWN = {f"{PREFIX}{one.name.upper()}" for one in fields(ServerSettings)} | {f"{PREFIX}CACHE"}


def test_image_is_slim_and_not_root() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert bases == ["${BASE}"] * 2
    assert re.search(r"^ARG BASE=python:3\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d+$", last, re.MULTILINE) and "HEALTHCHECK" in last
    assert "ARG MODELS" in DOCKERFILE and 'CMD ["serve"]' in last and "serve" in COMMANDS
    assert models_parser().parse_args(["pull", "htdemucs"]).name == ["htdemucs"]


def test_every_package_of_the_image_is_pinned() -> None:
    """Direct dependencies by the file's versions; pip refuses to install others' unpinned ones."""
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(str(pin.specifier).startswith("==") and "*" not in str(pin) for pin in pins)
    assert len(versions) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    install = re.search(r'pip install "\.\[(.*)\]"', DOCKERFILE)
    assert install
    extras = project["project"]["optional-dependencies"]
    needed = [text for extra in install[1].split(",") for text in extras[extra]]
    needed += [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.12"}):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])
    commands = re.findall(r"pip install .*", DOCKERFILE)
    assert len(commands) == 3 and "ENV PIP_NO_CACHE_DIR" in DOCKERFILE
    before = DOCKERFILE[: DOCKERFILE.index("pip install")]
    for variable in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert f"{variable}=/src/constraints.txt" in before
    assert "COPY deploy/constraints.txt constraints.txt" in before
    (torch,) = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert versions["torch"] == torch


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
        assert service["mem_limit"] and service["pids_limit"] and "cpus" in service
        # A volume there would hide the models of a rebuilt image.
        assert not any(volume.endswith(":/models") for volume in service["volumes"])
