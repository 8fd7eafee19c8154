"""Operators find every metric, with its labels, in docs/monitoring.md, and that from README."""

import re
from pathlib import Path

import promql_parser
import pytest

from flux_ray import metrics
from flux_ray.gateway.probes import PROBES
from flux_ray.metrics import Metric

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
SECTION = re.search(r"^## The metrics$(.*?)^## ", PAGE, re.M | re.S)[1]
METRICS = [value for value in vars(metrics).values() if isinstance(value, Metric)]


def row_of(metric: Metric) -> str:
    """Its row of the table."""
    [row] = [line for line in SECTION.splitlines() if line.startswith(f"| `ray_{metric.name}` |")]
    return row


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_listed_with_its_labels_and_a_query(metric: Metric) -> None:
    row = row_of(metric)
    assert all(f"`{label}`" in row for label in metric.labels if label != "tier")
    assert ("tier" in metric.labels) == ("(no tier)" not in row)
    ending = "" if metric.is_gauge else "_bucket" if metric.buckets else "_total"
    assert re.search(rf"\bray_{metric.name}{ending}\b", query_of(row))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_its_query_is_one(metric: Metric) -> None:
    promql_parser.parse(query_of(row_of(metric)))


def query_of(row: str) -> str:
    """Its last column, without the backticks."""
    return row.split("|")[-2].strip(" `")


def test_readme_leads_to_the_page() -> None:
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Metrics$(.*?)^## ", readme, re.M | re.S)[1]
    assert "(docs/monitoring.md)" in section


def test_no_metric_is_listed_that_is_not_there() -> None:
    listed = re.findall(r"^\| `ray_(\w+)`", SECTION, re.M)
    assert sorted(listed) == sorted(metric.name for metric in METRICS)


def test_queries_of_http_leave_probes_out() -> None:
    [pattern] = re.findall(r'route!~"([^"]+)"', SECTION)
    assert all(re.fullmatch(pattern, path) for path in PROBES)
    assert not re.fullmatch(pattern, "/v1/images/generations")
