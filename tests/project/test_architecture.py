"""Check that every import points up the ladder of rooms, and that no room but the last prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "demucs_infer"

# A room may import from itself and from rooms above it in this list, never from one below.
LADDER = {
    "errors": "errors",
    "events": "events",
    "system": "system log utils compat left_out",
    "formats": "audio.formats audio.filenames",  # what options need to know of files
    "options": "options",
    "audio": "audio",
    "networks": "demucs hdemucs htdemucs wdemucs transformer layers spec wiener upstream",
    "engine": "engine devices",
    "optimized": "optimized",
    "checkpoints": "checkpoints states",
    "apply": "apply",
    "custom": "custom extension",
    "pretrained": "pretrained repo hf",
    "pictures": "pictures",
    "metrics": "metrics",
    "api": "api separator_state track_separation sources results",
    "demo": "demo",
    "batch": "batch",
    "server": "server",
    "distributed": "distributed",
    "command line": "cli separate",
}
RANK = {room: rank for rank, room in enumerate(LADDER)}
APART = [{"audio", "networks"}, {"audio", "checkpoints"}, {"server", "distributed"}]


ROOMS = {module: room for room, modules in LADDER.items() for module in modules.split()}


def room_of(module: str) -> str | None:
    """Return the room of a module: `demucs_infer.audio.reader` -> `audio`; the root has none."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((ROOMS[name] for name in names if name in ROOMS), None)


def module_name(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def list_imports() -> list[tuple[str, str]]:
    imports = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"relative import in {path}"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imports += [(module_name(path), name) for name in names]
            elif isinstance(node, ast.Import):
                imports += [(module_name(path), alias.name) for alias in node.names]
    own = {pair for pair in imports if pair[1].startswith("demucs_infer")}
    return sorted(own)


def test_every_module_has_a_room() -> None:
    roots = {"demucs_infer", "demucs_infer.__main__"}
    modules = {module_name(path) for path in ROOT.rglob("*.py")} - roots
    assert [name for name in sorted(modules) if room_of(name) is None] == []


@pytest.mark.parametrize(("importer", "imported"), list_imports())
def test_imports_point_up_the_ladder(importer: str, imported: str) -> None:
    above, below = room_of(importer), room_of(imported)
    if above is None or below is None or above == below:
        return
    assert RANK[below] <= RANK[above]
    assert not any({above, below} <= group for group in APART)
    if below == "networks":
        assert above != "engine", "the engine sees a network only as a protocol"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, demucs_infer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0


@pytest.mark.parametrize("module", ["errors", "log", "events", "options", "engine.plan"])
def test_module_does_not_import_torch(module: str) -> None:
    code = f"import sys, demucs_infer.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0


def test_only_the_command_line_prints() -> None:
    talkers = {ROOT / "log.py", *(ROOT / "cli").glob("*.py")}
    for path in ROOT.rglob("*.py"):
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        assert path in talkers or "print" not in names, path


def test_class_names_stand_for_one_thing_each() -> None:
    """Underscores are ignored; `upstream` repeats names that upstream's modules dictate."""
    places: dict[str, list[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        if "upstream" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                places.setdefault(node.name.lstrip("_"), []).append(place)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
