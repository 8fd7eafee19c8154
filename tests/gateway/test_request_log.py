"""What Serve's log says of requests: the key's name, and nothing of probes."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from ray._common.formatters import JSONFormatter

from flux_ray.gateway import request_log
from flux_ray.gateway.request_log import RequestLog, note_key, watch_requests


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """As Serve writes them with `encoding: JSON`."""
    logger, written = logging.getLogger("ray.serve"), []
    formatter = JSONFormatter()

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(json.loads(formatter.format(record)))

    handler, level = Kept(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    watch_requests()
    watch_requests()
    yield written
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.filters[:] = [each for each in logger.filters if not isinstance(each, RequestLog)]
    request_log._KEY.set("")
    request_log._KEYS.clear()


def access(route: str, request_id: str) -> None:
    """Log as Serve does after a request, outside of its context."""
    extra = {"serve_access_log": True, "route": route, "request_id": request_id}
    logging.getLogger("ray.serve").info("GET %s 200 1.0ms", route, extra=extra)


@pytest.mark.parametrize("route", ["/readyz", "/health", "/-/healthz", "/-/routes", "/more/readyz"])
def test_probes_are_not_logged(lines: list[dict[str, Any]], route: str) -> None:
    access(route, "1")
    access("/v1/models", "2")
    assert [line["route"] for line in lines] == ["/v1/models"]


def test_lines_about_a_request_name_its_key(lines: list[dict[str, Any]]) -> None:
    note_key("r1", "alice")
    logging.getLogger("ray.serve").warning("request r1: too late")
    request_log._KEY.set("")
    access("/v1/models", "r1")
    access("/v1/models", "r1")
    assert [line.get("key") for line in lines] == ["alice", "alice", None]


def test_names_that_nobody_takes_out_do_not_pile_up() -> None:
    for number in range(request_log.MAX_KEYS + 10):
        note_key(str(number), "alice")
    assert len(request_log._KEYS) == request_log.MAX_KEYS
    request_log._KEYS.clear()
    request_log._KEY.set("")
