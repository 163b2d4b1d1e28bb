"""Every test starts with the same random state and its own empty cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("DEMUCS_INFER_CI"):
    import hypothesis

    # The same examples each time: what a change broke must not hang on luck. Others are tried by
    # everybody who runs the tests elsewhere, and by tests/chaos.
    hypothesis.settings.register_profile("ci", derandomize=True, database=None, print_blob=True)
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def same_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No test leaks its random state into the next, or touches the user's cache."""
    import random

    import torch

    cache: Path = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("DEMUCS_INFER_CACHE", str(cache))
    states = random.getstate(), torch.get_rng_state()
    torch.manual_seed(0)
    random.seed(0)
    yield
    random.setstate(states[0])
    torch.set_rng_state(states[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, as `cli_process` does: the last bits depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
