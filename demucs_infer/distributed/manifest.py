"""The tracks of a catalogue, read one at a time from text, CSV, JSON lines or Parquet."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from demucs_infer.distributed.storage import join, open_binary, open_text, parent

COLUMNS = ("path", "duration", "references", "sha256")
"""What a manifest may say of a track; only `path` must be there, other columns are left alone."""


ResultRow = dict[str, Any]
"""A row of results: plain JSON values."""

_LONGEST = 1e9  # thirty years
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackRow:
    """One track of a catalogue."""

    path: str
    """As it stands in the manifest: this is what results call it."""

    source: str
    """Where it is: a path or a URI."""

    duration: float | None = None
    """Seconds, for planning."""

    references: str | None = None
    """A folder with the true stems, to score what was made."""

    sha256: str | None = None
    """Of the file; where it is known, a track that is done need not be read to see that."""

    @property
    def is_possible(self) -> bool:
        """Whether any file can be called so."""
        try:
            return b"\0" not in os.fsencode(self.source)
        except UnicodeEncodeError:  # half of a letter
            return False

    @property
    def name(self) -> str:
        """The file's name."""
        return _steps(self.path)[-1]

    @property
    def folder(self) -> str:
        """Where its stems lie below the output: as the manifest has it, and never outside."""
        steps = _steps(self.path)[:-1]
        return "/".join("_" * len(step) if step == ".." else step for step in steps)


def _steps(path: str) -> tuple[str, ...]:
    """`s3://bucket/a/b.wav` -> bucket, a, b.wav; `/a/b.wav` -> a, b.wav; `C:\\a` -> C, a."""
    plain = re.sub(r"^[\w+.-]+://|:", "/", path.replace("\\", "/"))
    steps = tuple(step for step in PurePosixPath(plain).parts if step not in ("/", "//", "."))
    return steps or ("track",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackManifest:
    """A manifest, or every n-th of its rows; iterating reads it anew, a row at a time."""

    manifest: str
    root: str | None = None
    """What relative paths begin at; without it, the folder of the manifest."""

    shard: tuple[int, int] = (0, 1)
    """(which, of how many), counted from 0."""

    def __post_init__(self) -> None:
        which, count = self.shard
        if count < 1:
            raise ValueError(f"shard {which}/{count}: there must be one shard at least, as in 0/1")
        if not 0 <= which < count:
            raise ValueError(f"shard {which}/{count} must be from 0/{count} to {count - 1}/{count}")

    def __iter__(self) -> Iterator[TrackRow]:
        which, count = self.shard
        root = self.root or parent(self.manifest)
        number = 0
        try:
            for number, fields in enumerate(_fields(self.manifest), 1):
                if (number - 1) % count == which:
                    yield _row(fields, root, f"{self.manifest}, row {number}")
        except csv.Error as error:  # such as a field without end, for want of a quotation mark
            raise ValueError(f"{self.manifest}, after row {number}: {error}") from error
        except OSError as error:
            raise ValueError(f"{self.manifest}: {error.strerror or error}") from error
        except ValueError as error:
            if self.manifest in str(error):
                raise
            raise ValueError(f"{self.manifest}: {error}") from error


def _row(fields: Mapping[str, Any], root: str, where: str) -> TrackRow:
    """The row of these columns; what is empty counts as not there."""
    known = {name: fields[name] for name in COLUMNS if fields.get(name) not in (None, "")}
    path, references, sha256 = (known.get(name) for name in ("path", "references", "sha256"))
    if path is not None and not isinstance(path, str):
        raise ValueError(f"{where}: path {path!r} must be text")
    if path is None:
        found = [name for name, value in fields.items() if name and value not in (None, "")]
        raise ValueError(f"{where}: expected a `path`, found {', '.join(found) or 'nothing'}")
    if not (references is None or isinstance(references, str)):
        raise ValueError(f"{where}: references {references!r} must be the path of a folder")
    if not (sha256 is None or (isinstance(sha256, str) and _SHA256.match(sha256))):
        raise ValueError(f"{where}: sha256 {sha256!r} must be 64 hexadecimal digits")
    return TrackRow(
        path=path,
        source=join(root, path),
        duration=_seconds(known.get("duration"), where),
        references=None if references is None else join(root, references),
        sha256=sha256 and sha256.lower(),
    )


def _seconds(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not 0 <= seconds <= _LONGEST:
        raise ValueError(f"{where}: duration {value!r} is no number of seconds")
    return seconds


def _fields(manifest: str) -> Iterator[Mapping[str, Any]]:
    """The rows of the file, whose suffix says how they are written."""
    suffix = PurePosixPath(manifest).suffix.lower()
    if suffix == ".parquet":
        yield from _of_parquet(manifest)
        return
    with open_text(manifest) as lines:
        reader: Callable[[Iterable[str]], Iterator[Mapping[str, Any]]] = _READERS.get(
            suffix, _of_text
        )
        yield from reader(lines)


def _of_text(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if "\0" in line or (number == 1 and line.lstrip().startswith(("{", "["))):
            raise ValueError(
                "no list of paths, one a line, in UTF-8; other manifests end in "
                ".csv, .jsonl, .ndjson or .parquet"
            )
        if line.strip():
            yield {"path": line.rstrip("\r\n")}


def _of_csv(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    reader = csv.DictReader(lines, strict=True)  # a quotation that does not end is an error
    _check_columns(list(reader.fieldnames or ()))
    yield from reader


def _check_columns(names: list[str]) -> None:
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise ValueError(f"there are several columns {twice[0]!r}")


def _of_json_lines(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number + 1} of the manifest is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"line {number + 1} of the manifest must be a JSON object")
        yield found


def _of_parquet(manifest: str) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{manifest} needs pyarrow: pip install pyarrow") from error
    with open_binary(manifest) as file:
        try:
            table = parquet.ParquetFile(file)
        except ValueError as error:
            raise ValueError(f"{manifest} is no Parquet: {error}") from error
        _check_columns(table.schema_arrow.names)
        columns = [name for name in COLUMNS if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                # What is not known is often no number there.
                yield {name: value for name, value in row.items() if value == value}


_READERS: dict[str, Callable[[Iterable[str]], Iterator[Mapping[str, Any]]]] = {
    ".csv": _of_csv,
    ".jsonl": _of_json_lines,
    ".ndjson": _of_json_lines,
}
