"""Send spans by OTLP, of whole requests only: the one file that loads OpenTelemetry's SDK."""

import logging
import os
import socket
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from flux_ray.config import tracing_ratio

MISSING = (
    "flux_ray.tracing:otlp needs OpenTelemetry's exporter: pip install 'flux-ray[tracing]' on every"
    " node, or start Ray without RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
)


class RequestSampler(Sampler):
    """Sample whole requests: a share of the spans named in `roots`, and all that is below them.

    Serve's own sampler decides again wherever a request enters a process without a sampled parent:
    it would trace probes, and fragments of requests.
    """

    def __init__(self, roots: Sequence[str], ratio: float) -> None:
        self._roots = frozenset(roots)
        self._share = TraceIdRatioBased(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide as the parent did; without one, drop all but the share of roots."""
        parent = trace.get_current_span(parent_context).get_span_context()
        if parent.is_valid:
            is_sampled = parent.trace_flags.sampled
        elif name in self._roots:
            return self._share.should_sample(None, trace_id, name, kind, attributes, links)
        else:
            is_sampled = False
        if not is_sampled:
            return SamplingResult(Decision.DROP)
        return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, parent.trace_state)

    def get_description(self) -> str:
        """Name this sampler and its share."""
        return f"RequestSampler({self._share.get_description()})"


def processors(roots: Sequence[str]) -> list[SpanProcessor]:
    """Make this process's tracer provider, and return what Serve is to add to it.

    Serve makes a provider too, after this, but the first one stays.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ImportError(MISSING) from error
    # It warns of Serve's provider in each process.
    logging.getLogger("opentelemetry.trace").addFilter(is_no_second_provider)
    trace.set_tracer_provider(
        TracerProvider(sampler=RequestSampler(roots, tracing_ratio()), resource=resource())
    )
    return [BatchSpanProcessor(OTLPSpanExporter())]


def resource() -> Resource:
    """Return what names this process; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override."""
    ours = {"service.name": "flux-ray", "host.name": socket.gethostname()}
    return Resource({**ours, "process.pid": os.getpid()}).merge(OTELResourceDetector().detect())


def is_no_second_provider(record: logging.LogRecord) -> bool:
    """Return whether a log record is about anything else than a second provider."""
    return not record.getMessage().startswith("Overriding of current TracerProvider")
