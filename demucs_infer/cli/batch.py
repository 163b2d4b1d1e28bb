"""Run `demucs-infer batch MANIFEST`: separate all tracks of a manifest, on one machine or many."""

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tqdm import tqdm

from demucs_infer.audio.formats import FORMATS
from demucs_infer.batch.discovery import STDIN
from demucs_infer.cli.argument_types import at_least, number
from demucs_infer.cli.arguments import (
    check_stem_file,
    describe_ineffective_flags,
    parse_arguments,
    read_model,
    read_request,
)
from demucs_infer.cli.exit_codes import EXIT_CODE_HELP, ExitCode
from demucs_infer.cli.models import download
from demucs_infer.cli.parser import FlagParser, add_request_flags
from demucs_infer.cli.separate import check_out_folder
from demucs_infer.distributed.conflicts import OutputConflicts
from demucs_infer.distributed.manifest import ResultRow, TrackManifest
from demucs_infer.errors import ModelLoadingError
from demucs_infer.system.malloc import exempt_imports_from_gc, limit_heaps
from demucs_infer.system.storage import check_driver, is_remote, join, local_path

if TYPE_CHECKING:
    from demucs_infer.distributed.config import WorkerConfig
    from demucs_infer.distributed.results_table import Summary

_TEMPLATE = "{track}-{trackext}/{stem}.{ext}"  # so that song.mp3 and song.flac do not collide
_MAX_EXAMPLES = 10  # inputs that an error lists
_LOG_INTERVAL_SECONDS = 60.0


def run(words: Sequence[str]) -> int:
    """Separate every track of the manifest, or estimate how long that takes."""
    args = parse_arguments(make_parser(), words)
    _check_manifest(args.manifest_file)
    manifest = TrackManifest(
        location=_absolute(args.manifest_file),
        root=args.root and _absolute(args.root),
        shard=args.shard or (0, 1),
    )
    if args.plan:
        return _plan(args, manifest)
    return _separate(args, manifest)


def _check_manifest(name: str) -> None:
    """Raise `ValueError` for a folder or a song in place of a manifest."""
    suffixes = {suffix for kind in FORMATS.values() for suffix in kind.suffixes}
    if Path(name).is_dir() or Path(name).suffix.lower() in suffixes:
        raise ValueError(
            f"{name} is not a manifest, a list of tracks; for a folder or a song: "
            f"demucs-infer {name}"
        )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer batch`."""
    parser = FlagParser(
        "demucs-infer batch",
        description="Separate all tracks of a manifest. Finished tracks are skipped, interrupted "
        "ones resume, and a track that crashed its process twice is quarantined.",
        epilog=EXIT_CODE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # some flags of single tracks take URIs here
    )
    parser.add_argument(
        "manifest_file",
        metavar="MANIFEST",
        help="path or URI of a list of paths, one per line, or of a .csv, .jsonl or .parquet file "
        "with the column `path` and optional columns `duration` (seconds), `references` (folder "
        "of true stems) and `sha256`",
    )
    add_request_flags(parser)
    parser.set_defaults(template=_TEMPLATE)
    parser.add_argument(
        "-o", "--out", default="separated", help="path or URI of the output folder (%(default)s)"
    )
    parser.add_argument("--root", help="base of relative paths (the folder of the manifest)")
    parser.add_argument("--results", help="results table, .jsonl or .parquet (OUT/results.jsonl)")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page: counts, failures, speed over time",
    )
    parser.add_argument(
        "--collisions",
        choices=("error", "digest"),
        default="error",
        help="if two tracks have the same output: stop with an error, or add a digest of its path "
        "to the name of each (%(default)s)",
    )
    repeated = parser.add_mutually_exclusive_group()
    repeated.add_argument(
        "--force", action="store_true", help="redo finished and quarantined tracks"
    )
    repeated.add_argument(
        "--verify",
        action="store_true",
        help="read the stems of finished tracks, and redo those whose sha256 differs",
    )
    parser.add_argument("--progress", choices=("auto", "bar", "json", "none"), default="auto")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    _engine_flags(parser.add_argument_group("workers"))
    _plan_flags(parser.add_argument_group("planning"))
    return parser


def _engine_flags(group: Any) -> None:
    group.add_argument(
        "--shard", type=_shard, metavar="I/N", help="every N-th row, starting at row I (from 0)"
    )
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="(%(default)s)")
    group.add_argument("--ray-address", metavar="ADDRESS", help="a running cluster, or auto")
    group.add_argument(
        "--workers", type=at_least(1), default=1, help="maximum number (%(default)s)"
    )
    group.add_argument(
        "--gpus-per-worker", type=number(0), default=0.0, help="0.5 for two on each (%(default)s)"
    )
    group.add_argument("--cpus-per-worker", type=number(0), default=1.0, help="(%(default)s)")
    group.add_argument("--rows-per-task", type=at_least(1), default=16, help="(%(default)s)")
    group.add_argument(
        "--together",
        type=at_least(1),
        metavar="N",
        help="tracks whose windows share batches of the network (8 on a GPU, 1 on a CPU)",
    )


def _plan_flags(group: Any) -> None:
    group.add_argument(
        "--plan", action="store_true", help="estimate how long it would take; separate nothing"
    )
    group.add_argument(
        "--bench",
        type=Path,
        help="JSON file with a benchmark of a worker (default: measure this machine)",
    )
    group.add_argument("--machines", type=at_least(1), default=1, help="workers (%(default)s)")
    group.add_argument("--price", type=number(0), default=0.0, help="per worker and hour")


def _plan(args: argparse.Namespace, manifest: TrackManifest) -> int:
    """Print how long the tracks would take and what that would cost, without separating any.

    The speed of a worker is read from the `--bench` file, or measured on this machine.
    """
    from demucs_infer.distributed.planner import Benchmark, plan

    if args.bench:
        benchmark = Benchmark.read_file(args.bench)
    else:
        from demucs_infer.distributed.benchmark import measure_worker

        model = replace(read_model(args), offline=True)
        benchmark = measure_worker(model, read_request(args))
    estimate = plan(manifest, benchmark, args.machines, args.price)
    text = json.dumps(asdict(estimate), indent=2) if args.json else estimate.to_text()
    sys.stdout.write(f"{text}\n")
    return ExitCode.OK


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be like 0/3") from None


def _absolute(location: str) -> str:
    """Return an absolute location, for workers that run in another folder."""
    return location if is_remote(location) else str(local_path(location).absolute())


def _separate(args: argparse.Namespace, manifest: TrackManifest) -> int:
    from demucs_infer.distributed.results_table import Summary, check_table, open_table

    check_stem_file(args)
    _check_flags(args, manifest)
    check_table(_results_table(args, manifest))
    args.repo = args.repo and args.repo.absolute()
    model, out = read_model(args), _absolute(args.out)
    request = read_request(args)
    if not args.quiet and (warning := describe_ineffective_flags(args)):
        sys.stderr.write(f"warning: {warning}\n")
    outputs = OutputConflicts.from_request(model, request)
    shared_path_digests, total = _find_conflicts(args, manifest, outputs, out)
    limit_heaps()
    with exempt_imports_from_gc():
        from demucs_infer.batch.attempts import Run
        from demucs_infer.distributed.config import WorkerConfig
        from demucs_infer.distributed.report import RunReport
        from demucs_infer.system.threads import leave_cores_to_windows
    leave_cores_to_windows()
    config = WorkerConfig(
        model=model,
        request=request,
        out=out,
        shared_path_digests=shared_path_digests,
        skip="nothing" if args.force else "same",
        verify=args.verify,
        run=Run(id=uuid4().hex, ignores_earlier_crashes=args.force),
        max_tracks_per_batch=args.together or 0,
    )
    summary, report = Summary(), RunReport()
    with ExitStack() as stack:
        rows = stack.enter_context(closing(_run_engine(args, manifest, config)))
        table = stack.enter_context(open_table(_results_table(args, manifest)))
        progress = stack.enter_context(_BatchProgress(args, summary, total))
        for row in rows:
            summary.add(row)
            if row["fault"] == "model":  # all other rows would fail too
                raise ModelLoadingError(row["error"])
            table.add(row)
            report.add(row)
            progress.update(row)
    if args.report:
        args.report.write_text(report.to_html(summary.to_text()), "utf-8")
    if not args.quiet:
        sys.stderr.write(f"{summary.to_text()}\n")
    if args.json:
        sys.stdout.write(json.dumps(summary.to_json()) + "\n")
    return _exit_code(summary)


def _check_flags(args: argparse.Namespace, manifest: TrackManifest) -> None:
    """Raise `ValueError` for flags that batch does not support, or that exclude each other."""
    unsupported = {
        "--page": args.page,
        "--no-manifest": not args.manifest,
        "--list-models": args.list_models,
    }
    for flag, is_given in unsupported.items():
        if is_given:
            raise ValueError(f"`demucs-infer batch` does not support {flag}")
    if args.engine == "local" and args.workers > 1:
        raise ValueError(
            f"--workers {args.workers} needs --engine ray; without Ray, run {args.workers} "
            f"commands in parallel with --shard 0/{args.workers} and so on"
        )
    if _absolute(_results_table(args, manifest)) == manifest.location:
        raise ValueError(f"--results would replace the manifest {manifest.location}")
    if args.out == STDIN:
        raise ValueError("--out must be a folder, not '-' (use ./- for a folder named '-')")
    check_driver(args.out)
    if not is_remote(args.out):
        check_out_folder(local_path(args.out))


def _find_conflicts(
    args: argparse.Namespace, manifest: TrackManifest, outputs: OutputConflicts, out: str
) -> tuple[frozenset[int], int]:
    """Return the digests of paths that several rows share, and the number of rows of the shard.

    Every shard checks the whole manifest, so that all shards choose the same names.

    Raises:
        ValueError: Stems would overwrite an input or other stems.
    """
    whole = replace(manifest, shard=(0, 1))
    shared_path_digests, rows = outputs.find(whole)
    lost = list(islice(outputs.find_overwritten_inputs(whole, out), _MAX_EXAMPLES))
    if lost:
        raise ValueError(
            "stems could overwrite these inputs; use another --out or --filename:"
            + "".join(f"\n  {path}" for path in lost)
        )
    if shared_path_digests and (args.collisions == "error" or "{track}" not in outputs.template):
        raise ValueError(
            f"several tracks would write the same files, {len(shared_path_digests)} in total; "
            "use --collisions digest, and {track} in --filename:"
            + "".join(f"\n  {text}" for text in outputs.describe(whole, shared_path_digests))
        )
    index, count = manifest.shard
    return shared_path_digests, len(range(index, rows, count))


def _results_table(args: argparse.Namespace, manifest: TrackManifest) -> str:
    index, count = manifest.shard
    name = "results.jsonl" if count == 1 else f"results-{index}-of-{count}.jsonl"
    location: str = args.results or join(args.out, name)
    return location


def _run_engine(
    args: argparse.Namespace, manifest: TrackManifest, config: "WorkerConfig"
) -> Generator["ResultRow", None, None]:
    """Return the result rows; the local engine loads its model first, so that errors come early."""
    from demucs_infer.distributed.worker import TrackWorker

    if args.engine == "ray":
        from demucs_infer.distributed.ray_engine import Cluster
        from demucs_infer.distributed.ray_engine import run as run_on_ray

        cluster = Cluster(
            address=args.ray_address,
            workers=args.workers,
            gpus=args.gpus_per_worker,
            cpus=args.cpus_per_worker,
            rows_per_task=args.rows_per_task,
        )
        return run_on_ray(manifest, partial(TrackWorker, config), cluster)
    model = config.model
    if model.is_remote:
        download(model.name, cache_dir=model.cache_dir, offline=model.offline, quiet=args.quiet)
    worker = TrackWorker(config)
    worker.open()
    return worker(manifest)


class _BatchProgress:
    """Prints errors, and a progress bar, a line per minute, or a line of JSON per track."""

    def __init__(self, args: argparse.Namespace, summary: "Summary", total: int) -> None:
        is_bar = args.progress == "bar" or (args.progress == "auto" and sys.stderr.isatty())
        self._bar = tqdm(total=total, unit=" tracks") if is_bar and not args.quiet else None
        self._is_json = args.progress == "json"
        self._is_quiet = args.quiet or args.progress == "none"
        self._summary = summary
        self._last = monotonic()

    def update(self, row: "ResultRow") -> None:
        """Report a finished track."""
        if self._is_json:
            self._print(json.dumps(row, ensure_ascii=False))
        elif row["status"] in ("failed", "quarantined"):
            hint = ", or use --force" if row["status"] == "quarantined" else ""
            self._print(f"error: {row['track']}: {row['status']}: {row['error']}{hint}")
        if self._bar is not None:
            self._bar.update()
        elif not self._is_quiet and monotonic() - self._last >= _LOG_INTERVAL_SECONDS:
            self._last = monotonic()
            self._print(self._summary.to_text())

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(f"{text}\n")

    def __enter__(self) -> "_BatchProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _exit_code(summary: "Summary") -> int:
    """Return the same exit code as for single tracks."""
    if summary.faults["model"]:
        return ExitCode.NO_MODEL
    if not summary.counts["failed"] + summary.counts["quarantined"]:
        return ExitCode.OK
    return ExitCode.NO_INPUT if summary.faults["input"] == summary.tracks else ExitCode.SOME_FAILED
