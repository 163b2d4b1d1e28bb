"""What /metrics tells: counters of a server's own, never those of the process at large."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from demucs_infer.server.queue import JobQueue

_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)


class Metrics:
    """Counts requests; asks the queue for the rest when somebody looks."""

    def __init__(self, jobs: "JobQueue") -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter(
            "demucs_http_requests", "Requests.", labels, registry=self._registry
        )
        self._seconds = Histogram(
            "demucs_http_request_seconds",
            "How long requests take.",
            ("route",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_Queue(jobs))

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Queue:
    def __init__(self, jobs: "JobQueue") -> None:
        self._jobs = jobs

    def collect(self) -> "Iterator[Metric]":
        """The state of the queue now."""
        jobs = self._jobs
        waiting, running = jobs.depth
        yield GaugeMetricFamily("demucs_jobs_waiting", "Jobs in the queue.", value=waiting)
        yield GaugeMetricFamily("demucs_jobs_running", "Jobs at work.", value=running)
        yield GaugeMetricFamily("demucs_ready", "Whether requests are taken.", value=jobs.is_ready)
        ended = CounterMetricFamily("demucs_jobs", "Jobs that are over.", labels=["status"])
        for status in ("done", "failed", "cancelled"):
            ended.add_metric([status], jobs.counts[status])
        yield ended
        yield CounterMetricFamily(
            "demucs_jobs_cached", "Jobs that were answered from the cache.", jobs.counts["cached"]
        )
        yield CounterMetricFamily(
            "demucs_models_loaded", "Models that were loaded.", jobs.counts["loaded"]
        )
        yield CounterMetricFamily(
            "demucs_audio_seconds", "Seconds of music that were separated.", jobs.seconds_of_audio
        )
