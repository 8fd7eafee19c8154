"""networkpolicy.yaml: clients reach port 8000, Prometheus the metrics, and nobody else anything."""

from typing import Any

import pytest

from tests.kuberay.conftest import CASES, Object, Render, groups_of, named, service_of, values_of

CASE = {path.stem: values_of(path) for path in CASES}
PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
OPERATOR = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}}
OWN = {"app.kubernetes.io/instance": "flux", "app.kubernetes.io/part-of": "flux-ray"}


def selects(policy: Object, labels: Object) -> bool:
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def ports_from(peer: Object | None, pod: Object, policies: list[Object]) -> set[int | None]:
    """Return the ports of a Pod that a peer may reach; None is all ports, as a peer everybody."""
    rules = [
        rule
        for policy in policies
        if selects(policy, pod["metadata"]["labels"])
        for rule in policy["spec"].get("ingress", [])
        if ("from" not in rule if peer is None else peer in rule.get("from", []))
    ]
    return {port["port"] for rule in rules for port in rule["ports"]} if rules else set()


@pytest.fixture
def pods(render: Render) -> tuple[Object, Object]:
    """Return the templates of the head's Pod and of a worker's."""
    rendered = render()
    [worker] = groups_of(rendered).values()
    return service_of(rendered)["rayClusterConfig"]["headGroupSpec"]["template"], worker["template"]


def test_strangers_reach_the_proxies_only(pods: tuple[Object, Object], render: Render) -> None:
    policies = render()["networkpolicy.yaml"]
    head, worker = pods
    assert ports_from(None, worker, policies) == {8000}
    assert ports_from(None, head, policies) == set()


def test_every_pod_is_closed_in_both_directions(render: Render) -> None:
    """A Pod that no policy selects is open; the labels are those of head, workers and Job."""
    rendered = render(CASE["everything"])
    everyone = named(rendered["networkpolicy.yaml"])["flux-all"]
    assert everyone["spec"]["policyTypes"] == ["Ingress", "Egress"]
    [job] = rendered["weights-job.yaml"]
    groups = [
        service_of(rendered)["rayClusterConfig"]["headGroupSpec"],
        *groups_of(rendered).values(),
    ]
    for template in [group["template"] for group in groups] + [job["spec"]["template"]]:
        assert selects(everyone, template["metadata"]["labels"])


def test_prometheus_reads_metrics(pods: tuple[Object, Object], render: Render) -> None:
    policies = render()["networkpolicy.yaml"]
    head, worker = pods
    assert ports_from(PROMETHEUS, worker, policies) == {8080}
    assert ports_from(PROMETHEUS, head, policies) == {8080, 44217, 44227}


def test_the_operator_deploys(pods: tuple[Object, Object], render: Render) -> None:
    policies = render()["networkpolicy.yaml"]
    head, worker = pods
    assert ports_from(OPERATOR, head, policies) == {8265}
    assert ports_from(OPERATOR, worker, policies) == set()


def test_rays_own_pods_reach_each_other(render: Render) -> None:
    spec = named(render()["networkpolicy.yaml"])["flux-all"]["spec"]
    peer = {"podSelector": {"matchLabels": OWN}}
    assert spec["ingress"] == [{"from": [peer]}], "all ports, and nobody of another namespace"
    assert {"to": [peer]} in spec["egress"]


def test_nothing_private_is_reached_but_what_is_named(render: Render) -> None:
    spec = named(render(CASE["existing-secrets"])["networkpolicy.yaml"])["flux-all"]["spec"]
    blocks = [
        peer["ipBlock"] for rule in spec["egress"] for peer in rule["to"] if "ipBlock" in peer
    ]
    public, public_v6, database = blocks
    assert {"10.0.0.0/8", "169.254.0.0/16", "192.168.0.0/16"} <= set(public["except"])
    assert public_v6["cidr"] == "::/0"
    assert database == {"cidr": "10.1.2.3/32"}
    to_names = [
        rule for rule in spec["egress"] if {"protocol": "UDP", "port": 53} in rule.get("ports", [])
    ]
    assert to_names[0]["to"][0]["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}


def test_only_a_head_with_the_autoscaler_asks_kubernetes(render: Render) -> None:
    egress: dict[str, Any] = {
        name: named(render(CASE.get(name))["networkpolicy.yaml"])["flux-head"]["spec"]["egress"]
        for name in ("default", "everything")
    }
    assert egress["default"] == []
    assert [port["port"] for port in egress["everything"][0]["ports"]] == [443, 6443]


def test_the_head_asks_grafana_and_prometheus_where_their_graphs_are_shown(render: Render) -> None:
    for host in ("grafanaHost", "prometheusHost"):
        rendered = render({"monitoring": {host: "http://a.monitoring.svc"}})
        head = named(rendered["networkpolicy.yaml"])["flux-head"]["spec"]
        assert head["egress"] == [{"to": [PROMETHEUS]}]
    assert {"to": [PROMETHEUS]} in named(render(CASE["everything"])["networkpolicy.yaml"])[
        "flux-head"
    ]["spec"]["egress"]


def test_clients_can_be_named(render: Render) -> None:
    worker = named(render(CASE["existing-secrets"])["networkpolicy.yaml"])["flux-workers"]
    first = worker["spec"]["ingress"][0]
    assert first["from"] == [{"podSelector": {"matchLabels": {"app": "haproxy"}}}]


def test_they_can_be_left_out(render: Render) -> None:
    assert render(CASE["minimal"])["networkpolicy.yaml"] == []
