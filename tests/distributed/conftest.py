"""Fixtures of batch runs."""

from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.helpers.cli_process import make_repo


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small models."""
    return make_repo(tmp_path_factory.mktemp("distributed") / "repo")


@pytest.fixture
def memory_store() -> Any:
    """Return an empty remote store: `memory://`."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return MemoryFileSystem()
