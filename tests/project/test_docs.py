"""The pages for people agree with the code."""

import ast
import re
from pathlib import Path

import pytest

from tests.project.test_architecture import LADDER
from tools import options_table

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"]
PAGES += ["docs/batch.md", "docs/gpu.md", "docs/options.md", "docs/migration.md"]


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def defined_in(path: Path) -> set[str]:
    """Return the names that a module defines: functions, classes, `Class.method`, constants."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_page_of_settings_is_up_to_date() -> None:
    text = options_table.PAGE.read_text("utf-8")
    assert text == options_table.options_table(), "run `python -m tools.options_table`"


def test_ladder_in_the_docs_is_that_of_the_imports() -> None:
    table = read("docs/architecture.md").split("| room |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    documented = {room.strip(): modules.replace("`", "").strip() for room, modules in rows}
    assert list(documented.items()) == list(LADDER.items()), "update docs/architecture.md"


def test_places_in_the_docs_exist() -> None:
    """`audio/gain.py` `clip_gains`: names behind a path are defined in that file."""
    text = read("docs/architecture.md")
    places = re.findall(r"`([\w/]+\.py)`((?:,? `\w[\w.]*`)*)", text)
    assert len(places) > 20
    for path, names in places:
        file = ROOT / ("" if path.startswith("tests/") else "demucs_infer") / path
        assert file.is_file(), path
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in defined_in(file), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_a_page_names_exist(page: str) -> None:
    text = read(page)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / path).is_file(), path
        assert not name or name in defined_in(ROOT / path), f"{path} has no {name}"
    for path in re.findall(r"`((?:demucs_infer|docs|examples|tests|tools)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
