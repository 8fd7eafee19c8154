"""rayservice.yaml: one head without work, whole nodes of cards, and ends that lose no request."""

import re
from typing import Any

import pytest
import yaml

from tests.kuberay.conftest import (
    CASES,
    ROOT,
    Object,
    Render,
    container_of,
    env_of,
    groups_of,
    service_of,
    values_of,
)

CASE = {path.stem: values_of(path) for path in CASES}
EXPORTED = re.compile(r"^serve: export (\w+) \?= ?(.*)$", re.M)


def head_of(rendered: dict[str, list[Object]]) -> Object:
    return service_of(rendered)["rayClusterConfig"]["headGroupSpec"]


def all_groups(rendered: dict[str, list[Object]]) -> list[Object]:
    return [head_of(rendered), *groups_of(rendered).values()]


def test_the_head_does_no_work(case: dict[str, Any], render: Render) -> None:
    rendered = render(case)
    head = head_of(rendered)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container_of(head)["resources"]["limits"]
    assert service_of(rendered)["excludeHeadPodFromServeSvc"] is True
    [gateway] = [
        each
        for each in yaml.safe_load(service_of(rendered)["serveConfigV2"])["applications"]
        if each["name"] == "gateway"
    ]
    assert gateway["args"]["num_cpus"] > 0, "or gateways are placed on the head"


def test_ray_has_the_environment_of_make_serve(case: dict[str, Any], render: Render) -> None:
    wanted = dict(EXPORTED.findall((ROOT / "Makefile").read_text()))
    assert len(wanted) >= 10
    wanted["FORWARDED_ALLOW_IPS"] = case.get("trustedProxies", "")
    rendered = render(case)
    for group in all_groups(rendered):
        assert {name: env_of(group).get(name) for name in wanted} == wanted


def test_tokens_are_asked_for(render: Render) -> None:
    auth = service_of(render())["rayClusterConfig"]["authOptions"]
    assert auth == {"mode": "token"}, "the operator makes a Secret for each cluster"
    auth = service_of(render(CASE["existing-secrets"]))["rayClusterConfig"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "ray"}
    rendered = render(CASE["spare-nodes"])
    assert service_of(rendered)["rayClusterConfig"]["authOptions"]["secretName"] == "flux-ray-token"


def test_a_pod_is_a_whole_node(render: Render) -> None:
    groups = groups_of(render(CASE["everything"]))
    cards = {
        name: container_of(group)["resources"]["limits"].get("nvidia.com/gpu")
        for name, group in groups.items()
    }
    assert cards == {"h100": 8, "l40s-spot": 4, "processors": None}
    bounds = {
        name: (g["minReplicas"], g["replicas"], g["maxReplicas"]) for name, g in groups.items()
    }
    assert bounds == {"h100": (2, 3, 4), "l40s-spot": (0, 2, 2), "processors": (1, 1, 1)}
    assert groups["l40s-spot"]["labels"] == {"card": "l40s"}
    spot = groups["l40s-spot"]["template"]["spec"]
    assert [each["key"] for each in spot["tolerations"]] == [
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
    ]
    assert "tolerations" not in groups["processors"]["template"]["spec"]
    assert groups["h100"]["template"]["spec"]["runtimeClassName"] == "nvidia"
    for group in groups.values():
        resources = container_of(group)["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_shared_memory_has_room_for_rays_objects(case: dict[str, Any], render: Render) -> None:
    for group in all_groups(render(case)):
        spec = group["template"]["spec"]
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container_of(group)[
            "volumeMounts"
        ]
        [volume] = [each for each in spec["volumes"] if each["name"] == "shared-memory"]
        assert volume["emptyDir"]["medium"] == "Memory"
        size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
        assert int(group["rayStartParams"]["object-store-memory"]) < size


def test_a_pod_that_ends_drains_its_node(case: dict[str, Any], render: Render) -> None:
    for group in groups_of(render(case)).values():
        command = container_of(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["bash", "/etc/flux-ray/scripts/drain_node.sh"]
        grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert int(command[2]) == grace_s - 20
        [volume] = [
            each for each in group["template"]["spec"]["volumes"] if each["name"] == "scripts"
        ]
        assert volume["configMap"]["items"] == [{"key": "drain_node.sh", "path": "drain_node.sh"}]


def test_sigterm_after_the_drain_ends_within_the_margin(render: Render) -> None:
    """Ray drains its node once more at SIGTERM, for 30 seconds unless it is told otherwise."""
    rendered = render()
    [worker] = groups_of(rendered).values()
    wait_s = float(env_of(worker)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    grace_s = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    notice_s = int(container_of(worker)["lifecycle"]["preStop"]["exec"]["command"][2])
    # After it Ray gives its processes some seconds to end.
    assert notice_s + wait_s + 10 < grace_s
    assert env_of(head_of(rendered))["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"


def test_an_end_is_longer_than_the_longest_request(render: Render) -> None:
    spec = service_of(render())
    config = yaml.safe_load(spec["serveConfigV2"])
    longest_s = config["http_options"]["request_timeout_s"]
    assert longest_s < spec["rayClusterDeletionDelaySeconds"]
    [group] = groups_of(render()).values()
    assert longest_s < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_nobody_stops_ray(case: dict[str, Any], render: Render) -> None:
    """`ray stop` kills what is being generated, and the operator's samples have it."""
    assert "ray stop" not in str(service_of(render(case)))


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("default", {"type": "None"}),
        ("spare-nodes", {"type": "NewCluster"}),
        (
            "everything",
            {
                "type": "NewClusterWithIncrementalUpgrade",
                "clusterUpgradeOptions": {
                    "gatewayClassName": "istio",
                    "maxSurgePercent": 34,
                    "stepSizePercent": 34,
                    "intervalSeconds": 60,
                },
            },
        ),
    ],
)
def test_an_upgrade_takes_no_more_cards_than_there_are(
    name: str, strategy: Object, render: Render
) -> None:
    assert service_of(render(CASE.get(name)))["upgradeStrategy"] == strategy


def test_a_restart_of_the_head_costs_nothing_with_redis(render: Render) -> None:
    assert "gcsFaultToleranceOptions" not in service_of(render())["rayClusterConfig"]
    given = service_of(render(CASE["existing-secrets"]))["rayClusterConfig"]
    assert given["gcsFaultToleranceOptions"] == {
        "redisAddress": "rediss://redis.example.com:6380",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }
    made = service_of(render(CASE["spare-nodes"]))["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert made["redisUsername"] == {"value": "flux"}
    assert "externalStorageNamespace" not in made, "clusters side by side have one each"


def test_probes_ask_what_needs_no_program_in_the_image(render: Render) -> None:
    rendered = render()
    [worker] = groups_of(rendered).values()
    assert container_of(worker)["readinessProbe"]["httpGet"] == {
        "path": "/-/healthz",
        "port": "serve",
    }
    for group in (head_of(rendered), worker):
        probe = container_of(group)["livenessProbe"]
        assert probe["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 600, "a head may restart"
    ready = container_of(worker)["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] < 30, "a drained proxy stays so long"


def test_the_public_port_is_serves(render: Render) -> None:
    service = service_of(render(CASE["spare-nodes"]))["serveService"]
    assert service["spec"] == {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": ["203.0.113.0/24"],
        "ports": [{"name": "serve", "port": 8000, "targetPort": 8000}],
    }
    assert "service.beta.kubernetes.io/aws-load-balancer-type" in service["metadata"]["annotations"]
    assert service_of(render())["serveService"]["spec"]["type"] == "ClusterIP"


def test_head_declares_the_ports_of_its_metrics(render: Render) -> None:
    ports = {
        each["name"]: each["containerPort"] for each in container_of(head_of(render()))["ports"]
    }
    assert ports["as-metrics"] == 44217
    assert ports["dash-metrics"] == 44227
    assert ports["metrics"] == 8080
    assert ports["serve"] == 8000, "the operator makes a Service of it"


def test_pods_run_as_a_user_without_rights(case: dict[str, Any], render: Render) -> None:
    for group in all_groups(render(case)):
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"] + spec.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_only_the_autoscaler_may_ask_kubernetes(render: Render) -> None:
    for name, is_allowed in (("default", False), ("everything", True)):
        rendered = render(CASE.get(name))
        assert head_of(rendered)["template"]["spec"]["automountServiceAccountToken"] is is_allowed
        for group in groups_of(rendered).values():
            assert group["template"]["spec"]["automountServiceAccountToken"] is False
    cluster = service_of(render(CASE["everything"]))["rayClusterConfig"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert "autoscalerOptions" not in service_of(render())["rayClusterConfig"]


def test_the_operators_own_labels_are_left_alone(case: dict[str, Any], render: Render) -> None:
    """Its Services find Pods by these, and it sets them itself."""
    for group in all_groups(render(case)):
        labels = group["template"]["metadata"]["labels"]
        assert "app.kubernetes.io/name" not in labels
        assert "app.kubernetes.io/created-by" not in labels
        assert not any(name.startswith("ray.io/") for name in labels)


def test_the_operator_waits_longer_than_a_tier_loads(case: dict[str, Any], render: Render) -> None:
    [service] = render(case)["rayservice.yaml"]
    timeout_s = int(service["metadata"]["annotations"]["ray.io/initializing-timeout"])
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert timeout_s > max(each["args"].get("load_timeout_s", 0) for each in config["applications"])


def test_rays_dashboard_shows_our_graphs(render: Render) -> None:
    rendered = render(CASE["everything"])
    env = env_of(head_of(rendered))
    assert env["RAY_GRAFANA_IFRAME_HOST"] == "https://grafana.example.com"
    assert env["RAY_GRAFANA_SERVE_DASHBOARD_UID"] == "flux-ray"
    assert env["RAY_PROMETHEUS_HOST"] == "http://prometheus.monitoring.svc:9090"
    assert not any(name.startswith("RAY_GRAFANA") for name in env_of(head_of(render())))


def test_further_variables_reach_head_and_workers(render: Render) -> None:
    for group in all_groups(render(CASE["everything"])):
        assert env_of(group)["NCCL_SOCKET_IFNAME"] == "eth0"
        assert "secretKeyRef" in env_of(group)["OTEL_EXPORTER_OTLP_HEADERS"]


def test_a_new_serve_config_needs_no_new_pods(render: Render) -> None:
    """Whatever changes in rayClusterConfig is a second cluster; serveConfigV2 is not."""
    before, after = (
        service_of(render({"serve": {"args": {"flux-2-dev": {"num_replicas": n}}}})) for n in (4, 5)
    )
    assert before["serveConfigV2"] != after["serveConfigV2"]
    assert before["rayClusterConfig"] == after["rayClusterConfig"]
