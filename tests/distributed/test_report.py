"""The page about a run tells what is done and what failed, in bounded memory."""

from typing import Any

import pytest

from demucs_infer.distributed import report
from demucs_infer.distributed.report import RunReport


def row(status: str, track: str = "a.wav", error: str = "") -> Any:
    return {"track": track, "status": status, "error": error, "duration_seconds": 1800.0}


def test_page_has_counts_failures_and_hours_of_music(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunReport()
    start = run._start
    for number, status in enumerate(("done", "done", "skipped")):
        monkeypatch.setattr(report, "monotonic", lambda now=start + 10 * (number + 1): now)
        run.add(row(status))
    run.add(row("failed", "b & c.wav", "not <audio>"))
    page = run.to_html("3 tracks & more")
    assert "<td>done</td><td class=number>2</td>" in page and "3 tracks &amp; more" in page
    assert page.count('<div class="table" tabindex="0">') == 2, "wide tables scroll by themselves"
    assert "<td>b &amp; c.wav</td><td>failed</td><td>not &lt;audio&gt;</td>" in page
    # The curve ends at one hour of music, half a minute after the start.
    assert ">1</text>" in page and ">30 s</text>" in page


def test_long_run_needs_no_more_memory_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunReport()
    start = run._start
    for number in range(5000):
        monkeypatch.setattr(report, "monotonic", lambda now=start + number: now)
        run.add(row("failed" if number % 2 else "done", error="x"))
    assert len(run.points) <= 500 and len(run.failures) == 1000
    assert run.counts == {"done": 2500, "failed": 2500}
    seconds = [place for place, _ in run.points]
    assert seconds == sorted(seconds) and seconds[-1] > 4900
