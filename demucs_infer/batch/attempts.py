"""Count the processes that ended in the middle of a track, and tell why they ended.

An attempt to separate a track is recorded before it begins, because a process that crashes cannot
do so afterwards. A process that is told to end, by Ctrl-C or a scheduler, withdraws all attempts
that have not ended. One that ends by a fault of its own, such as an invalid memory access in a
decoder, leaves a trace in the fault log of the attempt; one that is killed from outside does not.
"""

import faulthandler
import json
import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

_open_attempts: dict[Hashable, Callable[[], None]] = {}
_shutting_down = threading.Event()

_MANY_KILLS = 2  # after which they may be the fault of the track, and are reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run to which an attempt belongs, which decides what counts against a track.

    Without an id, everything counts. With an id, a process that ended without a trace counts only
    in the run with that id, whose other processes go on: a track whose machine is taken away in
    every run must not be given up.
    """

    id: str = ""
    ignores_earlier_crashes: bool = False
    """Whether crashes in runs with another id do not count either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """How often processes ended in the middle of a track, at the same position of it."""

    faults: int = 0
    """Ends by a fault of the process itself, in any run."""

    kills: int = 0
    """Ends without a trace, in any run."""

    kills_in_run: int = 0
    """Ends without a trace, in the run with this `run_id`."""

    frames: int = 0
    """The position: samples that were separated before."""

    run_id: str = ""
    is_open: bool = False
    """Whether an attempt has begun that has not ended."""

    @classmethod
    def from_text(cls, text: str) -> "AttemptRecord":
        """Parse a record; one that is damaged is as good as none."""
        try:
            record = cls(**json.loads(text))
            types = {name: type(value) for name, value in asdict(cls()).items()}
            is_valid = all(type(value) is types[name] for name, value in asdict(record).items())
        except (ValueError, TypeError, RecursionError):
            is_valid = False
        return record if is_valid else cls()

    def to_text(self) -> str:
        """Return the record as a line of JSON."""
        return json.dumps(asdict(self))

    def close(self, fault_log: Path) -> "AttemptRecord":
        """Count the open attempt, whose process has ended, as a fault or as a kill."""
        if not self.is_open:
            return self
        if _has_content(fault_log):
            return replace(self, is_open=False, faults=self.faults + 1)
        kills, in_run = self.kills + 1, self.kills_in_run + 1
        return replace(self, is_open=False, kills=kills, kills_in_run=in_run)

    def enter(self, run: Run, frames: int) -> "AttemptRecord":
        """Return what is left of this record in another run, or at a later position."""
        if frames > self.frames:
            return AttemptRecord(frames=frames, run_id=run.id)
        if not run.id or run.id == self.run_id:
            return replace(self, run_id=run.id)
        if run.ignores_earlier_crashes:
            return AttemptRecord(frames=frames, run_id=run.id)
        return replace(self, kills_in_run=0, run_id=run.id)

    @property
    def crashes(self) -> int:
        """The number of crashes that count against the track."""
        return self.faults + (self.kills_in_run if self.run_id else self.kills)

    def warn_of_kills(self, track: str) -> None:
        """Log a warning if the process was killed more than once, which may be for the track."""
        if self.kills >= _MANY_KILLS:
            logger.warning(
                "%s: its process was killed %d times at the same position; if memory ran out, "
                "separate it on a larger machine",
                track,
                self.kills,
            )


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


class _FaultWatch:
    """Lets the interpreter write a trace to the fault log of the newest attempt if it crashes.

    Python's `faulthandler` writes to one file. So tracks that are in progress at the same time are
    tried one by one after a crash.
    """

    def __init__(self) -> None:
        self._files: dict[Hashable, BinaryIO] = {}
        self._was_enabled = False
        self._guard = threading.Lock()

    def begin(self, key: Hashable, log: Path) -> None:
        """Write to an empty log from now on."""
        with self._guard, suppress(OSError):  # then a crash looks like a kill
            file = log.open("wb")
            if not self._files:
                self._was_enabled = faulthandler.is_enabled()
            self._files[key] = file
            faulthandler.enable(file, all_threads=False)

    def end(self, key: Hashable) -> None:
        """Write to the log of another open attempt, or to none."""
        with self._guard:
            file = self._files.pop(key, None)
            if file is None:
                return
            if self._files:
                faulthandler.enable(list(self._files.values())[-1], all_threads=False)
            else:
                faulthandler.disable()
                if self._was_enabled:
                    with suppress(OSError, ValueError, RuntimeError):  # no standard error
                        faulthandler.enable(2)
            file.close()


_fault_watch = _FaultWatch()


def register(key: Hashable, undo: Callable[[], None], fault_log: Path | None = None) -> None:
    """Register an attempt that was recorded; `undo` is the function that undoes this.

    With a `fault_log`, a crash of the process leaves a trace there.
    """
    _open_attempts[key] = undo
    if fault_log:
        _fault_watch.begin(key, fault_log)
    if _shutting_down.is_set():  # begun by a thread that is still running
        withdraw(key)


def complete(key: Hashable) -> None:
    """Forget an attempt that has ended, whether it succeeded or failed."""
    _open_attempts.pop(key, None)
    _fault_watch.end(key)


def withdraw(key: Hashable) -> None:
    """Undo the count of an attempt, if it has not ended."""
    undo = _open_attempts.pop(key, None)
    _fault_watch.end(key)
    if undo:
        with suppress(Exception):  # if this fails, the attempt remains counted
            undo()


def withdraw_all() -> None:
    """Undo the count of all attempts, also of those that begin while the process is ending."""
    _shutting_down.set()
    for key in tuple(_open_attempts):
        withdraw(key)
