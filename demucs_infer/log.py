"""Upstream's helpers for messages at a terminal."""

import sys
from typing import NoReturn


def bold(text: str) -> str:
    """Return `text` in bold, for a terminal."""
    return f"\033[1m{text}\033[0m"


def fatal(message: str, code: int = 1) -> NoReturn:
    """Print an error to the error stream, and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
