"""Independent programs and packages that tests compare with: `require_tool("ffmpeg")`.

Where one is missing, the test is skipped and says which; in CI it fails, so that no comparison
is lost unnoticed.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test; in CI, where every oracle is installed, fail it."""
    if os.environ.get("DEMUCS_INFER_CI"):
        pytest.fail(f"{reason}: CI must install it")
    pytest.skip(reason)


def require_tool(name: str) -> str:
    """Return the path of a program, such as `ffmpeg`."""
    path = shutil.which(name)
    return path if path is not None else skip_or_fail(f"{name} is not installed")


def require_module(name: str) -> Any:
    """Import a module to compare with."""
    try:
        return importlib.import_module(name)
    except ImportError:
        skip_or_fail(f"{name} cannot be imported")


def import_oracle(name: str) -> Any:
    """Import a package that is beside the environment, in the folder `DEMUCS_INFER_ORACLES`."""
    root = Path(__file__).parents[2]
    folder = os.environ.get("DEMUCS_INFER_ORACLES", str(root / ".oracles"))
    sys.path.append(folder)
    try:
        return require_module(name)
    finally:
        sys.path.remove(folder)
