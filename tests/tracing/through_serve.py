"""Requests and probes on their way through Serve's own tracing code and ours, without a cluster.

It does what Serve's proxy, router and replicas do with a trace, each process in an empty context.
A program, because a process has one tracer provider for good. Spans are sent when it ends.
"""

import asyncio
import contextvars
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ray.serve._private import tracing_utils as serve
from starlette.types import Receive, Scope, Send

from flux_ray.gateway.proxy_middleware import ProxyTraces
from flux_ray.tracing import StageSpans, span

Context = dict[str, str] | None
Process = Callable[[Context], Coroutine[Any, Any, None]]


async def call(name: str, process: Process) -> None:
    """Call another process as Serve's router does: without a context if nothing is recorded."""
    with serve.TraceContextManager(f"route_to_replica {name}"):
        passed = serve.create_propagated_context() if serve.is_span_recording() else None
    await asyncio.create_task(process(passed), context=contextvars.Context())


async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
    for name, value in scope["headers"]:
        if name == b"traceparent":
            sent = serve.extract_propagated_context({"traceparent": value.decode()})
            serve.set_trace_context(sent)
    with serve.TraceContextManager("proxy_http_request"):
        await call("gateway", gateway if scope["path"].startswith("/v1/") else probe)


def handling(name: str, passed: Context) -> serve.TraceContextManager:
    context = serve.extract_propagated_context(passed)
    return serve.TraceContextManager(f"replica_handle_request {name}", trace_context=context)


async def probe(passed: Context) -> None:
    with handling("gateway", passed):
        pass


async def gateway(passed: Context) -> None:
    with handling("gateway", passed), span("generate"):
        await call("tiny", replica)


async def replica(passed: Context) -> None:
    with handling("tiny", passed):
        now = time.perf_counter()
        stages = StageSpans(now)
        stages.answer([("encode", 0.01), ("denoise", 0.01), ("decode", 0.01)], now + 0.03)
        stages.close()


async def nothing(*about: Any) -> Any: ...


async def main(paths: list[str]) -> None:
    for path in paths:
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        task = ProxyTraces(proxy)(scope, nothing, nothing)
        await asyncio.create_task(task, context=contextvars.Context())
    # As a gateway asks a new replica what it is.
    await asyncio.create_task(call("tiny", probe), context=contextvars.Context())


if __name__ == "__main__":
    serve.RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH = "flux_ray.tracing:otlp"
    assert serve.setup_tracing("gateway", "1")
    asyncio.run(main(sys.argv[1:]))
