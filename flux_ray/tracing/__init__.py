"""Trace requests with OpenTelemetry: spans around the waits and the work of gateways and replicas.

Serve makes spans of its own in proxies, gateways and replicas once it is told of `otlp`, below.
Ours lie between them: `request_span` in the proxy, `upsample`, `generate` and `ledger wait` in the
gateway, and one for each stage in the replica (`StageSpans`). Nothing here loads more than
OpenTelemetry's API until `otlp` is called; without it all spans are empty and cost microseconds.

Attributes say what a request costs, never what it asks for: no span holds a prompt.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import context, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

Attribute = str | int | float | bool

TRACER = trace.get_tracer("flux_ray")
PROPAGATOR = TraceContextTextMapPropagator()
TRACEPARENT = "traceparent"
# Names a span that is not traced, so that nothing below it is.
UNSAMPLED = f"00-{1:032x}-{1:016x}-00"

REQUEST, GENERATE, LEDGER_WAIT = "request", "generate", "ledger wait"
UPSAMPLE = "upsample"
REPLICA_QUEUE = "replica queue"
# Spans that may begin a trace. The second is Serve's, in proxies that were not told of ours. All
# other spans without a parent belong to probes, to what processes tell each other, or to requests
# that were not sampled: Serve loses the parent of those.
ROOTS = (REQUEST, "proxy_http_request")


def otlp() -> "list[SpanProcessor]":
    """Return what sends spans by OTLP over HTTP; ImportError says which extra is missing.

    Serve calls this in each of its processes, if Ray was started with
    `RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=flux_ray.tracing:otlp`. OpenTelemetry reads the address
    from OTEL_EXPORTER_OTLP_ENDPOINT.
    """
    from flux_ray.tracing.export import processors

    return processors(ROOTS)


def traceparent() -> str:
    """Return the current span as the header that names it; empty if it is not traced."""
    passed_on: dict[str, str] = {}
    if trace.get_current_span().is_recording():
        PROPAGATOR.inject(passed_on)
    return passed_on.get(TRACEPARENT, "")


@contextmanager
def span(
    name: str, attributes: Mapping[str, Attribute] | None = None, parent: str = ""
) -> Iterator[Span]:
    """Time the block as a span below the current one, or below that of a `traceparent`.

    An error in the block is named without its words.
    """
    above = PROPAGATOR.extract({TRACEPARENT: parent}) if parent else None
    with TRACER.start_as_current_span(
        name, above, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as made:
        try:
            yield made
        except BaseException as error:
            made.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


@contextmanager
def request_span(
    headers: Mapping[str, str], attributes: Mapping[str, Attribute]
) -> Iterator[tuple[Span, dict[str, str]]]:
    """Time an HTTP request below the client's `traceparent`, if it sent one.

    Yield the span, and the headers that make Serve's spans its children; they are empty while
    tracing is off.
    """
    theirs = PROPAGATOR.extract(headers)
    with TRACER.start_as_current_span(
        REQUEST,
        context=theirs,
        kind=SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as made:
        passed_on: dict[str, str] = {}
        PROPAGATOR.inject(passed_on)
        yield made, passed_on


class StageSpans:
    """The stages of one request in its replica, as spans below the one that is current now.

    Ranks report only how long stages took, so the leader makes the spans, with explicit times: all
    `*_s` are seconds of `time.perf_counter`. Without a trace to add to, all methods do nothing.
    """

    def __init__(self, begin_s: float) -> None:
        is_traced = trace.get_current_span().is_recording()
        self._context = context.get_current() if is_traced else None
        self._offset_s = time.time() - time.perf_counter()
        self._end_s = begin_s
        # The stage that may go on: its name, when it began, and how often and long it has run.
        self._stage = ""
        self._begin_s = self._spent_s = 0.0
        self._num_runs = 0

    def wait(self, name: str, until_s: float) -> None:
        """Add a span from the end of what was added last."""
        self.close()
        self.add(name, self._end_s, until_s)
        self._end_s = max(self._end_s, until_s)

    def answer(self, stages: Sequence[tuple[str, float]], at_s: float) -> None:
        """Add stages, with the seconds of each, that one call of the ranks answered at `at_s`.

        Stages follow each other on the ranks. Steps without another stage between them are one
        span, which counts them.
        """
        if self._context is None:
            return
        begin_s = max(self._end_s, at_s - sum(seconds for _, seconds in stages))
        for stage, seconds in stages:
            if stage != self._stage:
                self.close()
                self._stage, self._begin_s = stage, begin_s
            self._spent_s += seconds
            self._num_runs += 1
            begin_s = self._end_s = begin_s + seconds

    def close(self) -> None:
        """End the span of the stage that was answered last."""
        if self._stage:
            about = {"flux.num_runs": self._num_runs, "flux.rank_s": self._spent_s}
            self.add(self._stage, self._begin_s, self._end_s, about)
        self._stage, self._spent_s, self._num_runs = "", 0.0, 0

    def add(
        self,
        name: str,
        begin_s: float,
        end_s: float,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> None:
        """Add a span of its own, which may run beside stages, as the making of files does."""
        if self._context is None:
            return
        made = TRACER.start_span(
            name, self._context, attributes=attributes, start_time=self._at_ns(begin_s)
        )
        made.end(self._at_ns(max(begin_s, end_s)))

    def _at_ns(self, at_s: float) -> int:
        return int((self._offset_s + at_s) * 1e9)
