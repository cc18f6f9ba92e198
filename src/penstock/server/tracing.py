"""Traces for OpenTelemetry: a span for every request, with one for each phase of its generations.

Needs the extra `otel`; nothing of it is imported unless --otlp-endpoint is given.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from penstock import __version__
from penstock.errors import EnvironmentFault, UsageError
from penstock.server.journal import Entry, phases

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

EXPORT_SECONDS = 5  # for one attempt to send spans, and for the last of them at the end
_PARENT = ("traceparent", "tracestate")
_SPANS = {"validation_time": "validate", "queue_time": "queued", "prefill_time": "prefill", "decode_time": "decode"}


class Tracer:
    """Sends spans to a collector, in the background."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("penstock", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, entry: Entry) -> None:
        """Make the spans of a finished request. The header `traceparent` names the span that it belongs to."""
        from opentelemetry import trace

        exchange = entry.exchange
        # Moments are on the monotonic clock; spans want the time of day.
        offset = time.time() - time.monotonic()
        carrier = {name: exchange.header(name.encode()) for name in _PARENT}
        parent = self._propagator.extract({k: v.decode("latin-1") for k, v in carrier.items() if v is not None})
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.path}"[:200],
            parent,
            trace.SpanKind.SERVER,
            _attributes(entry),
            start_time=_nanoseconds(entry.began + offset),
        )
        if exchange.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        for run in entry.runs:
            moment = run.timings.arrived
            for name, seconds in phases(run).items():
                child = self._tracer.start_span(_SPANS[name], inside, start_time=_nanoseconds(moment + offset))
                moment += seconds
                child.end(_nanoseconds(moment + offset))
        span.end(_nanoseconds(entry.ended + offset))

    def close(self) -> None:
        """Send what is left."""
        self._provider.force_flush(EXPORT_SECONDS * 1000)
        self._provider.shutdown()


def make_tracer(endpoint: str, service: str) -> Tracer:
    """A tracer that sends to an OTLP collector over HTTP. Raises EnvironmentFault without the extra, UsageError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(
            f"--otlp-endpoint {endpoint!r} is not an HTTP address.", "", "For example: http://localhost:4318"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise EnvironmentFault(
            "--otlp-endpoint needs OpenTelemetry, which is not installed.",
            f"{error.name} is missing.",
            "pip install 'penstock[otel]'",
        ) from None
    address = endpoint if parts.path not in ("", "/") else f"{endpoint.rstrip('/')}/v1/traces"
    provider = TracerProvider(resource=Resource.create({"service.name": service, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(address, timeout=EXPORT_SECONDS)))
    return Tracer(provider)


def _attributes(entry: Entry) -> dict[str, Any]:
    fields = entry.fields()
    exchange = entry.exchange
    known = {
        "http.request.method": exchange.method,
        "url.path": fields["path"],
        "http.response.status_code": exchange.status,
        "penstock.request_id": fields["request_id"],
    }
    if entry.prompt_tokens:
        known["gen_ai.usage.input_tokens"] = entry.prompt_tokens
        known["gen_ai.usage.output_tokens"] = fields["generated_tokens"]
    return known


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
