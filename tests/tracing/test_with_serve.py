"""What arrives at a collector when Serve's tracing code and ours work together."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from tests.otlp_receiver import ReceivedSpan, receiver

ROOT = Path(__file__).parents[2]
WHOLE = [
    "request",
    "proxy_http_request",
    "route_to_replica gateway",
    "replica_handle_request gateway",
    "generate",
    "route_to_replica tiny",
    "replica_handle_request tiny",
    "decode",
    "denoise",
    "encode",
]
PROBES = ["/readyz", "/health", "/-/healthz"]


def traces_of(paths: list[str], ratio: float) -> list[list[ReceivedSpan]]:
    """Send requests for these paths; return the spans that arrive, by trace."""
    with receiver() as collector:
        env = {"RAY_SERVE_TRACING_SAMPLING_RATIO": str(ratio), "PYTHONPATH": str(ROOT)}
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
        done = subprocess.run(
            [sys.executable, "-m", "tests.tracing.through_serve", *paths],
            cwd=ROOT,
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found = defaultdict(list)
        for each in collector.spans:
            found[each.trace].append(each)
    return list(found.values())


def path_to(spans: list[ReceivedSpan], name: str) -> list[str]:
    """Return the names from the root of a trace down to a span of that name."""
    by_id = {each.span: each for each in spans}
    path, span = [], next(each for each in spans if each.name == name)
    while True:
        path.insert(0, span.name)
        if not span.parent:
            return path
        span = by_id[span.parent]


def test_a_request_is_one_trace_and_probes_are_none() -> None:
    (trace,) = traces_of([*PROBES, "/v1/images/generations", *PROBES], 1.0)
    assert sorted(each.name for each in trace) == sorted(WHOLE)
    for stage in ("encode", "denoise", "decode"):
        assert path_to(trace, stage) == [*WHOLE[:7], stage]


def test_a_share_of_the_requests_is_traced_whole_and_the_rest_not_at_all() -> None:
    """Serve's own sampler decides in each process again, and leaves fragments."""
    traces = traces_of(60 * ["/v1/models"], 0.5)
    assert 10 < len(traces) < 50
    for trace in traces:
        assert sorted(each.name for each in trace) == sorted(WHOLE)
