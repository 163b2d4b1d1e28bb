"""`demucs-infer mcp`, used by the client of the official SDK over standard streams."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from demucs_infer.cli.main import main
from tests.helpers.cli_process import environment, load, make_repo, write_song
from tests.helpers.oracles import require_module

MODEL = "9d0a6f1c"
STEMS = ["drums", "bass", "other", "vocals"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcp") / "root"
    write_song(folder / "song.wav", 1.0)
    write_song(folder.parent / "secret.wav", 1.0)
    (folder / "noise.wav").write_bytes(b"no music")
    (folder / "link.wav").symlink_to(folder.parent / "secret.wav")
    for stem in ("bass", "drums"):
        for kind in ("truth", "guess"):
            write_song(folder / kind / "song" / f"{stem}.wav", 1.0, seed=len(stem + kind[:1]))
    make_repo(folder.parent / "models")
    return folder


class Session:
    """What the server says of its tools, and the result of each call, in order."""

    def __init__(self) -> None:
        self.tools: dict[str, Any] = {}
        self.instructions = ""
        self.results: list[Any] = []
        self.progress: list[float] = []


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("list_models", {}),
    ("inspect_file", {"path": "song.wav"}),
    ("separate", {"path": "song.wav", "output_folder": "out/all", "model": MODEL}),
    (
        "separate",
        {"path": "song.wav", "output_folder": "out/two", "model": MODEL, "two_stems": "vocals"},
    ),
    ("evaluate", {"references": "truth", "estimates": "guess"}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("inspect_file", {"path": "../secret.wav"}, "outside of the folder"),
    ("inspect_file", {"path": "link.wav"}, "outside of the folder"),
    ("inspect_file", {"path": "/etc/passwd"}, "outside of the folder"),
    ("inspect_file", {"path": "none.wav"}, "is not a file"),
    ("inspect_file", {"path": "a\0b"}, "is not a path"),
    ("inspect_file", {"path": "noise.wav"}, "looks like text"),
    ("inspect_file", {}, "path"),
    ("separate", {"path": "song.wav", "output_folder": "../out", "model": MODEL}, "outside"),
    ("separate", {"path": "song.wav", "output_folder": "truth", "model": MODEL}, "empty folder"),
    ("separate", {"path": "song.wav", "output_folder": "song.wav"}, "empty folder"),
    ("separate", {"path": "song.wav", "output_folder": "o", "model": "../x.th"}, "unknown model"),
    ("separate", {"path": "song.wav", "output_folder": "o", "model": "hf://a/b"}, "unknown model"),
    ("separate", {"path": "song.wav", "output_folder": "o", "format": "exe"}, "expected one of"),
    (
        "separate",
        {"path": "song.wav", "output_folder": "o", "model": MODEL, "stems": ["kazoo"]},
        "kazoo",
    ),
    ("evaluate", {"references": "truth", "estimates": "/"}, "outside"),
]


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    mcp = require_module("mcp")
    words = ["-m", "demucs_infer", "mcp", "--root", folder, "--repo", folder.parent / "models"]
    server = mcp.StdioServerParameters(
        command=sys.executable, args=[*map(str, words), "-d", "cpu"], env=environment()
    )
    session = Session()

    async def note(progress: float, total: float | None, message: str | None) -> None:
        session.progress.append(progress)

    async def talk() -> None:
        async with mcp.Client(server) as client:
            session.instructions = client.instructions or ""
            session.tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            for name, arguments in [*CALLS, *(call[:2] for call in REFUSED)]:
                is_first = arguments.get("output_folder") == "out/all"
                session.results.append(
                    await client.call_tool(
                        name, arguments, progress_callback=note if is_first else None
                    )
                )

    anyio.run(talk)
    yield session


def test_tools_describe_themselves(session: Session) -> None:
    assert set(session.tools) == {"separate", "list_models", "inspect_file", "evaluate"}
    for tool in session.tools.values():
        assert tool.description
    schema = session.tools["separate"].input_schema
    assert schema["required"] == ["path", "output_folder"] and "context" not in schema["properties"]
    assert "stems" in session.instructions


def test_models_and_files_are_described(session: Session) -> None:
    models, file = (result.structured_content for result in session.results[:2])
    assert MODEL in [model["name"] for model in models["result"]]
    assert (file["duration_seconds"], file["sample_rate"], file["channels"]) == (1.0, 8000, 2)


def test_stems_are_those_of_the_command(session: Session, folder: Path, tmp_path: Path) -> None:
    every, two = (result.structured_content for result in session.results[2:4])
    assert every["stems"] == {stem: f"out/all/{stem}.wav" for stem in STEMS}
    assert set(two["stems"]) == {"vocals", "no_vocals"}
    assert session.progress == sorted(session.progress) and session.progress[-1] == 1.0
    words = ["-n", MODEL, "--repo", str(folder.parent / "models"), "-d", "cpu", "-q"]
    assert main([str(folder / "song.wav"), *words, "-o", str(tmp_path)]) == 0
    for stem in STEMS:
        expected = load(tmp_path / MODEL / "song" / f"{stem}.wav")
        assert abs(load(folder / every["stems"][stem]) - expected).max() < 1e-4


def test_stems_are_scored(session: Session) -> None:
    assert "sdr" in session.results[4].content[0].text
    assert not session.results[4].is_error


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[call[2] for call in REFUSED])
def test_invalid_call_is_refused(session: Session, number: int) -> None:
    result = session.results[len(CALLS) + number]
    assert result.is_error and REFUSED[number][2] in result.content[0].text
    assert "Traceback" not in result.content[0].text


def test_absent_root_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mcp", "--root", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
