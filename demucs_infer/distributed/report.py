"""Write an HTML page about a run: counts, failures with their reasons, and speed over time."""

import html
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic

from demucs_infer.distributed.manifest import ResultRow
from demucs_infer.pictures import draw_line, make_page, make_table

_MAX_POINTS = 500  # of the curve
_MAX_FAILURES = 1000  # that the page lists


@dataclass(slots=True)
class RunReport:
    """Collects the data for the page, in memory that does not grow with the number of tracks."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and hours of music that were done by then."""

    _start: float = field(default_factory=monotonic)
    _hours: float = 0.0
    _interval: float = 0.0

    def add(self, row: ResultRow) -> None:
        """Count a track that ended."""
        status = str(row["status"])
        self.counts[status] += 1
        if status in ("failed", "quarantined") and len(self.failures) < _MAX_FAILURES:
            self.failures.append((str(row["track"]), status, str(row["error"])))
        if status == "done":
            self._hours += float(row["duration_seconds"]) / 3600
        seconds = monotonic() - self._start
        if not self.points or seconds - self.points[-1][0] >= self._interval:
            self.points.append((seconds, self._hours))
        if len(self.points) > _MAX_POINTS:
            self.points = self.points[::2]
            self._interval = 2 * seconds / _MAX_POINTS

    def to_html(self, summary: str) -> str:
        """Return the page."""
        end = (monotonic() - self._start, self._hours)
        parts = [
            f"<p>{html.escape(summary)}</p>",
            make_table(["status", "tracks"], self.counts.items()),
            draw_line([(0.0, 0.0), *self.points, end], "hours of music done, over seconds"),
        ]
        if self.failures:
            parts += ["<h2>Failures</h2>", make_table(["track", "status", "error"], self.failures)]
        return make_page("Run", parts)
