"""The persistent list of jobs: one SQLite file that survives the process."""

import json
import logging
import sqlite3
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from demucs_infer.errors import ConfigError

logger = logging.getLogger(__name__)

Status = Literal["queued", "running", "done", "failed", "cancelled"]
FINAL: tuple[Status, ...] = ("done", "failed", "cancelled")

_TABLE = """
create table if not exists jobs (
    id text primary key, status text not null, created real not null, finished real,
    record text not null
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """The persistent part of a job."""

    id: str
    status: Status
    created: float
    name: str
    """The client's name for the track."""

    sha256: str
    size: int
    upload: str
    """File name of the upload, which is kept until the job has finished."""

    request: dict[str, Any]
    """The fields of the `SeparateRequest` that are not defaults."""

    entry: str = ""
    """Name of the cache entry with the stems."""

    attempts: int = 0
    """How often the job was started; more than once if the process ended meanwhile."""

    finished: float | None = None
    seconds: float | None = None
    is_cached: bool = False
    warnings: tuple[str, ...] = ()
    error: dict[str, Any] | None = None

    @property
    def is_final(self) -> bool:
        """Whether the job has finished."""
        return self.status in FINAL

    @property
    def owns_entry(self) -> bool:
        """Whether the cache entry was made for this job alone (`no_cache`)."""
        return self.entry.endswith(self.id)

    def replace(self, **changes: Any) -> "JobRecord":
        """Return a copy with some fields changed."""
        return replace(self, **changes)


class JobStore:
    """Job records by id; used from one thread."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=1, isolation_level=None)
        try:
            # Locked until the process ends, however it ends: a second server fails here.
            self._database.execute("pragma locking_mode = exclusive")
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            self._database.execute(_TABLE)
            self._database.execute("begin exclusive")
            self._database.execute("commit")
        except sqlite3.Error as error:
            self._database.close()
            raise ConfigError(
                f"data_dir = {str(path.parent)!r} cannot be used ({error}): is another server "
                "running there? Give each server its own data_dir"
            ) from error

    def put(self, record: JobRecord) -> bool:
        """Insert or replace a record; return False if the disk is full."""
        text = json.dumps({name: getattr(record, name) for name in JobRecord.__slots__})
        try:
            self._database.execute(
                "insert or replace into jobs values (?, ?, ?, ?, ?)",
                (record.id, record.status, record.created, record.finished, text),
            )
        except sqlite3.OperationalError as error:
            logger.error("job %s cannot be saved: %s", record.id, error)
            return False
        return True

    def get(self, id: str) -> JobRecord | None:
        """Return the record with this id."""
        row = self._database.execute("select record from jobs where id = ?", (id,)).fetchone()
        return None if row is None else _parse_record(row[0])

    def list_unfinished(self) -> list[JobRecord]:
        """Return every job that has not finished, the oldest first."""
        marks = ",".join("?" * len(FINAL))
        rows = self._database.execute(
            f"select record from jobs where status not in ({marks}) order by created",
            FINAL,
        )
        return [_parse_record(text) for (text,) in rows]

    def list_finished(self) -> list[JobRecord]:
        """Return every finished job."""
        rows = self._database.execute("select record from jobs where finished is not null")
        return [_parse_record(text) for (text,) in rows]

    def remove(self, id: str) -> None:
        """Delete a record; on a full disk it stays until the next clean-up."""
        with suppress(sqlite3.OperationalError):
            self._database.execute("delete from jobs where id = ?", (id,))

    def close(self) -> None:
        """Close the file and release its lock."""
        self._database.close()


def _parse_record(text: str) -> JobRecord:
    values = json.loads(text)
    return JobRecord(**values | {"warnings": tuple(values["warnings"])})
