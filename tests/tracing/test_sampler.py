"""Which spans begin a trace, and what Serve's exporter function returns and demands."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flux_ray.config import tracing_ratio
from flux_ray.tracing import ROOTS, UNSAMPLED, otlp
from flux_ray.tracing.export import MISSING, RequestSampler

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished() -> Iterator[InMemorySpanExporter]:
    yield InMemorySpanExporter()


def provider(exporter: InMemorySpanExporter, ratio: float = 1.0) -> TracerProvider:
    made = TracerProvider(sampler=RequestSampler(ROOTS, ratio))
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


def names(exporter: InMemorySpanExporter) -> list[str]:
    return [span.name for span in exporter.get_finished_spans()]


@pytest.mark.parametrize("root", ROOTS)
def test_a_request_is_traced_with_all_below_it(finished: InMemorySpanExporter, root: str) -> None:
    tracer = provider(finished).get_tracer("t")
    with tracer.start_as_current_span(root), tracer.start_as_current_span("route_to_replica"):
        pass
    assert names(finished) == ["route_to_replica", root]


@pytest.mark.parametrize("name", ["replica_handle_request gateway __call__", "route_to_replica"])
def test_a_span_of_serve_without_a_parent_begins_no_trace(
    finished: InMemorySpanExporter, name: str
) -> None:
    """It is a `describe` call, or belongs to a probe or a request that was not sampled."""
    tracer = provider(finished).get_tracer("t")
    with tracer.start_as_current_span(name), tracer.start_as_current_span("generate"):
        pass
    assert names(finished) == []


def test_nothing_is_traced_below_what_is_not_sampled(finished: InMemorySpanExporter) -> None:
    parent = TraceContextTextMapPropagator().extract({"traceparent": UNSAMPLED})
    tracer = provider(finished).get_tracer("t")
    tracer.start_span("request", parent).end()
    assert names(finished) == []


def test_the_client_decides_about_its_own_trace(finished: InMemorySpanExporter) -> None:
    sampled = f"00-{7:032x}-{8:016x}-01"
    parent = TraceContextTextMapPropagator().extract({"traceparent": sampled})
    provider(finished, ratio=0.0).get_tracer("t").start_span("request", parent).end()
    (span,) = finished.get_finished_spans()
    assert span.context is not None and span.context.trace_id == 7
    assert span.parent is not None and span.parent.span_id == 8


def test_a_share_of_the_requests_is_traced(finished: InMemorySpanExporter) -> None:
    tracer = provider(finished, ratio=0.25).get_tracer("t")
    for _ in range(2000):
        tracer.start_span("request").end()
    assert 400 < len(finished.get_finished_spans()) < 600


def test_the_share_is_the_one_that_serve_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_TRACING_SAMPLING_RATIO", raising=False)
    assert tracing_ratio() == 0.01
    monkeypatch.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "0.5")
    assert tracing_ratio() == 0.5


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"flux-ray\[tracing\]") as raised:
        otlp()
    assert str(raised.value) == MISSING


SETUP = """
import logging
from opentelemetry import trace
from ray.serve._private import tracing_utils
logging.basicConfig(level=logging.WARNING)
tracing_utils.RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH = "flux_ray.tracing:otlp"
assert tracing_utils.setup_tracing("gateway", "1")
provider = trace.get_tracer_provider()
print(provider.sampler.get_description(), provider.resource.attributes["service.name"])
from flux_ray.tracing import TRACER
with TRACER.start_as_current_span("request") as span:
    print(span.is_recording(), span.attributes)
"""


def test_serve_accepts_it_and_our_sampler_stays() -> None:
    """In a process of its own: a process has one tracer provider for good."""
    env = {"RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0", "OTEL_SERVICE_NAME": "images"}
    # Nothing listens there; the exporter gives up at the end.
    env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_EXPORT_TIMEOUT": "1"}
    env |= {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SETUP], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["RequestSampler(TraceIdRatioBased{1.0}) images", "True {}"]
    assert "Overriding" not in done.stderr


def test_without_tracing_the_sdk_is_not_loaded() -> None:
    code = "import sys, flux_ray.tracing as t; t.span('x').__enter__(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not [name for name in done.stdout.split() if name.startswith("opentelemetry.sdk")]
