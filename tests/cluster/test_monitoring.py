"""A real Prometheus has data for every query of the dashboard and of the alerts."""

import math
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from cluster.monitoring.draw import draw
from tests.cluster.conftest import BOOT_S, PATIENCE_S, are_running, deploy, wait_until
from tests.cluster.monitored import Callers, Prometheus, monitored, prometheus_beside_ray
from tests.test_dashboard import QUERIES, nodes_of, rules, selectors_of

# Series that do not come to be here, and why. Other tests bring the faults.
ABSENT = {
    "ray_node_gram_used": "there is no GPU",
    "ray_node_gpus_utilization": "there is no GPU",
    "ray_flux_hung_replicas_total": "a hung process takes half a minute to be found: test_hung.py",
}
ALERTS = {rule["alert"] for rule in rules()}
ROUNDS = 3


def asked() -> dict[str, str]:
    """Return the queries that have to have data here."""
    return {
        name: query
        for name, query in QUERIES.items()
        if not ABSENT.keys() & {each.name for each in selectors_of(query)}
    }


def missing(prometheus: Prometheus) -> list[str]:
    """Return what has no data: queries, parts of them, and labels that they add up by."""
    found = []
    for name, query in asked().items():
        for selector in selectors_of(query):
            # This Prometheus is too young to know what was an hour ago.
            series = re.sub(r" offset \w+", "", str(selector))
            if not prometheus.ask(series):
                found.append(f"{name}: {series}")
        # The comparison of an alert has a result only if there is something wrong.
        if name not in ALERTS and not any(is_number(each) for each in prometheus.ask(query)):
            found.append(f"{name}: {query}")
        found += [f"{name}: the label {label}" for label in unknown_labels(prometheus, query)]
    return found


def is_number(series: dict[str, Any]) -> bool:
    return not math.isnan(float(series["value"][1]))


def unknown_labels(prometheus: Prometheus, query: str) -> Iterator[str]:
    """Yield the labels that the query adds up by, and that its series do not have."""
    for node in nodes_of(promql_parser.parse(query)):
        if not isinstance(node, promql_parser.AggregateExpr) or node.modifier is None:
            continue
        parts = [part for part in selectors_of(str(node)) if " offset " not in str(part)]
        series = [each for part in parts for each in prometheus.ask(str(part))]
        if not parts:
            continue
        for label in node.modifier.labels:
            if not any(each["metric"].get(label) for each in series):
                yield label


@pytest.mark.slow
def test_every_query_has_data(address: str, config: dict[str, Any], tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed (apt-get install prometheus)")
    from ray import serve

    config, secrets = monitored(config, tmp_path)
    callers = Callers(config, address, secrets)
    deploy(config)
    wait_until(lambda: are_running(serve.status()), timeout_s=BOOT_S, what="every application")
    began = time.monotonic()
    with prometheus_beside_ray(tmp_path) as prometheus:
        with ThreadPoolExecutor(1) as beside:
            lost = beside.submit(callers.lose_a_replica, tmp_path)
            for _ in range(ROUNDS):
                callers.come_once()
            assert lost.result() == 200, "a second replica generated it"
        while (lacks := missing(prometheus)) and time.monotonic() - began < PATIENCE_S:
            seconds = time.monotonic() - began
            print(f"after {seconds:.0f} s {len(lacks)} lack data", prometheus.scrape_errors())
            callers.come_once()
        assert lacks == []
        empty = draw(prometheus.url, str(tmp_path / "panels.png"), minutes=3)
    assert set(empty) == {"Memory of GPUs", "GPUs at work"}
