"""Operators find every metric, with its labels, in README."""

import re
from pathlib import Path

import pytest

from flux_ray import metrics
from flux_ray.gateway.probes import PROBES
from flux_ray.metrics import Metric

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = re.search(r"^## Metrics$(.*?)^## ", README, re.M | re.S)[1]
METRICS = [value for value in vars(metrics).values() if isinstance(value, Metric)]


def row_of(metric: Metric) -> str:
    """Its row of the table."""
    [row] = [line for line in SECTION.splitlines() if line.startswith(f"| `ray_{metric.name}` |")]
    return row


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_listed_with_its_labels_and_a_query(metric: Metric) -> None:
    row = row_of(metric)
    assert all(f"`{label}`" in row for label in metric.labels if label != "tier")
    ending = "_bucket" if metric.buckets else "_total"
    assert f"ray_{metric.name}{ending}" in row


def test_no_metric_is_listed_that_is_not_there() -> None:
    listed = re.findall(r"^\| `ray_(\w+)`", SECTION, re.M)
    assert sorted(listed) == sorted(metric.name for metric in METRICS)


def test_queries_of_http_leave_probes_out() -> None:
    [pattern] = re.findall(r'route!~"([^"]+)"', SECTION)
    assert all(re.fullmatch(pattern, path) for path in PROBES)
    assert not re.fullmatch(pattern, "/v1/images/generations")
