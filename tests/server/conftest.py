"""A server and a browser for the tests of the page, one of each module."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.cli_process import make_repo
from tests.helpers.oracles import require_tool
from tests.helpers.server_process import FAST, Server, run_server

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    repo = make_repo(folder / "repo")
    words = ["--repo", repo, "--models", f"bag,{FAST}", "--data-dir", folder / "data"]
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
