"""Words for people at a terminal; only the command line uses them."""

import sys
from typing import NoReturn


def bold(text: str) -> str:
    """`text` in bold letters."""
    return f"\033[1m{text}\033[0m"


def fatal(message: str, code: int = 1) -> NoReturn:
    """Say what is wrong on the error stream, and leave."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
