"""The REST API of Ray's dashboard: its token, its answers, and what is no dashboard."""

from pathlib import Path

import httpx
import pytest

from flux_ray.cli.dashboard import Dashboard, DashboardError, find_token
from flux_ray.config import ClusterNode


def test_nodes_are_read_as_ray_lists_them() -> None:
    labels = {"ray.io/node-id": "a1", "pool": "whole"}
    resources = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:L4": 1.0, "memory": 1e9}
    alive = {"node_ip": "10.0.0.2", "state": "ALIVE", "resources_total": resources}
    rows = [alive | {"labels": labels}, alive | {"state": "DEAD"}, {"state": "ALIVE"}]
    answer = {"data": {"result": {"result": rows}}}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
    with Dashboard("http://head", None, transport) as dashboard:
        first, second = dashboard.nodes()
    assert first == ClusterNode("10.0.0.2", 8, 2, "L4", labels)
    assert (second.num_cpus, second.num_gpus, second.labels) == (0, 0, {})


def test_a_dashboard_that_wants_a_token() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers.get("authorization") == "Bearer secret":
            return httpx.Response(200, json={"applications": {}})
        return httpx.Response(401, text="Unauthorized: Missing authentication token")

    with Dashboard("http://head", "secret", httpx.MockTransport(answer)) as dashboard:
        assert dashboard.details()["applications"] == {}
    with (
        Dashboard("http://head", None, httpx.MockTransport(answer)) as dashboard,
        pytest.raises(DashboardError, match="asks for the cluster's token"),
    ):
        dashboard.details()


def test_the_token_is_found_where_ray_finds_it(tmp_path: Path) -> None:
    named, kept = tmp_path / "named", tmp_path / ".ray" / "auth_token"
    assert find_token(None, {}, tmp_path) is None
    kept.parent.mkdir()
    kept.write_text("kept\n")
    assert find_token(None, {}, tmp_path) == "kept"
    named.write_text("named\n")
    assert find_token(named, {}, tmp_path) == "named"
    assert find_token(named, {"RAY_AUTH_TOKEN": "told"}, tmp_path) == "told"
    with pytest.raises(DashboardError, match="cannot be read"):
        find_token(tmp_path / "none", {}, tmp_path)


def test_something_else_answers() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with (
        Dashboard("http://head", None, transport) as dashboard,
        pytest.raises(DashboardError, match="does not answer as Ray's dashboard does"),
    ):
        dashboard.details()
