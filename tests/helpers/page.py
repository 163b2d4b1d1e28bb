"""Helpers for tests of the page in a browser."""

from pathlib import Path
from typing import Any

from tests.helpers.server_process import song


def file(name: str = "my song.wav", seconds: float = 3.0, seed: int = 0) -> dict[str, Any]:
    return {"name": name, "mimeType": "audio/wav", "buffer": song(seconds, seed)}


def separate(page: Any, *files: dict[str, Any]) -> None:
    page.set_input_files("#files", list(files))
    page.wait_for_selector(".stem .get")  # visible once the files are there


def evaluate(page: Any, question: str) -> Any:
    """Evaluate an expression on the transport `t` of the open player."""
    player = "document.querySelector('.player .transport').parentNode"
    return page.evaluate(f"(t => {question})({player}.transport)")


def levels(page: Any) -> list[float]:
    found: list[float] = evaluate(page, "t.tracks.map(track => t.level(track))")
    return found


def saved(page: Any, selector: str) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.click(selector)
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()
