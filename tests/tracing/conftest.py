"""Spans that are kept in memory, as those of a request that is traced."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flux_ray import tracing
from flux_ray.tracing.export import RequestSampler


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Return what our spans are written to; no global provider is set, which would stay."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=RequestSampler(tracing.ROOTS, 1.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "TRACER", provider.get_tracer("flux_ray"))
    yield exporter
