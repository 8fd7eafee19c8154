"""Spans of a request: what hangs below what, when it began and ended, and what it says."""

import time

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from flux_ray.tracing import REQUEST, StageSpans, request_span, span, traceparent
from tests.spans import by_name

CLIENTS = f"00-{7:032x}-{8:016x}-01"


def times_of(span: ReadableSpan, zero_ns: int) -> tuple[float, float]:
    assert span.start_time is not None and span.end_time is not None
    return (span.start_time - zero_ns) / 1e9, (span.end_time - zero_ns) / 1e9


def test_a_request_hangs_below_its_clients_span(spans: InMemorySpanExporter) -> None:
    about = {"http.request.method": "POST", "url.path": "/v1/images/generations"}
    with request_span({"traceparent": CLIENTS}, about) as (made, passed_on):
        made.set_attribute("http.response.status_code", 200)
    (request,) = spans.get_finished_spans()
    assert request.context is not None and request.parent is not None
    assert (request.context.trace_id, request.parent.span_id) == (7, 8)
    assert request.attributes == {**about, "http.response.status_code": 200}
    assert passed_on["traceparent"] == f"00-{7:032x}-{request.context.span_id:016x}-01"


@pytest.mark.parametrize("sent", ["", "nonsense", "00-0-0-01", CLIENTS.replace("00-", "ff-", 1)])
def test_a_header_that_cannot_be_read_begins_a_new_trace(
    spans: InMemorySpanExporter, sent: str
) -> None:
    with request_span({"traceparent": sent}, {}):
        pass
    (request,) = spans.get_finished_spans()
    assert request.name == REQUEST and request.parent is None


def test_an_error_is_named_without_its_words(spans: InMemorySpanExporter) -> None:
    with request_span({}, {}), pytest.raises(ValueError), span("generate"):
        raise ValueError("a secret prompt")
    made = by_name(spans)["generate"]
    assert made.status.status_code is StatusCode.ERROR
    assert made.status.description == "ValueError"
    assert "secret" not in made.to_json()


def test_a_job_hangs_below_the_request_that_submitted_it(spans: InMemorySpanExporter) -> None:
    with request_span({}, {}):
        kept = traceparent()
    # Later, and perhaps in another gateway.
    with span("generate", {"flux.tier": "tiny"}, kept):
        pass
    made = by_name(spans)
    parent, submitted = made["generate"].parent, made[REQUEST].context
    assert parent is not None and submitted is not None
    assert (parent.trace_id, parent.span_id) == (submitted.trace_id, submitted.span_id)


def test_without_a_trace_there_is_nothing_to_keep(spans: InMemorySpanExporter) -> None:
    assert traceparent() == ""
    with span("generate"):
        assert traceparent() == ""
    stages = StageSpans(time.perf_counter())
    stages.wait("replica queue", time.perf_counter())
    stages.answer([("encode", 0.1)], time.perf_counter())
    stages.close()
    assert spans.get_finished_spans() == ()


def test_stages_follow_each_other_and_steps_are_one_span(spans: InMemorySpanExporter) -> None:
    began = time.perf_counter()
    zero_ns = time.time_ns()
    with request_span({}, {}) as (request, _):
        stages = StageSpans(began)
        stages.wait("replica queue", began + 1)
        # The second call was answered sooner than its seconds after the first one: ranks had both.
        stages.answer([("encode", 0.5), ("prepare", 0.1), ("denoise", 0.2)], began + 1.9)
        stages.answer([("denoise", 0.3), ("denoise", 0.3), ("decode", 0.4)], began + 2.8)
        stages.close()
        stages.add("file", began + 2.6, began + 3.1)
    made = by_name(spans)
    expected = {
        "replica queue": (0, 1),
        "encode": (1.1, 1.6),
        "prepare": (1.6, 1.7),
        "denoise": (1.7, 2.5),
        "decode": (2.5, 2.9),
        "file": (2.6, 3.1),
    }
    assert list(made) == [*expected, REQUEST]
    for name, times in expected.items():
        assert times_of(made[name], zero_ns) == pytest.approx(times, abs=0.05), name
        assert made[name].parent == request.get_span_context(), name
    assert made["denoise"].attributes == {
        "flux.num_runs": 3,
        "flux.rank_s": pytest.approx(0.8),
    }


def test_a_preview_divides_the_steps(spans: InMemorySpanExporter) -> None:
    began = time.perf_counter()
    with request_span({}, {}):
        stages = StageSpans(began)
        stages.answer([("denoise", 0.1), ("preview", 0.1), ("denoise", 0.1)], began + 0.3)
        stages.close()
    names = [each.name for each in spans.get_finished_spans()]
    assert names == ["denoise", "preview", "denoise", REQUEST]
