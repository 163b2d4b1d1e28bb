"""Run `demucs-infer TRACKS...`: separate tracks, report each, and return an exit code."""

import argparse
import errno
import glob
import json
import os
import re
import select
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO

from demucs_infer.batch.chain import ChainedModelSpec
from demucs_infer.batch.discovery import STDIN, DiscoveredTrack, find_tracks
from demucs_infer.batch.job import TrackJob, find_done, hash_input
from demucs_infer.batch.output_paths import (
    OutputPaths,
    add_types,
    excerpt_suffix,
    find_collisions,
    resolve_collisions,
)
from demucs_infer.batch.replaced_input import describe_refusal, find_replaced_input
from demucs_infer.batch.request import ModelSpec, make_recipe
from demucs_infer.batch.result import TrackResult
from demucs_infer.cli.arguments import (
    check_stem_file,
    describe_ineffective_flags,
    read_model,
    read_request,
)
from demucs_infer.cli.demo import save_and_score, write_song
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.models import download
from demucs_infer.cli.older_files import clear_older_files, list_older_files, page_path
from demucs_infer.cli.parser import COMMANDS
from demucs_infer.cli.progress import AnnouncingReporter, Reporter, make_reporter
from demucs_infer.options import Request
from demucs_infer.system.malloc import exempt_imports_from_gc, limit_heaps

REFUSAL_ADVICE = "choose another --out or --filename, or --force to replace them"
"""What to do with a track that would replace the stems of another input."""

_PIPE_SECONDS = 3  # until a message says that the command is waiting for a pipe
_MAX_COLLISIONS = 10  # that an error lists
_MAX_NAME_WORDS = 12  # of a file name with spaces
_MAX_SIMILAR_NAMES = 1000  # that are compared with a misspelled one


def separate_tracks(args: argparse.Namespace, *, announces_tracks: bool = False) -> int:
    """Separate all tracks of the command line, report each, and return the exit code.

    With `announces_tracks`, the lines that upstream's command prints are on standard output, unless
    other data or nothing is requested there.
    """
    model, request = read_model(args), read_request(args)
    check_stem_file(args)
    if args.page and args.format == "stem.mp4":
        raise ValueError("--page cannot play stem.mp4 files: omit it, or choose another --format")
    is_piped = str(args.out) == STDIN
    reporter = make_reporter(args.progress, quiet=args.quiet, is_piped=is_piped)
    with ExitStack() as stack:
        stack.callback(reporter.close)
        out = _make_temp_folder(stack) if is_piped else args.out
        jobs = _make_jobs(args, model, request, out, stack, reporter)
        if args.dry_run:
            from demucs_infer.cli.dry_run import print_dry_run

            return print_dry_run(args, model, request, jobs)
        if warning := describe_ineffective_flags(args):
            reporter.show_note(f"warning: {warning}")
        reporter = _announce_tracks(reporter, args, out / model.folder, announces_tracks)
        results = []
        jobs_by_track = {job.track: job for job in jobs}
        older_files = {job.track: list_older_files(job) for job in jobs}
        unclear_tracks: set[str] = set()
        for result in _run_jobs(args, model, request, jobs, reporter, unclear_tracks):
            reporter.show_result(result)
            results.append(result)
            job = jobs_by_track[result.track]
            if result.ok:
                is_unclear = result.track in unclear_tracks
                older = older_files[result.track]
                _report_older_files(older, job, result, args, reporter, is_unclear=is_unclear)
            if args.page and result.ok:
                _write_page(result, job, reporter)
            if args.demo and result.ok and result.track == "demo" and not args.quiet:
                save_and_score(result, jobs[-1].source)
        if is_piped and results[0].ok:
            _copy_to_stdout(results[0])
    if args.json:
        _print_summary(results)
    return _exit_code(results)


def _announce_tracks(
    reporter: Reporter, args: argparse.Namespace, folder: Path, is_wanted: bool
) -> Reporter:
    """Return a reporter that prints tracks if wanted, and if standard output is free for it."""
    is_taken = str(args.out) == STDIN or args.json or args.quiet
    return AnnouncingReporter(reporter, folder) if is_wanted and not is_taken else reporter


def _make_temp_folder(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demucs-infer-")))


def _make_jobs(
    args: argparse.Namespace,
    model: ModelSpec,
    request: Request,
    out: Path,
    stack: ExitStack,
    reporter: Reporter,
) -> list[TrackJob]:
    """Return one job per track.

    Raises:
        ValueError: There are no tracks, or the files of some would replace others.
    """
    words = list(args.tracks)
    if args.demo:
        words.append(str(write_song(_make_temp_folder(stack))))
    tracks = find_tracks(words, skip=[out])
    if not tracks:
        raise ValueError(
            f"no audio files in {', '.join(args.tracks)}: give files such as wav, flac, mp3 or "
            "m4a, or a folder with such files"
        )
    if str(args.out) == STDIN and len(tracks) > 1:
        raise ValueError(f"--out - writes the stem of one track, got {len(tracks)} tracks")
    if str(args.out) == STDIN and sys.stdout is None:
        raise ValueError("--out - writes to standard output, which is closed")
    check_out_folder(out)
    excerpt = excerpt_suffix(request.input.start, request.input.duration)
    targets = {
        track.source: OutputPaths(
            folder=out / model.folder / track.folder,
            track=track.name,
            extension=request.output.extension,
            template=request.output.template,
        ).with_track_suffix(excerpt)
        for track in tracks
    }
    inputs = [track.source for track in tracks if track.source != STDIN]
    # The stems are unknown until the model is loaded. Two tracks that would write the same file for
    # some stem would also write the same file for a stem called "{stem}".
    if args.collisions == "number":
        targets = resolve_collisions(inputs, targets, ["{stem}"])
    else:
        if args.collisions == "auto":
            discovered = {track.source for track in tracks if track.is_discovered}
            renamed = add_types(targets, discovered, ["{stem}"])
            for source, target in renamed.items():
                reporter.show_note(
                    f"{source}: another track has this name, so it is {target.track_name}"
                )
            targets |= renamed
        _check_collisions(inputs, targets, ["{stem}"])
    names = [track.source for track in tracks]
    if args.demo:
        names[-1] = "demo"
    sources = [_save_stream(track, stack) for track in tracks]
    return [
        TrackJob(
            track=name,
            source=source,
            target=targets[track.source],
            is_temporary=source != Path(name),
        )
        for track, name, source in zip(tracks, names, sources)
    ]


def _report_older_files(
    older: Sequence[Path],
    job: TrackJob,
    result: TrackResult,
    args: argparse.Namespace,
    reporter: Reporter,
    *,
    is_unclear: bool,
) -> None:
    """List files of earlier runs that this run has not replaced; with --clean, remove them.

    If it is unclear whether they are of the same input, only --force --clean removes them at once.
    """
    removes = args.clean and (args.force or not is_unclear)
    left = clear_older_files(older, job, result, removes=removes, has_page=args.page)
    if not left or (result.status == "skipped" and not args.clean):
        return
    names = ", ".join(file.name for file in left)
    if removes:
        note = f"removed: {names}"
    elif args.clean:
        note = (
            f"kept, as they may be stems of another input: {names} (to remove them, repeat --clean)"
        )
    else:
        note = f"left from earlier runs: {names} (--clean removes such files)"
    reporter.show_note(f"{result.track}: {note}")


def check_out_folder(out: Path) -> None:
    """Raise `ValueError` if `out`, or a folder that it is in, is a file."""
    file = next((path for path in (out, *out.parents) if path.is_file()), None)
    if file and not out.is_dir():
        raise ValueError(f"--out {out} must be a folder, but {file} is a file")


def _check_collisions(
    inputs: Sequence[str], targets: dict[str, OutputPaths], stems: Sequence[str]
) -> None:
    """Raise `ValueError` if files would be written twice or would replace an input."""
    outputs = [(source, target.stems(stems).values()) for source, target in targets.items()]
    problems = list(find_collisions(inputs, outputs).values())
    if problems:
        omitted = ["..."] if len(problems) > _MAX_COLLISIONS else []
        raise ValueError(
            "several tracks would write the same files, or replace an input; use --filename, or "
            "--collisions number:\n  " + "\n  ".join([*problems[:_MAX_COLLISIONS], *omitted])
        )


def _save_stream(track: DiscoveredTrack, stack: ExitStack) -> Path:
    """Return the file of a track; standard input or a pipe is saved to a file first."""
    source = Path(track.source)
    if track.source != STDIN and not source.is_fifo():
        return source
    if track.source == STDIN and sys.stdin is None:
        raise ValueError("the track - is standard input, which is closed")
    path = _make_temp_folder(stack) / track.name
    with (
        nullcontext(sys.stdin.buffer) if track.source == STDIN else _open_pipe(source) as stream,
        path.open("wb") as file,
    ):
        shutil.copyfileobj(stream, file)
    return path


def _open_pipe(path: Path) -> IO[bytes]:
    """Open a pipe once it has data; after a while, print that the command is waiting for it."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    stream = os.fdopen(number, "rb")
    poll = select.poll()
    poll.register(number, select.POLLIN)
    if not poll.poll(1000 * _PIPE_SECONDS):
        sys.stderr.write(f"waiting for a program that writes to {path}\n")
        poll.poll()
    os.set_blocking(number, True)
    return stream


def _run_jobs(
    args: argparse.Namespace,
    model: ModelSpec,
    request: Request,
    jobs: Sequence[TrackJob],
    reporter: Reporter,
    unclear_tracks: set[str],
) -> Iterator[TrackResult]:
    """Yield a result per job, beginning with jobs that need neither the model nor torch.

    Tracks are put into `unclear_tracks` if the stems there may be of another input, or of the same.
    """
    weights = model.weights() or ()
    remaining = []
    for job in jobs:
        if not os.path.lexists(job.source):
            yield _fail_missing(job, model, args.tracks)
            continue
        digest = hash_input(job)
        if digest is not None and not args.force:
            recipe = make_recipe(request, digest, model, weights)
            if result := find_done(job, recipe, verify=args.verify):
                yield result
                continue
        replaced = None if digest is None else find_replaced_input(job, digest)
        if replaced is None or replaced.relation == "same":
            remaining.append(job)
        elif replaced.relation == "other" and not args.force:
            error = describe_refusal(job, replaced, REFUSAL_ADVICE)
            yield TrackResult(
                track=job.track, status="failed", model=model.name, error=error, fault="other"
            )
        else:
            if replaced.relation == "unclear":
                unclear_tracks.add(job.track)
            if not args.skip_existing:
                content = "" if replaced.relation == "other" else ", which had other content"
                reporter.show_note(f"{job.track}: replaces the stems of {replaced.name}{content}")
            remaining.append(job)
    if remaining:
        yield from _separate(args, model, request, weights, remaining, reporter)


def _fail_missing(job: TrackJob, model: ModelSpec, words: Sequence[str]) -> TrackResult:
    error = f"cannot be read: {os.strerror(errno.ENOENT)}"
    if re.match(r"[a-z][a-z0-9+.-]*://", job.track):
        error = "is a URL: download it, and name the file"
    elif glob.has_magic(job.track):
        error += ", and no file matches it as a pattern"
    elif commands := get_close_matches(job.track, COMMANDS, 1):
        error += f" (was the command `demucs-infer {commands[0]}` meant?)"
    elif name := _find_unquoted_name(job.source, words):
        error += f"; put quotes around the name: {shlex.quote(name)}"
    elif name := _find_similar_name(job.source):
        error += f"; did you mean {name}?"
    return TrackResult(
        track=job.track, status="failed", model=model.name, error=error, fault="input"
    )


def _find_unquoted_name(path: Path, words: Sequence[str]) -> str | None:
    """Return the name of a file with spaces that `path` and its neighbors are, or None."""
    index = next((i for i, word in enumerate(words) if Path(word) == path), 0)
    for start in range(max(0, index - _MAX_NAME_WORDS + 1), index + 1):
        for stop in range(max(start + 2, index + 1), start + _MAX_NAME_WORDS + 1):
            name = " ".join(words[start:stop])
            if os.path.lexists(name):
                return name
    return None


def _find_similar_name(path: Path) -> str | None:
    """Return the path of a file in the same folder, with a name similar to a missing one."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MAX_SIMILAR_NAMES)]
    except OSError:
        return None
    similar = get_close_matches(path.name, names, 1, cutoff=0.8)
    return str(path.with_name(similar[0])) if similar else None


def _separate(
    args: argparse.Namespace,
    model: ModelSpec,
    request: Request,
    weights: tuple[str, ...],
    jobs: Sequence[TrackJob],
    reporter: Reporter,
) -> Iterator[TrackResult]:
    reporter.show_stage(f"loading {model.name}")
    limit_heaps()
    with exempt_imports_from_gc():
        from demucs_infer.batch.runner import BatchRunner, open_separator
        from demucs_infer.devices import choose_devices
        from demucs_infer.system.threads import leave_cores_to_windows
    leave_cores_to_windows()
    choose_devices(request.separation.device)  # reports an unknown device before any download
    for part in (model.first, model.second) if isinstance(model, ChainedModelSpec) else (model,):
        if part.is_remote:
            download(part.name, cache_dir=part.cache_dir, offline=part.offline, quiet=args.quiet)
    separator = open_separator(model, request)
    if model.name == "tiny" and any(job.track != "demo" for job in jobs):
        reporter.show_note(
            "note: tiny is a small model, trained on synthetic music: for real songs omit -n tiny, "
            "and htdemucs is downloaded (84 MB)"
        )
    if str(args.out) == STDIN and len(separator.stems) != 1:
        names = ", ".join(separator.stems)
        raise ValueError(f"--out - writes one stem: choose it with --stems from {names}")
    inputs = [job.track for job in jobs if job.track != STDIN]
    _check_collisions(inputs, {job.track: job.target for job in jobs}, separator.stems)
    runner = BatchRunner(
        separator,
        model,
        request,
        weights=weights or model.weights() or (),
        skip="nothing" if args.force else "existing" if args.skip_existing else "same",
        verify=args.verify,
        reuses_stems=args.reuse,
        writes_manifest=args.manifest,
    )
    reporter.show_stage(f"reading {jobs[0].track}")
    with separator, closing(runner.run(jobs)) as items:
        for job, item in items:
            if isinstance(item, TrackResult):
                yield item
            else:
                reporter.show_event(job.track, item)


def _write_page(result: TrackResult, job: TrackJob, reporter: Reporter) -> None:
    """Write an HTML page with a player into the folder of a track's stems."""
    from demucs_infer.server.player import estimate_size, write_player

    size = estimate_size(result.stems, result.duration_seconds)
    path = page_path(job)
    reporter.show_note(f"writing {path}, about {max(size / 1e6, 0.1):.1f} MB")
    write_player(path, result.stems, job.target.track_name)


def _copy_to_stdout(result: TrackResult) -> None:
    with next(iter(result.stems.values())).open("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _print_summary(results: Sequence[TrackResult]) -> None:
    summary = {
        "done": sum(result.status == "done" for result in results),
        "skipped": sum(result.status == "skipped" for result in results),
        "failed": sum(result.is_failure for result in results),
        "tracks": [result.row() for result in results],
    }
    text = json.dumps(summary, ensure_ascii=False, indent=2) + os.linesep
    # The surrogates of a file name that is not UTF-8 become escapes of JSON.
    sys.stdout.write(text.encode(errors="backslashreplace").decode())


def _exit_code(results: Sequence[TrackResult]) -> int:
    failures = [result for result in results if result.is_failure]
    if not failures:
        return ExitCode.OK
    if len(failures) == len(results) and all(result.fault == "input" for result in failures):
        return ExitCode.NO_INPUT
    return ExitCode.SOME_FAILED
