"""The proxy's middleware that begins traces: what it passes on to Serve, and for what."""

from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from flux_ray.gateway.proxy import read_with_h11
from flux_ray.gateway.proxy_middleware import MAX_PATH, ProxyAnswers, ProxyTraces
from flux_ray.tracing import REQUEST, UNSAMPLED
from tests.spans import by_name, kept_spans

CLIENTS = f"00-{7:032x}-{8:016x}-01"


async def passed_on(path: str, sent: str | None = None, query: str = "") -> dict[str, str]:
    """Send a request through the middleware; return the headers that arrive behind it."""
    arrived: dict[str, str] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        arrived.update(Headers(scope=scope))
        await PlainTextResponse("there", 404)(scope, receive, send)

    async def nothing(*about: Any) -> Any: ...

    headers = [] if sent is None else [(b"traceparent", sent.encode())]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    await ProxyTraces(app)(scope | {"query_string": query.encode()}, nothing, nothing)
    return arrived


async def test_serves_spans_hang_below_ours_and_ours_below_the_clients() -> None:
    with kept_spans() as spans:
        arrived = await passed_on("/v1/models", CLIENTS)
    request = by_name(spans)[REQUEST]
    assert request.context is not None and request.parent is not None
    assert (request.context.trace_id, request.parent.span_id) == (7, 8)
    assert arrived["traceparent"] == f"00-{7:032x}-{request.context.span_id:016x}-01"
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 404


@pytest.mark.parametrize("path", ["/readyz", "/health", "/-/healthz", "/-/routes"])
@pytest.mark.parametrize("sent", [None, CLIENTS])
async def test_probes_are_in_no_trace(path: str, sent: str | None) -> None:
    """Also if a load balancer says that they are."""
    with kept_spans() as spans:
        arrived = await passed_on(path, sent)
    assert arrived["traceparent"] == UNSAMPLED
    assert spans.get_finished_spans() == ()


async def test_without_tracing_a_clients_header_stays_as_it_is() -> None:
    assert await passed_on("/v1/models", CLIENTS) == {"traceparent": CLIENTS}
    assert await passed_on("/v1/models") == {}


async def test_signatures_and_long_paths_are_left_out() -> None:
    with kept_spans() as spans:
        await passed_on("/results/" + 1000 * "x", query="signature=secret")
    text = by_name(spans)[REQUEST].to_json()
    assert "secret" not in text
    assert (by_name(spans)[REQUEST].attributes or {})["url.path"] == ("/results/" + 1000 * "x")[
        :MAX_PATH
    ]


def test_it_stands_around_what_words_the_proxys_errors() -> None:
    """A status that the proxy replaces is in the trace as it was answered."""
    stack = [each.cls for each in read_with_h11()]
    assert stack.index(ProxyTraces) > stack.index(ProxyAnswers)
