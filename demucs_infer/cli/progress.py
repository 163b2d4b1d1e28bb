"""Report the progress of a run as a bar, as lines of JSON, or as results only.

All reports go to standard error; standard output is for requested data.
"""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

import tqdm

from demucs_infer.batch.result import TrackResult
from demucs_infer.events import (
    BatchSizeReduced,
    ChunkProcessed,
    DeviceChosen,
    Event,
    WarningEvent,
    event_to_json,
)

_BAR = "{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
# Programs that read the output of upstream's command search for "27%|" and "1/3 [".
_BAR_IN_PIPE = _BAR.replace("% |", "%|").replace(" s [", " [")
_NAME_WIDTH = 24


def make_reporter(
    progress: str, *, quiet: bool, is_piped: bool = False, stream: TextIO | None = None
) -> "Reporter":
    """Return the reporter for `--progress`; `auto` is a bar at a terminal, and no bar elsewhere."""
    stream = stream or sys.stderr
    if progress == "json":
        return JsonReporter(stream)
    if progress == "bar" or (progress == "auto" and stream.isatty() and not quiet):
        return BarReporter(stream, quiet=quiet, is_piped=is_piped)
    return Reporter(stream, quiet=quiet or progress == "none", is_piped=is_piped)


class Reporter:
    """Prints one line for every finished track, or if quiet only for tracks that failed."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, is_piped: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._is_piped = is_piped

    def show_event(self, track: str, event: Event) -> None:
        """Report progress of `track`."""
        if isinstance(event, WarningEvent):
            self.show_note(f"warning: {_name_once(track, event.message)}")
        elif isinstance(event, BatchSizeReduced):
            self.show_note(f"warning: {track}: out of memory, now {event.new} windows at a time")
        elif isinstance(event, DeviceChosen) and event.has_unused_gpu:
            self.show_note(f"warning: running on {event.device}: {event.reason}")

    def show_stage(self, text: str) -> None:
        """Report a step before the first bar; does nothing unless output goes to a terminal."""

    def show_result(self, result: TrackResult) -> None:
        """Report the end of a track."""
        for warning in result.warnings:
            if result.status != "skipped":  # those were printed when the track was done
                self.show_note(f"warning: {_name_once(result.track, warning)}")
        if result.status == "skipped" and result.error:
            self.show_note(f"{result.track}: skipped: {result.error}")
        elif not result.ok:
            self._write_line(f"error: {_name_once(result.track, result.error)}")
        elif result.status == "skipped":
            self.show_note(f"{result.track}: done before, skipped")
        else:
            self.show_note(f"{result.track}: {_summarize(result, self._is_piped)}")

    def show_note(self, text: str) -> None:
        """Print a line, unless the run is quiet."""
        if not self._quiet:
            self._write_line(text)

    def _write_line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the progress bar, if there is one."""


class BarReporter(Reporter):
    """Prints a line for every finished track, and a bar for the track in progress."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, is_piped: bool = False) -> None:
        super().__init__(stream, quiet=quiet, is_piped=is_piped)
        self._bar: tqdm.tqdm[Any] | None = None
        self._track = ""

    def show_event(self, track: str, event: Event) -> None:
        """Move the bar of `track`."""
        super().show_event(track, event)
        if not isinstance(event, ChunkProcessed):
            return
        if self._bar is None or self._track != track:
            self.close()
            self._track = track
            self._bar = tqdm.tqdm(  # looked up here: programs replace the class
                desc=_fit(track, _NAME_WIDTH),
                total=event.seconds_total,
                # What was done before the bar began must not count in its estimate of time.
                initial=event.seconds_done,
                bar_format=_BAR if self._stream.isatty() else _BAR_IN_PIPE,
                file=self._stream,
                dynamic_ncols=True,
            )
        self._bar.update(event.seconds_done - self._bar.n)
        self._bar.refresh()
        if event.fraction == 1:
            self.close()

    def show_stage(self, text: str) -> None:
        """Print a line, unless the run is quiet."""
        self.show_note(text)

    def _write_line(self, text: str) -> None:
        if self._bar is None:
            super()._write_line(text)
        else:
            self._bar.write(text, file=self._stream)  # above the bar

    def close(self) -> None:
        """Finish the bar, leaving it as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonReporter(Reporter):
    """Prints every event as one line of JSON, even if quiet."""

    def show_event(self, track: str, event: Event) -> None:
        """Print an event and its track."""
        values = event_to_json(event)
        self._write_json({"event": values.pop("event"), "track": track, **values})

    def show_result(self, result: TrackResult) -> None:
        """Print the row of the summary."""
        name = "TrackFailed" if result.is_failure else "InferenceOutput"
        self._write_json({"event": name, **result.row()})

    def show_note(self, text: str) -> None:
        """Print a message that belongs to no track."""
        self._write_json({"event": "Message", "message": text})

    def _write_json(self, values: dict[str, Any]) -> None:
        self._write_line(json.dumps(values, ensure_ascii=False))


class AnnouncingReporter(Reporter):
    """Prints upstream's lines on standard output, for programs that parse them, and reports."""

    def __init__(self, reporter: Reporter, folder: Path) -> None:
        self._reporter = reporter
        self._tracks: set[str] = set()
        self._print(f"Separated tracks will be stored in {folder.resolve()}")

    def show_event(self, track: str, event: Event) -> None:
        """Print the line of a track that begins, and report progress."""
        self._announce(track)
        self._reporter.show_event(track, event)

    def show_stage(self, text: str) -> None:
        """Report a step before the first bar."""
        self._reporter.show_stage(text)

    def show_result(self, result: TrackResult) -> None:
        """Print the line of a track without progress, and report its end."""
        self._announce(result.track)
        self._reporter.show_result(result)

    def show_note(self, text: str) -> None:
        """Report a message that belongs to no track."""
        self._reporter.show_note(text)

    def _announce(self, track: str) -> None:
        if track not in self._tracks:
            self._tracks.add(track)
            self._print(f"Separating track {track}")

    def _print(self, line: str) -> None:
        # A closed output is None; the surrogates of a name that is not UTF-8 become escapes.
        if sys.stdout is not None:
            encoding = sys.stdout.encoding or "utf-8"
            line = line.encode(encoding, errors="backslashreplace").decode(encoding)
            print(line, flush=True)


def _name_once(track: str, message: str) -> str:
    """Return the message, preceded by the name of the track unless it has it already."""
    is_named = message.startswith((f"{track} ", f"cannot read {track}:"))
    return message if is_named else f"{track}: {message}"


def _summarize(result: TrackResult, is_piped: bool) -> str:
    folders = {path.parent for path in result.stems.values()}
    location = f" in {next(iter(folders))}" if len(folders) == 1 else ""
    if is_piped:
        location = " to standard output"
    gain = "" if result.gain == 1 else f", turned down to {result.gain:.3f}"
    return f"{', '.join(result.stems)}{location} ({result.seconds:.1f} s{gain})"


def _fit(name: str, width: int) -> str:
    """Return `name` in exactly `width` columns, without its middle if it is too long."""
    if len(name) > width:
        head = (width - 1) // 2
        name = f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"
    return name.ljust(width)
