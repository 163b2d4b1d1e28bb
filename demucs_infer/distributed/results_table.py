"""The table of results: a row a track, as JSON lines or Parquet, at a path or a URI."""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Protocol

from demucs_infer.batch.workdir import try_lock
from demucs_infer.distributed import storage
from demucs_infer.distributed.manifest import ResultRow
from demucs_infer.distributed.storage import is_remote, local_path

_PARTIAL = ".partial"
_GROUP = 1000  # rows of Parquet that are held in memory


_LINES, _PARQUET = (".jsonl", ".ndjson"), (".parquet",)


class ResultsTable(Protocol):
    """Where rows of results go, one after the other."""

    def add(self, answer: ResultRow) -> None:
        """The next row."""


def check_table(place: str) -> None:
    """A `ValueError` if no table can be put there, as far as can be seen without doing so."""
    if not place.lower().endswith((*_LINES, *_PARQUET)):
        kinds = ", ".join((*_LINES, *_PARQUET))
        raise ValueError(f"a table of results ends in one of {kinds}, unlike {place}")
    if place.lower().endswith(_PARQUET):
        _pyarrow()
    storage.check_driver(place)
    if not is_remote(place) and local_path(place).exists() and not local_path(place).is_file():
        raise ValueError(f"a table of results is a file, and {place} is none")


@contextmanager
def open_table(place: str) -> Iterator[ResultsTable]:
    """A table that is at `place` once it is complete, and until then beside it, as `.partial`."""
    check_table(place)
    is_complete = False
    with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
        final = Path(folder, "table") if is_remote(place) else local_path(place).resolve()
        part = final.with_name(final.name + _PARTIAL)
        make = _Parquet if place.lower().endswith(_PARQUET) else _Lines
        try:
            with _reserved(part) as file:
                with closing(make(file)) as table:
                    yield table
                is_complete = True
                if sys.platform == "win32":  # where open files keep their names
                    file.close()
                part.replace(final)
        finally:
            if is_remote(place):
                storage.upload(*((final, place) if is_complete else (part, place + _PARTIAL)))


@contextmanager
def _reserved(path: Path) -> Iterator[BinaryIO]:
    """An empty file, held against other runs that would write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        # Or one that was complete in this moment, and has got its final name.
        if not try_lock(file) or not os.fstat(file.fileno()).st_ino == _inode(path):
            raise ValueError(f"another run is writing {path}: give every run a table of its own")
        file.truncate(0)
        yield file


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


class _Lines:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, answer: ResultRow) -> None:
        # A name need not be UTF-8: what is none is written as JSON's own escape. A line at a time,
        # so that whoever dies leaves all it had to say.
        text = json.dumps(answer, ensure_ascii=False) + "\n"
        self._file.write(text.encode(errors="backslashreplace"))
        self._file.flush()

    def close(self) -> None:
        """Nothing is held back."""


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("a table of Parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow


class _Parquet:
    def __init__(self, file: BinaryIO) -> None:
        pyarrow = _pyarrow()
        text, number = pyarrow.string(), pyarrow.float64()
        kinds = dict.fromkeys(("track", "model", "status", "manifest", "key", "error"), text)
        kinds |= dict.fromkeys(("seconds", "duration_seconds", "resumed_seconds", "gain"), number)
        kinds |= {
            "fault": text,
            "warnings": pyarrow.list_(text),
            "stems": pyarrow.map_(text, text),
            "scores": pyarrow.map_(text, number),
        }
        self._make = pyarrow.Table.from_pylist
        self._schema = pyarrow.schema(list(kinds.items()))
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)
        self._rows: list[ResultRow] = []

    def add(self, answer: ResultRow) -> None:
        row: ResultRow = _utf8(answer)
        # Arrow has no mapping but lists of pairs.
        pairs = {name: list(row[name].items()) for name in ("stems", "scores")}
        self._rows.append(row | pairs)
        if len(self._rows) == _GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._make(self._rows, self._schema))
            self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _utf8(value: Any) -> Any:
    """The same, where a name that is not UTF-8 shows what it is instead."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_utf8(key): _utf8(one) for key, one in value.items()}
    return [_utf8(one) for one in value] if isinstance(value, list) else value


@dataclass(slots=True)
class Summary:
    """What the answers come to: counts, however many they are."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    sound_seconds: float = 0.0
    """Length of the tracks that were separated now."""

    _begun: float = field(default_factory=perf_counter)

    def add(self, answer: ResultRow) -> None:
        """Count one answer."""
        self.counts[answer["status"]] += 1
        if answer["fault"]:
            self.faults[answer["fault"]] += 1
        if answer["status"] == "done":
            self.sound_seconds += answer["duration_seconds"]

    def counted(self, answers: Iterable[ResultRow]) -> Iterator[ResultRow]:
        """The same answers."""
        for answer in answers:
            self.add(answer)
            yield answer

    @property
    def tracks(self) -> int:
        """How many there were."""
        return self.counts.total()

    def summary(self) -> dict[str, Any]:
        """As plain JSON values."""
        seconds = perf_counter() - self._begun
        statuses = ("done", "skipped", "failed", "quarantined")
        return {
            "tracks": self.tracks,
            **{status: self.counts[status] for status in statuses},
            "sound_seconds": round(self.sound_seconds, 3),
            "seconds": round(seconds, 3),
        }

    def line(self) -> str:
        """For people."""
        told = self.summary()
        parts = [f"{told[s]} {s}" for s in ("done", "skipped", "failed", "quarantined") if told[s]]
        rate = told["sound_seconds"] / max(told["seconds"], 1e-9)
        work = f"; {told['sound_seconds'] / 3600:.1f} h of sound, {rate:.1f} x real time"
        return f"{told['tracks']} tracks: {', '.join(parts) or 'none'}" + work * bool(told["done"])
