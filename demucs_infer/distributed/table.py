"""The table of results: a row a track, as JSON lines or Parquet, at a path or a URI."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from demucs_infer.distributed.places import put
from demucs_infer.distributed.worker import Answer

_GROUP = 1000  # rows of Parquet that are held in memory


class Table(Protocol):
    """Where rows of results go, one after the other."""

    def add(self, answer: Answer) -> None:
        """The next row."""


@contextmanager
def open_table(place: str) -> Iterator[Table]:
    """A table that is at `place` when it is closed, whatever ended the run by then."""
    with tempfile.TemporaryDirectory(prefix="demucs-infer-") as folder:
        path = Path(folder, "table")
        table = _Parquet(path) if place.endswith(".parquet") else _Lines(path)
        try:
            yield table
        finally:
            table.close()
            put(path, place)


class _Lines:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape")

    def add(self, answer: Answer) -> None:
        self._file.write(json.dumps(answer, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError("a table of Parquet needs pyarrow: pip install pyarrow") from error
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
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[Answer] = []

    def add(self, answer: Answer) -> None:
        # Arrow has no mapping but lists of pairs.
        pairs = {name: list(answer[name].items()) for name in ("stems", "scores")}
        self._rows.append(answer | pairs)
        if len(self._rows) == _GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._make(self._rows, self._schema))
            self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


@dataclass(slots=True)
class Tally:
    """What the answers come to: counts, however many they are."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    sound_seconds: float = 0.0
    """Length of the tracks that were separated now."""

    _begun: float = field(default_factory=perf_counter)

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        self.counts[answer["status"]] += 1
        if answer["fault"]:
            self.faults[answer["fault"]] += 1
        if answer["status"] == "done":
            self.sound_seconds += answer["duration_seconds"]

    def counted(self, answers: Iterable[Answer]) -> Iterator[Answer]:
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
