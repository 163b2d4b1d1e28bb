"""`demucs-infer TRACKS...`: from words to an request, and from results to an exit code."""

import argparse
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from difflib import get_close_matches
from pathlib import Path

from demucs_infer.batch.discovery import STDIN, DiscoveredTrack, find_tracks
from demucs_infer.batch.job import TrackJob, find_done_before
from demucs_infer.batch.output_paths import OutputPaths, find_collisions, resolve_collisions
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.result import TrackResult
from demucs_infer.cli.custom_model import config_settings, own_model
from demucs_infer.cli.demo import compose, save_and_score
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.models import fetch
from demucs_infer.cli.parser import COMMANDS, read_request
from demucs_infer.cli.progress import Reporter, choose_report
from demucs_infer.options import Request
from demucs_infer.system.malloc import exempt_imports_from_gc, use_single_arena


def separate_tracks(args: argparse.Namespace) -> int:
    """Everything that the command line asks for; the exit code."""
    model = read_model(args)
    request = read_request(args, config_settings(args))
    is_piped = str(args.out) == STDIN
    report = choose_report(args.progress, quiet=args.quiet, is_piped=is_piped)
    with ExitStack() as stack:
        stack.callback(report.close)
        out = args.out
        if is_piped:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demucs-infer-")))
        tasks = _tasks(args, model, request, out, stack)
        if args.dry_run:
            from demucs_infer.cli.dry_run import forecast

            return forecast(args, model, request, tasks)
        results = []
        for result in _results(args, model, request, tasks, report):
            report.result(result)
            results.append(result)
            if args.page and result.ok:
                _write_page(result, tasks)
            if args.demo and result.ok and result.track == "demo" and not args.quiet:
                save_and_score(result, tasks[-1].source)
        if is_piped and results[0].ok:
            _to_stdout(results[0])
    if args.json:
        _print_json(results)
    return exit_code(results)


def read_model(args: argparse.Namespace) -> ModelSpec:
    """Return the model that the flags name."""
    if args.config is not None:
        return own_model(args)
    return ModelSpec(
        name=args.sig or args.name,
        repo=args.repo,
        cache_dir=args.cache_dir,
        offline=args.offline,
        trust=args.trust_checkpoint,
    )


def _tasks(
    args: argparse.Namespace,
    model: ModelSpec,
    request: Request,
    out: Path,
    stack: ExitStack,
) -> list[TrackJob]:
    """All tracks and their targets, none of which gets in the way of another."""
    words = [*args.tracks, *([_demo(stack)] if args.demo else [])]
    found = find_tracks(words, skip=[out])
    if not found:
        raise ValueError(f"no audio files in {', '.join(args.tracks)}")
    if str(args.out) == STDIN and len(found) > 1:
        raise ValueError(f"--out - writes one track, and {len(found)} were named")
    if str(args.out) == STDIN and sys.stdout is None:
        raise ValueError("--out - writes to standard output, which is closed")
    check_out_folder(out)
    folder = out / model.folder
    targets = {
        one.source: OutputPaths(
            folder=folder / one.folder,
            track=one.name,
            extension=request.output.extension,
            template=request.output.template,
        )
        for one in found
    }
    inputs = [one.source for one in found if one.source != STDIN]
    # Stems are not known before the model is; two tracks that share any share this one.
    if args.collisions == "number":
        targets = resolve_collisions(inputs, targets, ["{stem}"])
    else:
        check_collisions(inputs, targets, ["{stem}"])
    return [
        TrackJob(
            track="demo" if args.demo and one is found[-1] else one.source,
            source=_file(one, stack),
            target=targets[one.source],
        )
        for one in found
    ]


def check_out_folder(out: Path) -> None:
    """A `ValueError` if no folder can be there."""
    if not out.is_dir() and any(part.is_file() for part in (out, *out.parents)):
        raise ValueError(f"--out names a folder, and {out} is a file, or below one")


def _demo(stack: ExitStack) -> str:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="demucs-infer-"))
    return str(compose(Path(folder)))


def check_collisions(
    inputs: Sequence[str], targets: dict[str, OutputPaths], stems: Sequence[str]
) -> None:
    """A `ValueError` that lists every file that would be written twice, or over an input."""
    outputs = [(source, target.stems(stems).values()) for source, target in targets.items()]
    problems = find_collisions(inputs, outputs)
    if problems:
        lines = [*list(problems.values())[:10], *(["..."] if len(problems) > 10 else [])]
        raise ValueError(
            "tracks get in each other's way; use --filename, or --collisions number:\n  "
            + "\n  ".join(lines)
        )


def _file(found: DiscoveredTrack, stack: ExitStack) -> Path:
    """The file of a track; what comes through a pipe is put into one first."""
    source = Path(found.source)
    if found.source != STDIN and not source.is_fifo():
        return source
    if found.source == STDIN and sys.stdin is None:
        raise ValueError("the track was to come through standard input, which is closed")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="demucs-infer-"))
    path = Path(folder, found.name)
    with (
        nullcontext(sys.stdin.buffer) if found.source == STDIN else source.open("rb") as given,
        path.open("wb") as file,
    ):
        shutil.copyfileobj(given, file)
    return path


def _results(
    args: argparse.Namespace,
    model: ModelSpec,
    request: Request,
    tasks: Sequence[TrackJob],
    report: Reporter,
) -> Iterator[TrackResult]:
    """One result for every track; what is done, or not there, needs no torch to say so."""
    weights = model.weights() or ()
    left = []
    for task in tasks:
        known = _missing(task, model)
        if known is None and not args.force:
            known = find_done_before(task, request, model, weights)
        if known:
            yield known
        else:
            left.append(task)
    if left:
        yield from _separated(args, model, request, weights, left, report)


def _missing(task: TrackJob, model: ModelSpec) -> TrackResult | None:
    if os.path.lexists(task.source):
        return None
    word = task.track
    error = f"cannot be read: {os.strerror(errno.ENOENT)}"
    if close := get_close_matches(word, COMMANDS, 1):
        error += f" (was the command `demucs-infer {close[0]}` meant?)"
    return TrackResult(track=word, status="failed", model=model.name, error=error, fault="input")


def _separated(
    args: argparse.Namespace,
    model: ModelSpec,
    request: Request,
    weights: tuple[str, ...],
    tasks: Sequence[TrackJob],
    report: Reporter,
) -> Iterator[TrackResult]:
    use_single_arena()
    if model.is_remote:
        fetch(model.name, cache_dir=model.cache_dir, offline=model.offline, quiet=args.quiet)
    with exempt_imports_from_gc():
        from demucs_infer.batch.runner import BatchRunner, open_separator

    separator = open_separator(model, request)
    if str(args.out) == STDIN and len(separator.stems) != 1:
        names = ", ".join(separator.stems)
        raise ValueError(f"--out - writes one stem: choose with --stems one of {names}")
    inputs = [task.track for task in tasks if task.track != STDIN]
    check_collisions(inputs, {task.track: task.target for task in tasks}, separator.stems)
    batch = BatchRunner(
        separator,
        model,
        request,
        weights=weights or model.weights() or (),
        skip="nothing" if args.force else "existing" if args.skip_existing else "same",
        writes_manifest=args.manifest,
    )
    with separator, closing(batch.run(tasks)) as items:
        for job, item in items:
            if isinstance(item, TrackResult):
                yield item
            else:
                report.event(job.track, item)


def _write_page(result: TrackResult, tasks: Sequence[TrackJob]) -> None:
    """The stems of a track with a player around them, beside the files."""
    from demucs_infer.server.player import write_player

    target = next(task.target for task in tasks if task.track == result.track)
    write_player(target.manifest.with_suffix(".html"), result.stems, Path(target.track).stem)


def _to_stdout(result: TrackResult) -> None:
    with next(iter(result.stems.values())).open("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _print_json(results: Sequence[TrackResult]) -> None:
    summary = {
        "done": sum(result.status == "done" for result in results),
        "skipped": sum(result.status == "skipped" for result in results),
        "failed": sum(not result.ok for result in results),
        "tracks": [result.row() for result in results],
    }
    text = json.dumps(summary, ensure_ascii=False, indent=2) + os.linesep
    # A file's name need not be UTF-8: what is none is written as JSON's own escape.
    sys.stdout.write(text.encode(errors="backslashreplace").decode())


def exit_code(results: Sequence[TrackResult]) -> int:
    """What the results of a run come to."""
    bad = [result for result in results if not result.ok]
    if not bad:
        return ExitCode.OK
    if len(bad) == len(results) and all(result.fault == "input" for result in bad):
        return ExitCode.NO_INPUT
    return ExitCode.SOME_FAILED
