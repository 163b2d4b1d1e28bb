"""What a run says while it works: a bar for people, lines of JSON for programs, or results alone.

All of it goes to the error stream; standard output is for what was asked for.
"""

import json
import sys
from typing import Any, TextIO

import tqdm

from demucs_infer.batch.result import TrackResult
from demucs_infer.events import (
    BatchSizeReduced,
    ChunkProcessed,
    Event,
    WarningEvent,
    event_to_json,
)

_BAR = "{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
_NAME_WIDTH = 24


def choose_report(
    progress: str, *, quiet: bool, is_piped: bool = False, stream: TextIO | None = None
) -> "Reporter":
    """What `--progress` asks for; `auto` is a bar at a terminal, and results alone elsewhere."""
    stream = stream or sys.stderr
    if progress == "json":
        return JsonReporter(stream)
    if progress == "bar" or (progress == "auto" and stream.isatty() and not quiet):
        return BarReporter(stream, quiet=quiet, is_piped=is_piped)
    return Reporter(stream, quiet=quiet or progress == "none", is_piped=is_piped)


class Reporter:
    """One line for every track that is over; when quiet, for those that failed."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, is_piped: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._is_piped = is_piped

    def event(self, track: str, event: Event) -> None:
        """Something happened to `track`."""
        if isinstance(event, WarningEvent):
            self.note(f"warning: {track}: {event.message}")
        elif isinstance(event, BatchSizeReduced):
            self.note(f"warning: {track}: out of memory, {event.new} windows at a time from here")

    def result(self, result: TrackResult) -> None:
        """A track is over."""
        for warning in result.warnings:
            if result.status != "skipped":  # then it was said when the track was done
                self.note(f"warning: {result.track}: {warning}")
        if not result.ok:
            self.say(f"error: {result.track}: {result.error}")
        elif result.status == "skipped":
            self.note(f"{result.track}: done before, skipped")
        else:
            self.note(f"{result.track}: {_summary(result, self._is_piped)}")

    def note(self, text: str) -> None:
        """A line that a quiet run does without."""
        if not self._quiet:
            self.say(text)

    def say(self, text: str) -> None:
        """A line."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing more will come."""


class BarReporter(Reporter):
    """The same, and a bar for the track at work."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, is_piped: bool = False) -> None:
        super().__init__(stream, quiet=quiet, is_piped=is_piped)
        self._bar: tqdm.tqdm[Any] | None = None
        self._track = ""

    def event(self, track: str, event: Event) -> None:
        """Move the bar of `track`."""
        super().event(track, event)
        if not isinstance(event, ChunkProcessed):
            return
        if self._bar is None or self._track != track:
            self._start(track, event)
        assert self._bar is not None
        self._bar.update(event.seconds_done - self._bar.n)
        self._bar.refresh()
        if event.fraction == 1:
            self.close()

    def _start(self, track: str, event: ChunkProcessed) -> None:
        self.close()
        self._track = track
        self._bar = tqdm.tqdm(  # looked up here: programs put a class of their own in its place
            desc=fit(track, _NAME_WIDTH),
            total=event.seconds_total,
            # The clock starts here: whatever is done already took none of its time.
            initial=event.seconds_done,
            bar_format=_BAR,
            file=self._stream,
            dynamic_ncols=True,
        )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            super().say(text)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonReporter(Reporter):
    """One JSON object a line for everything that happens, whatever happens."""

    def event(self, track: str, event: Event) -> None:
        """Write the event, and the track it belongs to."""
        values = event_to_json(event)
        self._line({"event": values.pop("event"), "track": track, **values})

    def result(self, result: TrackResult) -> None:
        """The row of the summary."""
        name = "InferenceOutput" if result.ok else "TrackFailed"
        self._line({"event": name, **result.row()})

    def note(self, text: str) -> None:
        """A message that belongs to no track."""
        self._line({"event": "Message", "message": text})

    def _line(self, values: dict[str, Any]) -> None:
        self.say(json.dumps(values, ensure_ascii=False))


def _summary(result: TrackResult, is_piped: bool) -> str:
    folders = {path.parent for path in result.stems.values()}
    where = f" in {next(iter(folders))}" if len(folders) == 1 else ""
    if is_piped:
        where = " to standard output"
    gain = "" if result.gain == 1 else f", turned down to {result.gain:.3f}"
    return f"{', '.join(result.stems)}{where} ({result.seconds:.1f} s{gain})"


def fit(name: str, width: int) -> str:
    """`name` in exactly `width` columns, its middle left out if need be."""
    if len(name) > width:
        head = (width - 1) // 2
        name = f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"
    return name.ljust(width)
