"""The bar of the command line: what is left is told from the work of this run alone."""

import io

from demucs_infer.cli.progress import BarReporter
from demucs_infer.events import ChunkProcessed


def test_a_bar_that_resumes_counts_no_work_that_it_did_not_time() -> None:
    stream = io.StringIO()
    report = BarReporter(stream)
    report.event("song", ChunkProcessed(81, 100, fraction=0.81, seconds_total=200.0))
    assert "81%" in stream.getvalue() and "162/200 s" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("<?]")  # nothing has been timed yet
    report.close()
