"""`demucs-infer batch MANIFEST`: a catalogue, on this machine or on many."""

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tqdm import tqdm

from demucs_infer.batch.discovery import STDIN
from demucs_infer.cli.custom_model import with_config
from demucs_infer.cli.models import fetch
from demucs_infer.cli.parser import EXIT_CODES, add_request_flags, at_least, number
from demucs_infer.cli.separate import (
    ALL_DONE,
    NO_INPUT,
    NO_MODEL,
    SOME_FAILED,
    check_out_folder,
    model_of,
    order_of,
)
from demucs_infer.distributed.conflicts import OutputConflicts
from demucs_infer.distributed.manifest import ResultRow, TrackManifest
from demucs_infer.distributed.storage import check_driver, is_remote, join, local_path
from demucs_infer.errors import ModelLoadingError
from demucs_infer.system.malloc import exempt_imports_from_gc, use_single_arena

if TYPE_CHECKING:
    from demucs_infer.distributed.planner import Benchmark
    from demucs_infer.distributed.ray_engine import Cluster
    from demucs_infer.distributed.results_table import Summary
    from demucs_infer.distributed.worker import WorkerConfig

_TEMPLATE = "{track}-{trackext}/{stem}.{ext}"  # song.mp3 and song.flac are two tracks
_TOLD = 10  # inputs that are named, of those that would be lost
_EVERY = 60.0  # seconds between two lines of progress in a log


def run(words: Sequence[str]) -> int:
    """Separate every track of the manifest, or say what that would take."""
    args = with_config(_parser(), words)
    catalogue = TrackManifest(
        manifest=_anywhere(args.manifest_file),
        root=args.root and _anywhere(args.root),
        shard=args.shard or (0, 1),
    )
    if args.plan:
        from demucs_infer.distributed.planner import plan

        found = plan(catalogue, _benchmark(args), args.machines, args.price)
        sys.stdout.write(json.dumps(found.row(), indent=2) + "\n" if args.json else found.text())
        return ALL_DONE
    return _separate(args, catalogue)


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "demucs-infer batch",
        description="Separate all tracks of a manifest. What is done is skipped, what was "
        "interrupted goes on, and a track that killed its process twice is left out.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # some flags of single tracks mean a little more here
    )
    top.add_argument(
        "manifest_file",
        metavar="MANIFEST",
        help="a path a line, or .csv, .jsonl or .parquet with the column `path`, and perhaps "
        "`duration` (seconds), `references` (folder of true stems), `sha256`; a path or a URI",
    )
    add_request_flags(top)
    top.set_defaults(filename=_TEMPLATE)
    top.add_argument(
        "-o", "--out", default="separated", help="folder for the stems, or its URI (%(default)s)"
    )
    top.add_argument("--root", help="what relative paths begin at (the folder of the manifest)")
    top.add_argument("--results", help="table of results, .jsonl or .parquet (OUT/results.jsonl)")
    top.add_argument(
        "--collisions",
        choices=("error", "digest"),
        default="error",
        help="two tracks with the same output: refuse to start, or add a digest of the track's "
        "path to the names of both (%(default)s)",
    )
    top.add_argument("--force", action="store_true", help="redo finished and quarantined tracks")
    top.add_argument("--progress", choices=("auto", "bar", "json", "none"), default="auto")
    top.add_argument("--json", action="store_true", help="the summary as JSON on standard output")
    top.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    _engine_flags(top.add_argument_group("where"))
    _plan_flags(top.add_argument_group("planning"))
    return top


def _engine_flags(group: Any) -> None:
    group.add_argument(
        "--shard", type=_shard, metavar="I/N", help="every N-th row from the I-th on, from 0"
    )
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="(%(default)s)")
    group.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster that runs; or auto")
    group.add_argument("--workers", type=at_least(1), default=1, help="at most (%(default)s)")
    group.add_argument(
        "--gpus-per-worker", type=number(0), default=0.0, help="0.5: two share one (%(default)s)"
    )
    group.add_argument("--cpus-per-worker", type=number(0), default=1.0, help="(%(default)s)")
    group.add_argument("--rows-per-task", type=at_least(1), default=16, help="(%(default)s)")
    group.add_argument(
        "--together",
        type=at_least(1),
        metavar="N",
        help="tracks whose windows share batches of the network (8 on a GPU, 1 on a processor)",
    )


def _plan_flags(group: Any) -> None:
    group.add_argument(
        "--plan", action="store_true", help="say how long it would take, and separate nothing"
    )
    group.add_argument(
        "--bench",
        type=Path,
        help="JSON: what was measured on such a machine (this one is measured, for some seconds)",
    )
    group.add_argument("--machines", type=at_least(1), default=1, help="workers (%(default)s)")
    group.add_argument("--price", type=number(0), default=0.0, help="of a worker for an hour")


def _benchmark(args: argparse.Namespace) -> "Benchmark":
    """What was measured; without --bench, what is measured now, if nothing must be fetched."""
    from demucs_infer.distributed.planner import Benchmark

    if args.bench:
        return Benchmark.read_file(args.bench)
    from demucs_infer.distributed.benchmark import measure_here

    model = replace(model_of(args), offline=True)
    return measure_here(model, order_of(args), device=args.device, jobs=args.jobs)


def _shard(text: str) -> tuple[int, int]:
    which, _, count = text.partition("/")
    try:
        return int(which), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be like 0/3") from None


def _anywhere(place: str) -> str:
    """The same place, for a process that works in another folder."""
    return place if is_remote(place) else str(local_path(place).absolute())


def _separate(args: argparse.Namespace, catalogue: TrackManifest) -> int:
    if args.engine == "local" and args.workers > 1:
        raise ValueError(
            f"--workers {args.workers} needs --engine ray; without Ray, run as many commands "
            f"side by side, with --shard 0/{args.workers} and so on"
        )
    from demucs_infer.distributed.results_table import Summary, check_table, open_table

    _check(args, catalogue)
    check_table(_results(args, catalogue))
    args.repo = args.repo and args.repo.absolute()
    model, order, out = model_of(args), order_of(args), _anywhere(args.out)
    conflicting, total = _surveyed(args, catalogue, OutputConflicts.of(model, order), out)
    use_single_arena()
    with exempt_imports_from_gc():
        from demucs_infer.distributed.worker import WorkerConfig
    assignment = WorkerConfig(
        model=model,
        order=order,
        out=out,
        conflicting=conflicting,
        device=args.device,
        jobs=args.jobs,
        skip="nothing" if args.force else "same",
        run_id=uuid4().hex if args.force else "",
        together=args.together or 0,
    )
    tally = Summary()
    with ExitStack() as stack:
        answers = stack.enter_context(closing(_answers(args, catalogue, assignment)))
        table = stack.enter_context(open_table(_results(args, catalogue)))
        say = stack.enter_context(_BatchProgress(args, tally, total))
        for answer in tally.counted(answers):
            if answer["fault"] == "model":  # so it would go with all the others
                raise ModelLoadingError(answer["error"])
            table.add(answer)
            say.answer(answer)
    if not args.quiet:
        sys.stderr.write(f"{tally.line()}\n")
    if args.json:
        sys.stdout.write(json.dumps(tally.summary()) + "\n")
    return _exit_code(tally)


def _check(args: argparse.Namespace, catalogue: TrackManifest) -> None:
    """A `ValueError` for what could only go wrong, or would do something else than is asked for."""
    unheard = {"--page": args.page, "--no-manifest": not args.manifest}
    unheard["--list-models"] = args.list_models
    for flag, is_given in unheard.items():
        if is_given:
            raise ValueError(f"{flag} means nothing to `demucs-infer batch`: leave it out")
    if _anywhere(_results(args, catalogue)) == catalogue.manifest:
        raise ValueError(f"--results would replace the manifest {catalogue.manifest}")
    if args.out == STDIN:
        raise ValueError("--out names a folder, and - is none; write ./- if it is called that")
    check_driver(args.out)
    if not is_remote(args.out):
        check_out_folder(local_path(args.out))


def _surveyed(
    args: argparse.Namespace, catalogue: TrackManifest, claims: OutputConflicts, out: str
) -> tuple[frozenset[int], int]:
    """What is disputed, and how many rows there are; whatever would be lost is an error here.

    The shards of a catalogue agree, for each looks at all of it.
    """
    whole = replace(catalogue, shard=(0, 1))
    conflicting, rows = claims.find(whole)
    which, count = catalogue.shard
    lost = list(islice(claims.overwritten(whole, out), _TOLD))
    if lost:
        raise ValueError(
            "stems could be written over the tracks themselves; use another --out or --filename:"
            + "".join(f"\n  {path}" for path in lost)
        )
    if conflicting and (args.collisions == "error" or "{track}" not in claims.template):
        describe_conflicts = claims.describe_conflicts(whole, conflicting)
        raise ValueError(
            f"tracks get in each other's way, in {len(conflicting)} places; "
            "use --collisions digest, and {track} in --filename:"
            + "".join(f"\n  {quarrel}" for quarrel in describe_conflicts)
        )
    return conflicting, len(range(which, rows, count))


def _results(args: argparse.Namespace, catalogue: TrackManifest) -> str:
    which, count = catalogue.shard
    name = "results.jsonl" if count == 1 else f"results-{which}-of-{count}.jsonl"
    found: str = args.results or join(args.out, name)
    return found


def _answers(
    args: argparse.Namespace, catalogue: TrackManifest, assignment: "WorkerConfig"
) -> Generator["ResultRow", None, None]:
    """Return the answers to come; where this process does the work, its model is loaded first."""
    from demucs_infer.distributed.worker import TrackWorker

    if args.engine == "ray":
        from demucs_infer.distributed.ray_engine import run

        return run(catalogue, partial(TrackWorker, assignment), _cluster(args))
    model = assignment.model
    if model.is_remote:
        fetch(model.name, cache_dir=model.cache_dir, offline=model.offline, quiet=args.quiet)
    worker = TrackWorker(assignment)
    worker.open()
    return worker(catalogue)


def _cluster(args: argparse.Namespace) -> "Cluster":
    from demucs_infer.distributed.ray_engine import Cluster

    return Cluster(
        address=args.ray_address,
        workers=args.workers,
        gpus=args.gpus_per_worker,
        cpus=args.cpus_per_worker,
        rows_per_task=args.rows_per_task,
    )


class _BatchProgress:
    """A bar, a line now and then, or a line of JSON for every track; errors are always said."""

    def __init__(self, args: argparse.Namespace, tally: "Summary", total: int) -> None:
        is_bar = args.progress == "bar" or (args.progress == "auto" and sys.stderr.isatty())
        self._bar = tqdm(total=total, unit=" tracks") if is_bar and not args.quiet else None
        self._is_json = args.progress == "json"
        self._is_quiet = args.quiet or args.progress == "none"
        self._tally = tally
        self._last = monotonic()

    def answer(self, answer: "ResultRow") -> None:
        """A track is over."""
        if self._is_json:
            self._say(json.dumps(answer, ensure_ascii=False))
        elif answer["status"] in ("failed", "quarantined"):
            hint = ", or use --force" if answer["status"] == "quarantined" else ""
            self._say(f"error: {answer['track']}: {answer['status']}: {answer['error']}{hint}")
        if self._bar is not None:
            self._bar.update()
        elif not self._is_quiet and monotonic() - self._last >= _EVERY:
            self._last = monotonic()
            self._say(self._tally.line())

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(f"{text}\n")

    def __enter__(self) -> "_BatchProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _exit_code(tally: "Summary") -> int:
    """As for single tracks."""
    bad = tally.counts["failed"] + tally.counts["quarantined"]
    if tally.faults["model"]:
        return NO_MODEL
    if not bad:
        return ALL_DONE
    return NO_INPUT if tally.faults["input"] == tally.tracks else SOME_FAILED
