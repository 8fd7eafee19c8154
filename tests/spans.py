"""Our spans, kept in memory instead of sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flux_ray import tracing
from flux_ray.tracing.export import RequestSampler


@contextmanager
def kept_spans() -> Iterator[InMemorySpanExporter]:
    """Yield what our spans are written to; no global provider is set, which would stay."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=RequestSampler(tracing.ROOTS, 1.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with patch.object(tracing, "TRACER", provider.get_tracer("flux_ray")):
        yield exporter


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Return the spans that have ended; of one name the last."""
    return {each.name: each for each in spans.get_finished_spans()}
