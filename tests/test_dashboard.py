"""The dashboard and the alerts ask for series that exist, and for all of them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from cluster.monitoring import dashboard
from cluster.monitoring.draw import filled, legend_of
from cluster.monitoring.panels import ROWS, all_panels
from flux_ray import metrics
from flux_ray.gateway.probes import PROBES
from flux_ray.metrics import Metric

MONITORING = Path(__file__).parent.parent / "cluster" / "monitoring"
RUNBOOK = Path(__file__).parent.parent / "docs" / "monitoring.md"
ROWS_OF_CODE = [row for row in vars(metrics).values() if isinstance(row, Metric)]
# Of Serve's and Ray's own series those that are asked for; GPUs have the last two.
OTHERS = {
    "ray_serve_application_status",
    "ray_serve_controller_control_loop_duration_s",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts_total",
    "ray_serve_http_request_latency_ms_bucket",
    "ray_serve_num_http_requests_total",
    "ray_serve_num_ongoing_http_requests",
    "ray_component_rss_mb",
    "ray_node_gram_used",
    "ray_node_gpus_utilization",
}
# Ray adds these to what a metric of ours says, and Prometheus the instance.
ADDED = {"application", "deployment", "replica", "le", "instance"}
# The panels that the pages of Ray's dashboard show.
EMBEDDED = {7, 8, 15, 20, 21, 22, 23, 24, 25}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Return all queries of the dashboard and the alerts, by what they are for."""
    found = {
        f"{panel.title} {number}": filled(query)
        for panel in all_panels()
        for number, (query, _) in enumerate(panel.queries)
    }
    return found | {rule["alert"]: rule["expr"] for rule in rules()}


QUERIES = queries()


def nodes_of(node: Any) -> Iterator[Any]:
    """Yield the nodes of a parsed query."""
    yield node
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        if (inner := getattr(node, name, None)) is not None:
            yield from nodes_of(inner)
    for inner in getattr(node, "args", ()):
        yield from nodes_of(inner)


def selectors_of(query: str) -> list[Any]:
    nodes = nodes_of(promql_parser.parse(query))
    return [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]


def exported(row: Metric) -> set[str]:
    """Return the names under which Prometheus has a metric of ours."""
    if row.is_gauge:
        return {f"ray_{row.name}"}
    # A histogram has a sum too, which Ray makes up from its buckets.
    endings = ("_bucket", "_count") if row.buckets else ("_total",)
    return {f"ray_{row.name}{ending}" for ending in endings}


NAMES = {name: row for row in ROWS_OF_CODE for name in exported(row)}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_asks_for_series_that_exist(name: str) -> None:
    selectors = selectors_of(QUERIES[name])
    assert selectors
    for selector in selectors:
        assert selector.name in NAMES.keys() | OTHERS
        if selector.name in NAMES:
            labels = {matcher.name for matcher in selector.matchers.matchers}
            assert labels <= {*NAMES[selector.name].labels, *ADDED}


@pytest.mark.parametrize("name", QUERIES)
def test_what_changes_with_every_restart_is_summed_away(name: str) -> None:
    """Each process has series of its own, by its WorkerId: a graph of them would be unreadable."""
    tree = promql_parser.parse(QUERIES[name])
    bare = [node for node in outside_of_aggregates(tree) if is_selector(node)]
    assert not bare or name in {"FluxRayNoGateway"}, "absent() has no series to add up"


def is_selector(node: Any) -> bool:
    return isinstance(node, promql_parser.VectorSelector | promql_parser.MatrixSelector)


def outside_of_aggregates(node: Any) -> Iterator[Any]:
    """Yield the nodes that no `sum`, `max` or the like is around."""
    if isinstance(node, promql_parser.AggregateExpr):
        return
    yield node
    for name in ("lhs", "rhs", "expr"):
        if (inner := getattr(node, name, None)) is not None:
            yield from outside_of_aggregates(inner)
    for inner in getattr(node, "args", ()):
        yield from outside_of_aggregates(inner)


@pytest.mark.parametrize("row", ROWS_OF_CODE, ids=lambda row: row.name)
def test_every_metric_is_shown_or_alerts(row: Metric) -> None:
    asked = {selector.name for query in QUERIES.values() for selector in selectors_of(query)}
    assert exported(row) & asked


def test_the_file_is_what_the_program_makes() -> None:
    assert dashboard.text() == dashboard.FILE.read_text(), "python -m cluster.monitoring.dashboard"


def test_panels_have_ids_that_rays_dashboard_embeds() -> None:
    made = json.loads(dashboard.FILE.read_text())
    assert made["uid"] == "flux-ray"
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    assert set(ids) >= EMBEDDED
    assert {each["name"] for each in made["templating"]["list"]} == {"datasource", "tier"}


def test_the_four_questions_fit_a_screen() -> None:
    """A screen of 1080 pixels shows about 25 units of Grafana's grid."""
    made = json.loads(dashboard.FILE.read_text())["panels"]
    [wrong] = [panel for panel in made if panel["title"] == ROWS[-1][0]]
    assert wrong["gridPos"]["y"] <= 25
    assert [title for title, _ in ROWS[:-1]] == [
        "Are we keeping the promise?",
        "Where does the time go?",
        "What will scale next?",
        "Who uses it?",
    ]


def test_probes_are_no_requests() -> None:
    patterns = re.findall(r'route!~"([^"]+)"', " ".join(QUERIES.values()))
    assert patterns
    for pattern in patterns:
        assert all(re.fullmatch(pattern, path) for path in PROBES)
        assert not re.fullmatch(pattern, "/v1/images/generations")


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"].endswith(".")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/monitoring.md"
    headings = re.findall(r"^#+ (.*)$", RUNBOOK.read_text(), re.M)
    assert anchor in {re.sub(r"[^\w-]", "", each.lower().replace(" ", "-")) for each in headings}


def test_the_page_names_panels_that_are_there() -> None:
    text = " ".join(RUNBOOK.read_text().split())
    named = set(re.findall(r"(?<![*\w])\*([A-Z][^*]+)\*(?!\*)", text))
    titles = [panel.title for panel in all_panels()]
    assert len(named) > 10
    assert {name for name in named if not any(title.startswith(name) for title in titles)} == set()


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint=all", "--lint-fatal", "alerts.yaml"),
        ("test", "rules", "alerts_test.yaml"),
    ],
    ids=lambda command: " ".join(command),
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    told = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_shared_text_encoder_is_no_replica_of_its_tier(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    [panel] = [panel for panel in all_panels() if panel.title == "Replicas wanted, up"]
    name = "ray_serve_deployment_replica_healthy"
    series = [
        f'{name}{{application="dev", deployment="{deployment}", replica="{replica}"}}'
        for deployment, replica in (("dev", "a"), ("dev", "b"), ("dev-text-encoder", "c"))
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": each, "values": "1x10"} for each in series],
        "promql_expr_test": [
            {
                "expr": filled(panel.queries[1][0], tier="dev"),
                "eval_time": "5m",
                "exp_samples": [
                    {"labels": '{deployment="dev"}', "value": 2},
                    {"labels": '{deployment="dev-text-encoder"}', "value": 1},
                ],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"tests": [test]}))
    told = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_grafana_finds_what_is_mounted() -> None:
    provisioning = MONITORING / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    assert source["isDefault"]


def test_a_legend_is_made_of_labels() -> None:
    labels = {"tier": "tiny", "stage": "denoise"}
    assert legend_of("{{tier}} {{stage}}", labels) == "tiny denoise"
    assert legend_of("{{node}} p50", labels) == "p50"
    assert legend_of("", labels) == "tiny denoise"
