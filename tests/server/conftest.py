"""Models, folders and a web server for tests of servers; a server and a browser for the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_process import make_repo
from tests.helpers.oracles import require_tool
from tests.helpers.server_process import FAST, Server, run_server, song
from tests.helpers.web_server import WebServer, run_web_server

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make small models, which no test changes."""
    return make_repo(tmp_path_factory.mktemp("models") / "repo")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a server's data."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def site() -> Iterator[WebServer]:
    """Offer half a second of noise within `/music`, and outside of it."""
    with run_web_server() as web:
        for path in ("/music/song.wav", "/secret.wav"):
            web.send_file(path, song(0.5))
        yield web


@pytest.fixture(scope="module")
def page_server(repo: Path, data: Path) -> Iterator[Server]:
    words = ["--repo", repo, "--models", f"bag,{FAST}", "--data-dir", data]
    with run_server(*words, "--max-duration-seconds", "60") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = require_tool("chromium")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, page_server: Server) -> Iterator[Any]:
    """Open the page; fail on script errors and on requests to other hosts."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    context.set_default_timeout(60_000)
    found = context.new_page()
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on(
        "request",
        lambda one: (
            None
            if one.url.startswith((page_server.url, "blob:", "data:"))
            else wrong.append(one.url)
        ),
    )
    found.goto(page_server.url)
    found.wait_for_selector("#model option", state="attached")
    yield found
    context.close()
    assert wrong == []
