"""Manifests, workers and command lines for tests of batch runs."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from demucs_infer.audio.writer import save_audio
from demucs_infer.batch.request import ModelSpec
from demucs_infer.distributed.config import WorkerConfig
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.distributed.worker import TrackWorker
from demucs_infer.options import Request
from tests.helpers.audio_signals import make_noise
from tests.helpers.oracles import require_module
from tests.helpers.requests import make_request

MODEL = "9d0a6f1c"
STEMS = ("drums", "bass", "other", "vocals")


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the file's suffix, with a column that is to be ignored."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "ignored"])
            writer.writeheader()
            writer.writerows({**row, "ignored": "x"} for row in rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row | {"ignored": [1]}) for row in rows))
    elif path.suffix == ".parquet":
        pyarrow, parquet = require_module("pyarrow"), require_module("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(f"{row['path']}\n\n" for row in rows))
    return path


def write_list(folder: Path, *names: str) -> Path:
    """Write a manifest `list.txt` of these paths."""
    path = folder / "list.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def write_mixed_manifest(folder: Path, count: int) -> Path:
    """Write songs of several lengths and formats, one corrupt file, and their manifest."""
    for n in range(count - 1):
        suffix = ("wav", "flac", "mp3", "aiff")[n % 4]
        path = folder / f"in/{n % 3}/{n}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_audio(make_noise(2, round((0.4 + 0.02 * n) * 16000), n), path, 16000)
    (folder / "in/corrupt.wav").write_bytes(b"RIFF0000WAVE" + bytes(range(256)))
    paths = [str(path.relative_to(folder)) for path in sorted((folder / "in").rglob("*.*"))]
    return write_manifest(folder / "list.jsonl", [{"path": path} for path in paths])


def model_flags(repo: Path) -> list[str]:
    return ["--repo", str(repo), "-n", MODEL, "-d", "cpu"]


def batch_words(manifest: Path, repo: Path, out: Path | str | None = None) -> list[str]:
    """Return a quiet command line."""
    words = ["batch", str(manifest), *model_flags(repo), "-q"]
    return words if out is None else [*words, "-o", str(out)]


def make_worker(
    repo: Path, out: Path | str, request: Request | None = None, **more: Any
) -> TrackWorker:
    return TrackWorker(
        WorkerConfig(
            model=ModelSpec(name=MODEL, repo=repo),
            request=(request or make_request()).replace({"device": "cpu"}),
            out=str(out),
            **more,
        )
    )


def row_of(path: Path, **more: Any) -> TrackRow:
    return TrackRow(path=path.name, source=str(path), **more)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stem_digests(out: Path) -> dict[str, str]:
    """Return the digest of each stem below `out`."""
    files = (path for path in out.rglob("*.wav") if path.is_file())
    return {str(path.relative_to(out)): sha256_of(path) for path in files}


def read_table(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
