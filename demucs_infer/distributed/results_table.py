"""Write the results table: one row per track, as JSON lines or Parquet, to a path or a URI."""

import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Protocol

from demucs_infer.distributed.manifest import ResultRow
from demucs_infer.system import storage
from demucs_infer.system.durability import make_folder
from demucs_infer.system.process_lock import ProcessLock
from demucs_infer.system.storage import is_remote, local_path

_PARTIAL = ".partial"
_ROWS_PER_GROUP = 1000  # of Parquet; they are held in memory
_STATUSES = ("done", "skipped", "failed", "quarantined")


_JSON_LINES, _PARQUET = (".jsonl", ".ndjson"), (".parquet",)


class ResultsTable(Protocol):
    """A table that rows can be added to."""

    def add(self, row: ResultRow) -> None:
        """Write the next row."""


def check_table(location: str) -> None:
    """Raise `ValueError` if it is already certain that no table can be written to `location`."""
    if not location.lower().endswith((*_JSON_LINES, *_PARQUET)):
        suffixes = ", ".join((*_JSON_LINES, *_PARQUET))
        raise ValueError(f"unsupported results table {location}: expected one of {suffixes}")
    if location.lower().endswith(_PARQUET):
        _import_pyarrow()
    storage.check_driver(location)
    path = local_path(location)
    if not is_remote(location) and path.exists() and not path.is_file():
        raise ValueError(f"the results table must be a file, and {location} is not")


@contextmanager
def open_table(location: str) -> Iterator[ResultsTable]:
    """Open a table, which has the suffix `.partial` until it is complete.

    Raises:
        ValueError: if no table can be written there, or another run is writing it.
    """
    check_table(location)
    is_complete = False
    with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
        final = Path(folder, "table") if is_remote(location) else local_path(location).resolve()
        partial = final.with_name(final.name + _PARTIAL)
        make_table = _ParquetTable if location.lower().endswith(_PARQUET) else _JsonLinesTable
        try:
            with _open_locked(partial) as file:
                with closing(make_table(file)) as table:
                    yield table
                is_complete = True
                if sys.platform == "win32":  # where open files cannot be renamed
                    file.close()
                partial.replace(final)
        finally:
            if is_remote(location) and is_complete:
                storage.upload(final, location)
            elif is_remote(location):
                storage.upload(partial, location + _PARTIAL)


@contextmanager
def _open_locked(path: Path) -> Iterator[BinaryIO]:
    """Open an empty file, locked against other runs that would write it."""
    make_folder(path.parent)
    # Not the table itself: on Windows, nothing can be written to a locked file.
    lock = ProcessLock(path.with_name(f".{path.name}.lock"))
    if not lock.acquire():
        raise ValueError(f"another run is writing {path}: use another results table for each run")
    if not lock.is_supported:
        warnings.warn(
            f"the file system of {path} has no file locks: do not start two runs with this table",
            stacklevel=5,
        )
    try:
        with path.open("wb") as file:
            yield file
    finally:
        if sys.platform != "win32":  # where releasing it removes the file
            lock.path.unlink(missing_ok=True)
        lock.release()


class _JsonLinesTable:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, row: ResultRow) -> None:
        # Paths that are not UTF-8 are written as JSON escapes.
        text = json.dumps(row, ensure_ascii=False) + "\n"
        self._file.write(text.encode(errors="backslashreplace"))
        self._file.flush()  # so that a run that is killed leaves all rows so far

    def close(self) -> None:
        pass


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("a Parquet table needs pyarrow: pip install pyarrow") from error
    return pyarrow


class _ParquetTable:
    def __init__(self, file: BinaryIO) -> None:
        pyarrow = _import_pyarrow()
        text, number = pyarrow.string(), pyarrow.float64()
        types = dict.fromkeys(("track", "model", "status", "manifest", "key", "error"), text)
        types |= dict.fromkeys(("seconds", "duration_seconds", "resumed_seconds", "gain"), number)
        types |= {
            "fault": text,
            "warnings": pyarrow.list_(text),
            "stems": pyarrow.map_(text, text),
            "scores": pyarrow.map_(text, number),
        }
        self._make_table = pyarrow.Table.from_pylist
        self._schema = pyarrow.schema(list(types.items()))
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)
        self._rows: list[ResultRow] = []

    def add(self, row: ResultRow) -> None:
        escaped: ResultRow = _escape(row)
        # Arrow represents a mapping as a list of pairs.
        pairs = {name: list(escaped[name].items()) for name in ("stems", "scores")}
        self._rows.append(escaped | pairs)
        if len(self._rows) == _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._make_table(self._rows, self._schema))
            self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _escape(value: Any) -> Any:
    """Escape what is not UTF-8 in all texts of a JSON value."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_escape(key): _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value


@dataclass(slots=True)
class Summary:
    """Counts over all result rows of a run."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    sound_seconds: float = 0.0
    """Total length of the tracks that were separated in this run."""

    _start: float = field(default_factory=perf_counter)

    def add(self, row: ResultRow) -> None:
        """Count one row."""
        self.counts[row["status"]] += 1
        if row["fault"]:
            self.faults[row["fault"]] += 1
        if row["status"] == "done":
            self.sound_seconds += row["duration_seconds"]

    @property
    def tracks(self) -> int:
        """The number of rows."""
        return self.counts.total()

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return {
            "tracks": self.tracks,
            **{status: self.counts[status] for status in _STATUSES},
            "sound_seconds": round(self.sound_seconds, 3),
            "seconds": round(perf_counter() - self._start, 3),
        }

    def to_text(self) -> str:
        """Return the summary as one line."""
        values = self.to_json()
        counts = [f"{values[status]} {status}" for status in _STATUSES if values[status]]
        line = f"{self.tracks} tracks: {', '.join(counts) or 'none'}"
        if not values["done"]:
            return line
        rate = values["sound_seconds"] / max(values["seconds"], 1e-9)
        return f"{line}; {values['sound_seconds'] / 3600:.1f} h of sound, {rate:.1f} x real time"
