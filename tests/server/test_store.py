"""The file of jobs: earlier versions, damage, and other servers."""

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from demucs_infer.errors import ConfigError
from demucs_infer.server.cache import ResultCache
from demucs_infer.server.store import JobRecord, JobStore, check_report

RECORD = JobRecord(
    id="1" * 32, status="queued", created=1.0, name="a.wav", sha256="", size=1, upload="x",
    request={"model": "bag"}, owner="me", warnings=("a",),
)  # fmt: skip
LEGACY = """create table jobs (
    id text primary key, status text not null, created real not null, finished real,
    record text not null
)"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store = JobStore(tmp_path / "jobs.sqlite")
    assert store.put(RECORD)
    store.close()
    return tmp_path / "jobs.sqlite"


def execute(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path)
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "null", '{"id": 1}', '{"request": [], "created": 0}']
)
def test_bad_row_is_dropped(path: Path, text: str) -> None:
    insert = f"insert into jobs values ('2', 'queued', 0, null, '{text}', 'me')"
    execute(path, insert)
    store = JobStore(path)
    assert store.get("2") is None
    store._database.execute(insert)
    assert store.list_unfinished() == store.list_by_owner("me", 9) == [RECORD]
    assert store._database.execute("select count(*) from jobs").fetchone() == (1,)
    store.close()


def test_table_of_earlier_version_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    text = '{"id": "1", "status": "done", "created": 1, "name": "a", "sha256": "", "size": 1, '
    text += '"upload": "x", "request": {}, "warnings": []}'
    execute(path, LEGACY, f"insert into jobs values ('1', 'done', 1, 2, '{text}')")
    for _ in range(2):
        store = JobStore(path)
        record = store.get("1")
        assert record is not None and record.owner == ""
        store.close()


def test_table_of_later_version_is_refused(path: Path) -> None:
    execute(path, "pragma user_version = 99")
    with pytest.raises(ConfigError, match="later version"):
        JobStore(path)


def test_page_that_cannot_be_read_is_no_damage(path: Path) -> None:
    """Such a report is of a disk that fails for a moment: the jobs must not be set aside."""
    head = "*** in database main ***\nPage 5: unable to get the page. error code="
    for code in (266, 8458):
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            check_report(f"{head}{code}")
    for report in (f"{head}11", "Page 4 is never used"):
        with pytest.raises(sqlite3.DatabaseError, match="quick_check failed"):
            check_report(report)
    check_report("ok")


@pytest.mark.parametrize("damage", ["no database", "damaged page"])
def test_damaged_file_is_set_aside(path: Path, damage: str) -> None:
    data = path.read_bytes()
    damaged = b"no database" * 999 if damage == "no database" else data[:4096] + bytes(9000)
    path.write_bytes(damaged)
    store = JobStore(path)
    assert store.put(RECORD) and store.list_unfinished() == [RECORD]
    store.close()
    (kept,) = path.parent.glob("jobs.sqlite.damaged-*")
    assert kept.read_bytes()[200:4096] == damaged[200:4096]


def test_second_server_is_refused(path: Path) -> None:
    store = JobStore(path)
    with pytest.raises(ConfigError, match="another server"):
        JobStore(path)
    store.close()


def test_an_entry_whose_folder_cannot_be_closed_does_not_stop_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry/drums.wav").write_bytes(b"x")
    close = os.close

    def fail(number: int) -> None:  # as a full network drive does
        close(number)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = ResultCache(tmp_path, max_bytes=1, keep_seconds=1.0)
    monkeypatch.setattr(os, "close", fail)
    cache.remove("entry")
    monkeypatch.undo()
    cache.remove("entry")
    assert not list(tmp_path.iterdir())
