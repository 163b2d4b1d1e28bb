"""Store the list of jobs in a SQLite file, so that it survives a restart."""

import json
import logging
import re
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from demucs_infer.errors import ConfigError
from demucs_infer.server.errors import ApiError, disk_full

logger = logging.getLogger(__name__)

Status = Literal["downloading", "queued", "running", "done", "failed", "cancelled"]
FINAL: tuple[Status, ...] = ("done", "failed", "cancelled")

_SCHEMA = 2
_SQLITE_IOERR = 10  # the constant of the module is not in Python 3.10
_TABLE = """
create table if not exists jobs (
    id text primary key, status text not null, created real not null, finished real,
    record text not null, owner text not null default ''
);
create index if not exists jobs_by_owner on jobs (owner, created);
"""
_MIGRATIONS = {1: "alter table jobs add column owner text not null default ''"}
"""SQL statements that convert a table of each version to the next version."""


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

    owner: str = ""
    """A digest of what identifies its client; empty if the client is not known."""

    url: str = ""
    """URL that the track is downloaded from; empty if it was sent."""

    duration: float | None = None
    """Seconds to separate, if the header of the track states them."""

    queued: float | None = None
    """When the track was downloaded; None if it was sent, with the request."""

    output: str = ""
    """URL of the folder that the stems are copied to."""

    webhook: str = ""
    """URL to which the end of the job is announced."""

    slot: str = ""
    """Name of its place in the queue of several servers."""

    traceparent: str = ""
    """The span of the request that created the job; empty if it is not traced."""

    attempts: int = 0
    """How often the job was started: again after each restart while it was running."""

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
        """Open the file; a damaged file is renamed, and replaced by an empty one."""
        try:
            self._database = self._open(path)
        except sqlite3.OperationalError as error:
            hint = "is another server running there? Give each server its own data_dir"
            if "I/O" in str(error):
                hint = "check the disk, or choose another data_dir"
            raise ConfigError(
                f"data_dir = {str(path.parent)!r} cannot be used ({error}): {hint}"
            ) from error
        except sqlite3.DatabaseError as error:
            kept = _set_aside(path)
            logger.error("%s is damaged (%s): jobs are lost; renamed to %s", path, error, kept.name)
            self._database = self._open(path)

    def _open(self, path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, timeout=1, isolation_level=None)
        with suppress(OSError):
            path.chmod(0o600)  # only the server's user can read it
        try:
            # The file stays locked until this process ends, so a second server fails here.
            database.execute("pragma locking_mode = exclusive")
            database.execute("pragma journal_mode = wal")
            database.execute("pragma synchronous = normal")
            database.execute("begin exclusive")
            _migrate(database, path)
            database.execute("commit")
            check_report(*database.execute("pragma quick_check").fetchone())
        except BaseException:
            database.close()
            raise
        return database

    def put(self, record: JobRecord) -> bool:
        """Insert or replace a record; return False if the disk is full, or fails."""
        text = dump_record(record)
        try:
            self._database.execute(
                "insert or replace into jobs (id, status, created, finished, record, owner) "
                "values (?, ?, ?, ?, ?, ?)",
                (record.id, record.status, record.created, record.finished, text, record.owner),
            )
        except sqlite3.DatabaseError as error:
            logger.error("job %s cannot be saved: %s", record.id, error)
            return False
        return True

    def put_error(self) -> ApiError:
        """Return the error for a record that could not be saved."""
        return disk_full()

    def get(self, id: str) -> JobRecord | None:
        """Return the record with this id."""
        return next(iter(self._select("id = ?", id)), None)

    def list_unfinished(self) -> list[JobRecord]:
        """Return every job that has not finished, the oldest first."""
        marks = ",".join("?" * len(FINAL))
        return self._select(f"status not in ({marks}) order by created", *FINAL)

    def list_finished(self) -> list[JobRecord]:
        """Return every finished job."""
        return self._select("finished is not null")

    def list_finished_ids(self) -> list[str]:
        """Return the id of every job that is done."""
        return [id for (id,) in self._database.execute("select id from jobs where status = 'done'")]

    def list_by_owner(self, owner: str, limit: int) -> list[JobRecord]:
        """Return the jobs of a client, the newest first."""
        return self._select("owner = ? order by created desc limit ?", owner, limit)

    def _select(self, condition: str, *values: object) -> list[JobRecord]:
        """Return the matching records; rows that cannot be read are deleted."""
        sql = f"select id, record from jobs where {condition}"
        records = []
        for id, text in self._database.execute(sql, values).fetchall():
            try:
                records.append(parse_record(text))
            except (ValueError, TypeError, KeyError) as error:
                logger.error("the record of job %s is damaged and is deleted: %s", id, error)
                self.remove(id)
        return records

    def remove(self, id: str) -> None:
        """Delete a record; on a full disk it stays until the next clean-up."""
        with suppress(sqlite3.DatabaseError):
            self._database.execute("delete from jobs where id = ?", (id,))

    def close(self) -> None:
        """Close the file and release its lock."""
        self._database.close()


def check_report(report: str) -> None:
    """Raise `sqlite3.DatabaseError` if SQLite's quick check has reported damage.

    Raises `sqlite3.OperationalError` if it could not read a page: the file may well be healthy.
    """
    if report == "ok":
        return
    code = re.search(r"error code=(\d+)", report)
    if code and int(code[1]) % 256 == _SQLITE_IOERR:
        raise sqlite3.OperationalError(f"disk I/O error {code[1]}")
    raise sqlite3.DatabaseError("quick_check failed")


def _migrate(database: sqlite3.Connection, path: Path) -> None:
    """Bring the tables to this version; raise `ConfigError` if they are of a later one."""
    (version,) = database.execute("pragma user_version").fetchone()
    if version > _SCHEMA:
        raise ConfigError(
            f"{path} was made by a later version of demucs-infer: use that, or another data_dir"
        )
    has_table = database.execute("select 1 from sqlite_master where name = 'jobs'").fetchone()
    if has_table:
        for step in range(max(version, 1), _SCHEMA):  # the first version had no number
            database.execute(_MIGRATIONS[step])
    for statement in _TABLE.split(";")[:-1]:
        database.execute(statement)
    database.execute(f"pragma user_version = {_SCHEMA}")


def _set_aside(path: Path) -> Path:
    """Rename a damaged file and the files of SQLite beside it; return the new path."""
    ending = time.strftime(".damaged-%Y%m%dT%H%M%S")
    for name in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            file = path.with_name(path.name + name)
            file.rename(file.with_name(file.name + ending))
    return path.with_name(path.name + ending)


def dump_record(record: JobRecord) -> str:
    """Return a record as JSON."""
    return json.dumps({name: getattr(record, name) for name in JobRecord.__slots__})


def parse_record(text: str) -> JobRecord:
    """Return the record in JSON; raise `ValueError`, `TypeError` or `KeyError` if it is damaged."""
    values = json.loads(text)
    names = {field.name for field in fields(JobRecord)}
    if not isinstance(values["request"], dict) or not isinstance(values["created"], int | float):
        raise ValueError("fields of other types")
    record = JobRecord(**{name: values[name] for name in names & values.keys()})
    return record.replace(warnings=tuple(record.warnings))
