"""Test the progress bar: remaining time is estimated from the work of this run only."""

import io

from demucs_infer.cli.progress import BarReporter
from demucs_infer.events import ChunkProcessed


def test_resumed_bar_does_not_estimate_from_earlier_work() -> None:
    stream = io.StringIO()
    reporter = BarReporter(stream)
    reporter.show_event("song", ChunkProcessed(81, 100, fraction=0.81, seconds_total=200.0))
    assert "81%" in stream.getvalue() and "162/200 [" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("<?]")  # nothing has been timed yet
    reporter.close()
