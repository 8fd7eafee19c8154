"""Spans that are kept in memory, as those of a request that is traced."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.spans import kept_spans


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    with kept_spans() as spans:
        yield spans
