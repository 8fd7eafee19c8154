"""dashboards.yaml: the dashboard of cluster/monitoring/, where Grafana's sidecar finds it."""

import json

from tests.kuberay.conftest import CASES, ROOT, Render, values_of

CASE = {path.stem: values_of(path) for path in CASES}
DASHBOARD = ROOT / "cluster" / "monitoring" / "grafana" / "flux-ray.json"


def test_off_unless_asked_for(render: Render) -> None:
    assert render()["dashboards.yaml"] == []


def test_the_dashboard_is_the_one_that_is_tested(render: Render) -> None:
    [config_map] = render(CASE["everything"])["dashboards.yaml"]
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(config_map["data"]["flux-ray.json"])
    assert dashboard == json.loads(DASHBOARD.read_text())
    # By this uid the head tells Ray's dashboard of it.
    assert dashboard["uid"] == "flux-ray"


def test_it_is_small_enough_for_an_object(render: Render) -> None:
    """`kubectl apply` keeps a copy in an annotation, and these are 256 KiB at most."""
    [config_map] = render(CASE["everything"])["dashboards.yaml"]
    assert len(config_map["data"]["flux-ray.json"].encode()) < 2**18
