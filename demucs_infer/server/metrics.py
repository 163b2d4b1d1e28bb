"""Prometheus metrics of this server instance, apart from those of the process."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from demucs_infer.server.queue import JobQueue

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)


class Metrics:
    """Counts requests; reads the state of the queue when scraped."""

    def __init__(self, jobs: "JobQueue") -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter(
            "demucs_http_requests", "Requests.", labels, registry=self._registry
        )
        self._seconds = Histogram(
            "demucs_http_request_seconds",
            "Duration of requests.",
            ("route",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_QueueCollector(jobs))

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        # Clients can invent methods without end, and each new label takes memory for ever.
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _QueueCollector:
    def __init__(self, jobs: "JobQueue") -> None:
        self._jobs = jobs

    def collect(self) -> "Iterator[Metric]":
        """Yield the current state of the queue."""
        jobs = self._jobs
        waiting, running = jobs.depth
        yield GaugeMetricFamily("demucs_jobs_waiting", "Jobs in the queue.", value=waiting)
        yield GaugeMetricFamily("demucs_jobs_running", "Jobs being processed.", value=running)
        yield GaugeMetricFamily(
            "demucs_ready", "Whether requests are accepted.", value=jobs.is_ready
        )
        finished = CounterMetricFamily("demucs_jobs", "Finished jobs.", labels=["status"])
        for status in ("done", "failed", "cancelled"):
            finished.add_metric([status], jobs.counts[status])
        yield finished
        yield CounterMetricFamily(
            "demucs_jobs_cached", "Jobs answered from the cache.", jobs.counts["cached"]
        )
        yield CounterMetricFamily("demucs_models_loaded", "Models loaded.", jobs.counts["loaded"])
        yield CounterMetricFamily(
            "demucs_audio_seconds", "Seconds of audio separated.", jobs.audio_seconds
        )
