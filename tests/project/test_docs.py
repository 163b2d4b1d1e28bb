"""The pages for people agree with the code."""

import ast
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from demucs_infer import errors
from demucs_infer.batch.manifest import Manifest, Recipe, Stem
from demucs_infer.events import Event, event_to_json
from tests.bench import chart
from tests.bench.pairs import Row
from tests.project.test_architecture import LADDER
from tools import docs_assets, docs_hooks, options_table

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def defined_in(path: Path) -> set[str]:
    """Return the names that a module defines: functions, classes, `Class.method`, constants."""
    names: set[str] = set()
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, functions | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, functions)}
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


def test_table_of_a_job_has_its_fields() -> None:
    from demucs_infer.server.schemas import JobView

    table = read("docs/server.md").split("| field | meaning |\n|---|---|\n")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted(JobView.model_fields)


def read_table(page: str, head: str) -> list[tuple[list[str], list[str]]]:
    """Return the names in the first two cells of each row of the table with that head."""
    rows = read(page).split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[re.findall(r"`([\w.]+)`", cell) for cell in row.split("|")[1:3]] for row in rows]
    return [(first, second) for first, second in cells]


def test_reference_has_all_events_errors_and_fields() -> None:
    page = "docs/reference/files.md"
    keys = {name: keys for (name,), keys in read_table(page, "event")}
    for event in get_args(Event):
        required = [item.name for item in fields(event) if item.default is MISSING]
        example = event_to_json(event(**dict.fromkeys(required, 0)))
        assert keys.pop(str(example.pop("event"))) == [*example]
    assert not keys
    bases = {name: bases for (name,), bases in read_table(page, "error")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, errors.DemucsError) and kind is not errors.DemucsError:
            assert bases.pop(kind.__name__) == [base.__name__ for base in kind.__bases__]
    assert not bases
    names = [name for row in read_table(page, "field") for cell in row for name in cell]
    own = [item.name for kind in (Manifest, Recipe, Stem) for item in fields(kind)]
    assert {*own, "schema", "key"} == set(names)


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    menu |= set(docs_hooks.list_unlisted_pages())
    assert menu == pages | set(docs_hooks.OUTSIDE.values())


def test_chart_is_drawn_from_the_numbers_of_the_bench() -> None:
    bench = json.loads(docs_assets.BENCH.read_text("utf-8"))
    table = read("tests/bench/README.md")
    for case in bench["cases"]:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {case['case']} |")][:1]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert [float(cell.split()[0]) for cell in cells[1:3]] == case["speed"]
        assert [int(cell.split()[0]) for cell in cells[5].split("/")] == case["peak_mib"]
    picture = (docs_assets.ASSETS / "bench.svg").read_text("utf-8")
    assert picture == docs_assets.make_chart(), "run `python -m tools.docs_assets chart`"


def test_chart_has_a_bar_for_each_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = json.loads(docs_assets.BENCH.read_text("utf-8"))
    before = docs_assets.make_chart().count("<rect")
    bench["cases"][-1]["others"] = {"demucs-infer 4.4.0": {"speed": 1.25, "peak_mib": 2222}}
    (tmp_path / "results.json").write_text(json.dumps(bench))
    monkeypatch.setattr(docs_assets, "BENCH", tmp_path / "results.json")
    drawn = docs_assets.make_chart()
    assert drawn.count("<rect") == before + 3, "two bars and an entry of the legend"
    assert ">1.25<" in drawn and ">2222<" in drawn and ">demucs-infer 4.4.0<" in drawn


def test_rows_of_the_bench_are_replaced_and_added() -> None:
    run = {"seconds": 2.0, "cpu": 3.0, "peak": 500.0}
    case = json.loads(docs_assets.BENCH.read_text("utf-8"))["cases"][-1]["case"]
    row = Row(case, 10.0, [run], [{**run, "seconds": 4.0}], None)
    page = read("tests/bench/README.md")
    replaced = chart.replace_row(page, row, chart.upstream())
    assert len(replaced.splitlines()) == len(page.splitlines())
    added = chart.replace_row(replaced, row, "other 1.0").splitlines()
    place = next(at for at, line in enumerate(added) if line.startswith(f"| {case} |"))
    assert added[place].startswith(f"| {case} | 5.00 × | 2.50 × | **2.00**")
    assert added[place + 1].startswith(f"| {case}, other 1.0 | 5.00 ×")


def test_nothing_is_installed_under_a_name_that_is_another_project() -> None:
    """The name `demucs-infer` in a package index is another project."""
    for path in [*PAGES, *sorted((ROOT / "demucs_infer").rglob("*.py"))]:
        text = (ROOT / path).read_text("utf-8")
        assert not re.findall(r"install [^\n]*\bdemucs-infer\[", text), path


def test_pictures_and_sounds_are_small() -> None:
    sizes = {path: path.stat().st_size for path in docs_assets.ASSETS.rglob("*.*")}
    assert max(sizes.values()) < 200_000 and sum(sizes.values()) < 2_500_000
    for path in docs_assets.ASSETS.rglob("*.svg"):
        ElementTree.parse(path)


def test_recording_shows_one_frame_at_a_time() -> None:
    root = ElementTree.parse(docs_assets.ASSETS / "terminal.svg").getroot()
    frames = []
    for animation in root.iter("{http://www.w3.org/2000/svg}animate"):
        assert animation.get("calcMode") == "discrete"  # a value holds until the next key time
        times = [float(moment) for moment in animation.get("keyTimes", "").split(";")]
        frames.append([*zip(times, animation.get("values", "").split(";"), strict=True)])
    assert len(frames) > 3
    for moment in (index / 100 for index in range(100)):
        visible = [[value for time, value in frame if time <= moment][-1] for frame in frames]
        assert visible.count("1") == 1, f"{visible} at {moment}"


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
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
        assert ((ROOT / page).parent / target).resolve().exists(), target
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / path).is_file(), path
        assert not name or name in defined_in(ROOT / path), f"{path} has no {name}"
    for path in re.findall(r"`((?:demucs_infer|docs|examples|tests|tools)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
