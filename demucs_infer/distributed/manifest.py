"""Read the rows of a manifest one at a time, from text, CSV, JSON lines or Parquet."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from demucs_infer.system.storage import join, open_binary, open_text, parent

COLUMNS = ("path", "duration", "references", "sha256")
"""The columns that are used: `path` is required, other columns are ignored."""


ResultRow = dict[str, Any]
"""A row of the results table: plain JSON values."""

_MAX_SECONDS = 1e9  # thirty years
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackRow:
    """One track of a manifest."""

    path: str
    """The path as written in the manifest; also used in the results table."""

    source: str
    """The resolved path or URI."""

    duration: float | None = None
    """Length in seconds, for planning."""

    references: str | None = None
    """Folder of true stems, to score the separated ones."""

    sha256: str | None = None
    """Digest of the file; with it, a finished track is skipped without reading the file."""

    @property
    def is_valid_path(self) -> bool:
        """Whether the path is valid on this file system."""
        try:
            return b"\0" not in os.fsencode(self.source)
        except UnicodeEncodeError:  # an unpaired surrogate
            return False

    @property
    def name(self) -> str:
        """The file name."""
        return _split(self.path)[-1]

    @property
    def folder(self) -> str:
        """The folder of the stems, relative to the output folder and never outside it."""
        parts = _split(self.path)[:-1]
        return "/".join("_" * len(part) if part == ".." else part for part in parts)


def _split(path: str) -> tuple[str, ...]:
    r"""Split a path or URI: `s3://bucket/a.wav` -> bucket, a.wav; `C:\a.wav` -> C, a.wav."""
    plain = re.sub(r"^[\w+.-]+://|:", "/", path.replace("\\", "/"))
    parts = tuple(part for part in PurePosixPath(plain).parts if part not in ("/", "//", "."))
    return parts or ("track",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackManifest:
    """A manifest, or one shard of it; each iteration reads the file again, row by row."""

    location: str
    root: str | None = None
    """Base of relative paths; None for the folder of the manifest."""

    shard: tuple[int, int] = (0, 1)
    """(index, count): the rows whose number, modulo count, is index."""

    def __post_init__(self) -> None:
        index, count = self.shard
        if count < 1:
            raise ValueError(f"shard {index}/{count}: the number of shards must be at least 1")
        if not 0 <= index < count:
            raise ValueError(f"shard {index}/{count} must be from 0/{count} to {count - 1}/{count}")

    def __iter__(self) -> Iterator[TrackRow]:
        index, count = self.shard
        root = self.root or parent(self.location)
        number = 0
        try:
            for number, fields in enumerate(_read(self.location), 1):
                if (number - 1) % count == index:
                    yield _parse_row(fields, root, f"{self.location}, row {number}")
        except csv.Error as error:  # for instance a quoted field without end
            raise ValueError(f"{self.location}, after row {number}: {error}") from error
        except OSError as error:
            raise ValueError(f"{self.location}: {error.strerror or error}") from error
        except ValueError as error:
            if self.location in str(error):
                raise
            raise ValueError(f"{self.location}: {error}") from error


def _parse_row(fields: Mapping[str, Any], root: str, where: str) -> TrackRow:
    """Validate the columns of a row; empty values count as absent."""
    present = {name: value for name, value in fields.items() if name and value not in (None, "")}
    path, references, sha256 = (present.get(name) for name in ("path", "references", "sha256"))
    if path is None:
        columns = ", ".join(present) or "nothing"
        raise ValueError(f"{where}: expected a column `path`, found {columns}")
    if not isinstance(path, str):
        raise ValueError(f"{where}: path {path!r} must be text")
    if not (references is None or isinstance(references, str)):
        raise ValueError(f"{where}: references {references!r} must be the path of a folder")
    if not (sha256 is None or (isinstance(sha256, str) and _SHA256.match(sha256))):
        raise ValueError(f"{where}: sha256 {sha256!r} must be 64 hexadecimal digits")
    return TrackRow(
        path=path,
        source=join(root, path),
        duration=_parse_seconds(present.get("duration"), where),
        references=None if references is None else join(root, references),
        sha256=sha256 and sha256.lower(),
    )


def _parse_seconds(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not 0 <= seconds <= _MAX_SECONDS:
        raise ValueError(f"{where}: duration {value!r} must be a number of seconds")
    return seconds


def _read(location: str) -> Iterator[Mapping[str, Any]]:
    """Yield the columns of each row; the suffix of the file decides how it is parsed."""
    suffix = PurePosixPath(location).suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(location)
        return
    with open_text(location) as lines:
        if suffix == ".csv":
            yield from _read_csv(lines)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _read_json_lines(lines)
        else:
            yield from _read_paths(lines)


def _read_paths(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if "\0" in line or (number == 1 and line.lstrip().startswith(("{", "["))):
            raise ValueError(
                "not a UTF-8 list of paths, one per line; name other manifests "
                ".csv, .jsonl, .ndjson or .parquet"
            )
        if line.strip():
            yield {"path": line.rstrip("\r\n")}


def _read_csv(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    reader = csv.DictReader(lines, strict=True)  # an unterminated quote is an error
    _check_columns(list(reader.fieldnames or ()))
    yield from reader


def _check_columns(names: list[str]) -> None:
    for name in COLUMNS:
        if names.count(name) > 1:
            raise ValueError(f"there are several columns {name!r}")


def _read_json_lines(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"line {number} must be a JSON object")
        yield fields


def _read_parquet(location: str) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{location} needs pyarrow: pip install pyarrow") from error
    with open_binary(location) as file:
        try:
            table = parquet.ParquetFile(file)
        except ValueError as error:
            raise ValueError(f"{location} is not a Parquet file: {error}") from error
        _check_columns(table.schema_arrow.names)
        columns = [name for name in COLUMNS if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                # Absent numbers are often NaN there.
                yield {name: value for name, value in row.items() if value == value}
