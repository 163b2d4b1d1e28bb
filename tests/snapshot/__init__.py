"""What is public today, kept as files, so that no change of it goes unseen.

`python -m tests.snapshot` writes the files of `data` anew: a change on purpose is the diff of a
data file, and one by accident fails `tests/test_snapshot.py`.
"""

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
ADVICE = "if this is meant, `python -m tests.snapshot` writes it down"


def read_json(name: str) -> Any:
    """Read one of the data files."""
    return json.loads((DATA / name).read_text("utf-8"))


def write_json(name: str, value: Any) -> None:
    """Write one of the data files, so that a change of one thing is a change of one line."""
    write_text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(name: str, text: str) -> None:
    """Write one of the data files."""
    path = DATA / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
