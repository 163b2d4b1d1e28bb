"""Record OpenTelemetry traces: a span for each request, and for each step of its job.

OpenTelemetry is imported by `open_tracing` alone, and only if `traces` is set.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from demucs_infer import __version__
from demucs_infer.errors import ConfigError

_NANOSECONDS = 1_000_000_000


class Tracing:
    """Records spans with a provider of the OpenTelemetry SDK; without one, nothing."""

    def __init__(self, provider: Any = None) -> None:
        """Use a provider, which knows where spans are sent."""
        self._provider = provider
        if provider is None:
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = provider.get_tracer("demucs_infer", __version__)

    @contextmanager
    def trace_request(self, scope: Scope) -> Iterator[Callable[[str, int], None]]:
        """Make the span of a request, a child of that in `traceparent`, the current one.

        Yields a function that takes the route and the status of the response.
        """
        if self._provider is None:
            yield lambda _, __: None
            return
        method = scope["method"]
        parent = self._propagator.extract(dict(Headers(scope=scope)))
        kind, status_code = self._trace.SpanKind.SERVER, self._trace.StatusCode
        with self._tracer.start_as_current_span(method, parent, kind) as span:

            def end(route: str, status: int) -> None:
                span.update_name(f"{method} {route}")
                span.set_attributes(
                    {
                        "http.request.method": method,
                        "http.route": route,
                        "http.response.status_code": status,
                    }
                )
                if status >= 500:
                    span.set_status(status_code.ERROR)

            yield end

    def get_parent(self) -> str:
        """Return the `traceparent` of the current span; empty without one."""
        if self._provider is None:
            return ""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier.get("traceparent", "")

    def begin(
        self, name: str, parent: str, attributes: dict[str, Any], start: float | None = None
    ) -> Callable[[str], None]:
        """Begin a span below `parent`, now or at a time.

        Returns the function that ends it, with an error or "".
        """
        if self._provider is None:
            return lambda _: None
        context = self._propagator.extract({"traceparent": parent})
        start_time = round((start or time.time()) * _NANOSECONDS)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=start_time)

        def end(error: str) -> None:
            if error:
                span.set_status(self._trace.StatusCode.ERROR, error)
            span.end()

        return end

    def close(self) -> None:
        """Send what was recorded."""
        if self._provider is not None:
            self._provider.shutdown()


def open_tracing(is_enabled: bool) -> Tracing:
    """Return what records traces; raise `ConfigError` if a package for it is missing."""
    if not is_enabled:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"traces needs {error.name}: pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http"
        ) from error
    # OTEL_SERVICE_NAME, if set, takes precedence.
    provider = TracerProvider(resource=Resource.create({"service.name": "demucs-infer"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
