"""The checks of manifests find mistakes, so that their silence means something."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.kuberay.conftest import Render, values_of
from tests.kuberay.schemas import errors_of

Change = Callable[[dict[str, Any]], Any]


def cluster(service: dict[str, Any]) -> Any:
    return service["spec"]["rayClusterConfig"]


def head(service: dict[str, Any]) -> Any:
    return cluster(service)["headGroupSpec"]


def head_container(service: dict[str, Any]) -> Any:
    return head(service)["template"]["spec"]["containers"][0]


def workers(service: dict[str, Any]) -> Any:
    return cluster(service)["workerGroupSpecs"][0]


def incremental(service: dict[str, Any], **options: Any) -> None:
    told = {"stepSizePercent": 10, "intervalSeconds": 5, "gatewayClassName": "istio"} | options
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": told}
    cluster(service)["enableInTreeAutoscaling"] = True
    service["spec"]["upgradeStrategy"] = strategy


MISTAKES: dict[str, tuple[str, Change]] = {
    "unknown key": ("upgradeStrategi", lambda s: s["spec"].update(upgradeStrategi={})),
    "deep unknown key": ("imagePullpolicy", lambda s: head_container(s).update(imagePullpolicy="")),
    "mode": ("tokens", lambda s: cluster(s).update(authOptions={"mode": "tokens"})),
    "type": ("'2'", lambda s: workers(s).update(replicas="2")),
    "missing": ("rayStartParams|template", lambda s: head(s).pop("template")),
    "upgrade": ("Rolling", lambda s: s["spec"].update(upgradeStrategy={"type": "Rolling"})),
    "steps": ("stepSizePercent", lambda s: incremental(s, maxSurgePercent=5)),
    "no gateway": ("gatewayClassName", lambda s: incremental(s, gatewayClassName="")),
    "name": ("name", lambda s: s["metadata"].update(name="x" * 48)),
    "name begins": ("name", lambda s: s["metadata"].update(name="1x")),
    "old Ray": ("mode token", lambda s: cluster(s).update(rayVersion="2.51.0")),
    "no Ray": ("mode token", lambda s: cluster(s).pop("rayVersion")),
    "k8s tokens": ("K8sToken", lambda s: cluster(s)["authOptions"].update(enableK8sTokenAuth=True)),
    "head name": ("headService", lambda s: head(s).update(headService={"metadata": {"name": "x"}})),
    "gate": ("networkPolicy", lambda s: cluster(s).update(networkPolicy={})),
    "rocksdb": ("gate", lambda s: cluster(s).update(gcsFaultToleranceOptions={"storage": {}})),
    "sizes": ("minReplicas 9", lambda s: workers(s).update(minReplicas=9)),
    "no sizes": ("are needed", lambda s: workers(s).pop("maxReplicas")),
    "label": ("label card", lambda s: workers(s).update(labels={"card": "h 100"})),
    "labels": ("labels", lambda s: workers(s)["rayStartParams"].update(labels="a=b")),
    "port": ("15", lambda s: head_container(s)["ports"][0].update(name="dashboard-metrics")),
    "redis": ("sets", lambda s: head_container(s)["env"].append({"name": "REDIS_PASSWORD"})),
    "timeout": ("initializing", lambda s: s["metadata"].update(
        annotations={"ray.io/initializing-timeout": "two hours"}
    )),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_rayservice_is_found(mistake: str, render: Render) -> None:
    [service] = render()["rayservice.yaml"]
    assert errors_of(service) == []
    changed = copy.deepcopy(service)
    expected, change = MISTAKES[mistake]
    change(changed)
    told = " ".join(errors_of(changed))
    assert any(word in told for word in expected.split("|")), told


def test_a_good_incremental_upgrade_is_not_refused(render: Render) -> None:
    [service] = render()["rayservice.yaml"]
    incremental(service)
    assert errors_of(service) == []


@pytest.mark.parametrize(
    "template", ["networkpolicy.yaml", "podmonitor.yaml", "prometheusrule.yaml"]
)
def test_an_unknown_key_is_found_in_other_kinds(template: str, render: Render) -> None:
    monitoring = {"podMonitor": {"enabled": True}, "alerts": {"enabled": True}}
    first = render(values_of(None) | {"monitoring": monitoring})[template][0]
    assert errors_of(first) == []
    first["spec"]["nonsense"] = 1
    assert "nonsense" in errors_of(first)[0]
