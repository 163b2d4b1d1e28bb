"""Build the wheel and the source distribution, and look at what is in them."""

import tarfile
import zipfile
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from tests.helpers.cli_process import ROOT


def test_wheel_is_small_and_has_the_package_only(tmp_path: Path) -> None:
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(path).stat().st_size < 8e6
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"demucs_infer"}
    assert not [name for name in names if name.endswith((".png", ".mp3", ".wav", ".pyc"))]
    assert {"demucs_infer/py.typed", "demucs_infer/tiny.safetensors"} <= set(names)


def test_source_distribution_has_what_its_tests_and_docs_need(tmp_path: Path) -> None:
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["tests/data", "examples/open_unmix", "docs/assets", "tools/studio", ".ci"]
    for folder in needed:
        assert any(name.startswith(f"{folder}/") for name in names), folder
    assert {"Dockerfile", "compose.yaml", "mkdocs.yml", "constraints.txt"} <= names
