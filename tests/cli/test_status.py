"""`flux-ray status`: what of a cluster's answers is shown, and how it ends."""

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from flux_ray import metrics
from flux_ray.cli import scrape as scrape_module
from flux_ray.cli import status as status_module
from flux_ray.cli.dashboard import Dashboard
from flux_ray.cli.main import app
from flux_ray.cli.scrape import Counted, MetricSample, rate, samples_in, scrape
from flux_ray.cli.status import ClusterStatus, GatewayStatus, applications, gateway_status, row_of
from flux_ray.metrics import IMAGES, Metric

SCRAPE = """\
# HELP ray_flux_images Images generated.
# TYPE ray_flux_images counter
ray_flux_images_total{SessionName="session_1",WorkerId="a",tier="tiny"} 3.0
ray_flux_images_total{SessionName="session_1",WorkerId="b",tier="tiny"} 4.0
ray_flux_images_total{SessionName="session_2",WorkerId="c",tier="tiny"} 100.0
ray_flux_request_seconds_bucket{le="0.1",tier="tiny"} 1.0
ray_flux_request_seconds_count{tier="tiny"} 1.0
ray_flux_odd{note="a \\"b\\", c",tier="tiny"} 1e3
ray_serve_num_http_requests_total{route="/"} 9.0
"""
GATEWAY = GatewayStatus("http://g", ("tiny",))
REPLICAS = ("RUNNING", "RUNNING", "STARTING", "STOPPING")
DETAILS = {
    "applications": {
        "gateway": {"status": "RUNNING", "deployed_app_config": {"args": {"tiers": ["tiny"]}}},
        "tiny": {
            "status": "DEPLOYING",
            "message": "",
            "deployed_app_config": {
                "args": {"tier": "tiny", "parallel": {"tensor": 2, "sequence": 2}}
            },
            "deployments": {
                "tiny": {
                    "target_num_replicas": 3,
                    "message": "",
                    "replicas": [{"state": state} for state in REPLICAS],
                },
                "tiny-text-encoder": {"target_num_replicas": 1, "replicas": []},
            },
        },
    }
}


def test_the_text_of_a_scrape() -> None:
    samples = list(samples_in(SCRAPE))
    assert [sample.name for sample in samples] == [
        *["flux_images"] * 3,
        "flux_request_seconds_count",
        "flux_odd",
    ]
    assert samples[0].labels == {"SessionName": "session_1", "WorkerId": "a", "tier": "tiny"}
    assert (samples[-1].labels["note"], samples[-1].value) == ('a \\"b\\", c', 1000)


def counted(value: float, at_s: float, name: str = IMAGES.name, **labels: str) -> Counted:
    return Counted((MetricSample(name, {"tier": "tiny", **labels}, value),), at_s)


def test_totals_and_rates() -> None:
    both = Counted((*counted(3, 0, x="a").samples, *counted(4, 0, x="b").samples), 0)
    assert both.total("IMAGES", "tiny") == 7
    assert both.total("IMAGES", "tiny", x="b") == 4
    assert both.total("IMAGES", "other") is None
    assert both.total("NO_SUCH_METRIC", "tiny") is None
    assert rate(counted(3, 10), counted(9, 13), "IMAGES", "tiny") == 2
    assert rate(counted(9, 10), counted(3, 13), "IMAGES", "tiny") == 0
    assert rate(None, counted(3, 13), "IMAGES", "tiny") is None
    assert rate(Counted((), 10), counted(3, 13), "IMAGES", "tiny") == 1


def test_targets_that_are_silent_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"http://a:1/metrics": httpx.Response(200, text=SCRAPE)}

    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) not in texts:
            raise httpx.ConnectError("refused")
        return texts[str(request.url)]

    client = httpx.Client
    monkeypatch.setattr(
        scrape_module.httpx,
        "Client",
        lambda **options: client(transport=httpx.MockTransport(answer)),
    )
    samples = scrape(["a:1", "b:2"], "session_1")
    assert sum(sample.value for sample in samples if sample.name == "flux_images") == 7


def test_a_tier_with_all_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gauges and promises are those of a release that has them."""
    monkeypatch.setattr(metrics, "QUEUED_REQUESTS", Metric("q", ""), raising=False)
    monkeypatch.setattr(metrics, "QUEUED_SECONDS", Metric("q_s", ""), raising=False)
    monkeypatch.setattr(metrics, "PROMISES", Metric("p", ""), raising=False)
    samples = [
        *counted(120, 70).samples,
        *counted(2, 70, "q").samples,
        *counted(1.5, 70, "q_s").samples,
        *counted(9, 70, "p", outcome="kept").samples,
        *counted(1, 70, "p", outcome="missed").samples,
    ]
    before, now = counted(60, 10), Counted(tuple(samples), 70)
    (tier,), others = applications(DETAILS, GATEWAY, now, before)
    assert others == [("gateway", "RUNNING")]
    assert (tier.running, tier.wanted, tier.starting, tier.leaving) == (2, 3, 1, 1)
    assert (tier.ranks, tier.gpus, tier.is_ready) == (4, 8, True)
    assert (tier.queued, tier.queued_s, tier.kept_share) == (2, 1.5, 0.9)
    cells = [cell.plain for cell in row_of(tier)]
    assert cells == [
        *("tiny", "deploying", "yes", "2 of 3, 1 starting, 1 leaving", "2 x 4", "8"),
        *("2", "1.5", "90.0 %", "120", "60.0"),
    ]


def test_what_is_not_known_is_left_open() -> None:
    (tier,), _ = applications(DETAILS, GatewayStatus("http://g", None, "silent"), None, None)
    assert tier.is_ready is None
    assert [cell.plain for cell in row_of(tier)][6:] == ["-"] * 5


@pytest.mark.parametrize(
    ("response", "tiers", "problem"),
    [
        (httpx.Response(200, json={"tiers": ["tiny"]}), ("tiny",), ""),
        (httpx.Response(503, json={"error": {"message": "no tier"}}), (), "no tier"),
        (httpx.Response(404, text="x"), None, "answers 404, but not as a flux-ray gateway does"),
        (httpx.Response(200, json=[]), None, "answers 200, but not as"),
    ],
)
def test_what_the_gateway_says(
    response: httpx.Response, tiers: tuple[str, ...] | None, problem: str
) -> None:
    said = gateway_status("http://g", response)
    assert said.ready_tiers == tiers
    assert problem in said.problem


@pytest.mark.parametrize(
    ("seen", "is_well"),
    [
        (ClusterStatus(GATEWAY, others=(("gateway", "RUNNING"),)), True),
        (ClusterStatus(GATEWAY, others=(("gateway", "UNHEALTHY"),)), False),
        (ClusterStatus(GatewayStatus("http://g", ()), others=(("gateway", "RUNNING"),)), False),
        (ClusterStatus(GatewayStatus("http://g", None, "silent")), False),
    ],
)
def test_a_cluster_is_well_if_it_serves_and_all_runs(seen: ClusterStatus, is_well: bool) -> None:
    assert seen.is_well == is_well


def ask(url: str, monkeypatch: pytest.MonkeyPatch, details: Any, *options: str) -> Result:
    answers = {
        "/api/serve/applications/": details,
        "/api/prometheus/sd": [],
        "/api/version": {"session_name": "session_1"},
        "/api/v0/cluster_metadata": {},
    }
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, json=answers[request.url.path])
    )
    monkeypatch.setattr(
        status_module, "dashboard_at", lambda *_: Dashboard("http://head", None, transport)
    )
    return CliRunner().invoke(app, ["status", url, *options])


def test_once_as_a_table(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ask(url, monkeypatch, DETAILS)
    # `tiny` is still being deployed.
    assert result.exit_code == 1
    assert "2 of 3, 1 starting, 1 leaving" in result.stdout
    assert f"gateway {url}: ready for tiny" in result.stdout
    assert "no node told its metrics" in result.stdout
    assert "\x1b" not in result.stdout


def test_once_as_json(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    details = json.loads(json.dumps(DETAILS))
    details["applications"]["tiny"]["status"] = "RUNNING"
    result = ask(url, monkeypatch, details, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["is_well"] and said["tiers"][0]["running"] == 2
    assert said["gateway"]["ready_tiers"] == ["tiny"]


def test_without_a_dashboard_the_gateway_is_asked_all_the_same(url: str) -> None:
    result = CliRunner().invoke(app, ["status", url, "--address", "http://127.0.0.1:9"])
    assert result.exit_code == 0
    assert f"gateway {url}: ready for tiny" in result.stdout
    assert "nothing answers at http://127.0.0.1:9" in result.stdout
