"""Prometheus metrics of this server instance, apart from those of the process."""

import math
from typing import TYPE_CHECKING

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client.core import Metric

    from demucs_infer.server.queue import JobQueue

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_WAIT_BUCKETS = (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 1800)
_DURATION_BUCKETS = (10, 30, 60, 120, 180, 240, 300, 600, 1800, 3600, 7200)
_FACTOR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
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
        self._wait = Histogram(
            "demucs_queue_wait_seconds",
            "Time from the upload or the download of a track to its start.",
            buckets=_WAIT_BUCKETS,
            registry=self._registry,
        )
        self._duration = Histogram(
            "demucs_track_duration_seconds",
            "Duration of separated tracks.",
            buckets=_DURATION_BUCKETS,
            registry=self._registry,
        )
        self._real_time_factor = Histogram(
            "demucs_real_time_factor",
            "Processing time of a track divided by its duration.",
            buckets=_FACTOR_BUCKETS,
            registry=self._registry,
        )
        self._batch = Histogram(
            "demucs_batch_windows",
            "Windows of a batch; on a GPU, of one or more tracks.",
            buckets=_BATCH_BUCKETS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(_QueueCollector(jobs))
        jobs.on_wait = self._wait.observe
        jobs.on_batch = self._batch.observe
        jobs.on_separated = self._observe_track

    def _observe_track(self, duration: float, seconds: float) -> None:
        self._duration.observe(duration)
        if duration > 0:
            self._real_time_factor.observe(seconds / duration)

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
        yield GaugeMetricFamily(
            "demucs_jobs_downloading", "Jobs being downloaded.", value=jobs.num_downloads
        )
        yield GaugeMetricFamily("demucs_jobs_running", "Jobs being processed.", value=running)
        yield GaugeMetricFamily(
            "demucs_ready", "Whether requests are accepted.", value=jobs.is_ready
        )
        yield GaugeMetricFamily(
            "demucs_workers_dead",
            "Workers that ended by themselves; the process has to be restarted.",
            value=jobs.dead_workers,
        )
        counts = jobs.webhooks.counts
        webhooks = CounterMetricFamily(
            "demucs_webhooks", "Messages about finished jobs.", labels=["status"]
        )
        for status in ("delivered", "failed"):
            webhooks.add_metric([status], counts[status])
        yield webhooks
        yield CounterMetricFamily(
            "demucs_webhook_retries",
            "Further attempts to deliver a message.",
            counts["retried"],
        )
        yield CounterMetricFamily(
            "demucs_cache_evictions", "Results deleted for age or space.", jobs.counts["evicted"]
        )
        disk = jobs.disk
        yield GaugeMetricFamily(
            "demucs_disk_used_bytes",
            "Size of uploads, results and the files of running jobs.",
            disk.used_bytes,
        )
        yield GaugeMetricFamily(
            "demucs_disk_promised_bytes",
            "What accepted uploads, downloads and jobs may still write.",
            disk.promised_bytes,
        )
        yield GaugeMetricFamily(
            "demucs_disk_limit_bytes",
            "Limit of used and promised bytes together.",
            disk.max_bytes or math.inf,
        )
        yield GaugeMetricFamily(
            "demucs_disk_free_bytes", "Free space on the disk of the data.", disk.free_bytes
        )
        yield from _collect_device_memory(jobs.settings.devices)
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


def _collect_device_memory(devices: "Iterable[str]") -> "Iterator[Metric]":
    """Yield the memory of each GPU in use; nothing without one."""
    if not torch.cuda.is_available():
        return
    memory = GaugeMetricFamily(
        "demucs_device_memory_bytes", "Memory of a GPU held by this process.", labels=["device"]
    )
    for name in devices:
        if name.startswith("cuda") or name == "auto":
            device = "cuda" if name == "auto" else name
            memory.add_metric([device], torch.cuda.memory_reserved(device))
    yield memory
