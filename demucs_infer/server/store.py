"""The list of jobs, which outlives the process: one SQLite file."""

import json
import logging
import sqlite3
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from demucs_infer.errors import ConfigError

logger = logging.getLogger(__name__)

Status = Literal["queued", "running", "done", "failed", "cancelled"]
OVER: tuple[Status, ...] = ("done", "failed", "cancelled")

_TABLE = """
create table if not exists jobs (
    id text primary key, status text not null, created real not null, finished real,
    row text not null
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What is remembered of a job."""

    id: str
    status: Status
    created: float
    name: str
    """The client's name for the track."""

    sha256: str
    size: int
    upload: str
    """The file of ours that holds it, until the job is over."""

    wish: dict[str, Any]
    entry: str = ""
    """Which result is its."""

    attempts: int = 0
    """How often it was begun; more than once if the process ended meanwhile."""

    finished: float | None = None
    seconds: float | None = None
    is_cached: bool = False
    warnings: tuple[str, ...] = ()
    error: dict[str, Any] | None = field(default=None)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in OVER

    def but(self, **changes: Any) -> "JobRecord":
        """The same with some things changed."""
        return replace(self, **changes)


class JobStore:
    """Rows by id; used from one thread."""

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path, timeout=1, isolation_level=None)
        try:
            # Held until the process ends, however it ends: a second server finds it taken.
            self._base.execute("pragma locking_mode = exclusive")
            self._base.execute("pragma journal_mode = wal")
            self._base.execute("pragma synchronous = normal")
            self._base.execute(_TABLE)
            self._base.execute("begin exclusive")
            self._base.execute("commit")
        except sqlite3.Error as error:
            self._base.close()
            raise ConfigError(
                f"data_dir = {str(path.parent)!r} cannot be used ({error}): does another server "
                "run there? Give each its own with --data-dir"
            ) from error

    def put(self, row: JobRecord) -> bool:
        """Remember a row, in place of the last one of its id; false if there is no room for it."""
        text = json.dumps({name: getattr(row, name) for name in JobRecord.__slots__})
        try:
            self._base.execute(
                "insert or replace into jobs values (?, ?, ?, ?, ?)",
                (row.id, row.status, row.created, row.finished, text),
            )
        except sqlite3.OperationalError as error:
            logger.error("the job %s is not remembered: %s", row.id, error)
            return False
        return True

    def get(self, id: str) -> JobRecord | None:
        """The row of that id."""
        found = self._base.execute("select row from jobs where id = ?", (id,)).fetchone()
        return None if found is None else _row(found[0])

    def unfinished(self) -> list[JobRecord]:
        """Every job that is not over, the oldest first."""
        marks = ",".join("?" * len(OVER))
        rows = self._base.execute(
            f"select row from jobs where status not in ({marks}) order by created",
            OVER,
        )
        return [_row(text) for (text,) in rows]

    def finished(self) -> list[JobRecord]:
        """Every job that is over."""
        rows = self._base.execute("select row from jobs where finished is not null")
        return [_row(text) for (text,) in rows]

    def remove(self, id: str) -> None:
        """Forget a job, or do so next time if there is no room even for that."""
        with suppress(sqlite3.OperationalError):
            self._base.execute("delete from jobs where id = ?", (id,))

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()


def _row(text: str) -> JobRecord:
    values = json.loads(text)
    return JobRecord(**values | {"warnings": tuple(values["warnings"])})
