"""podmonitor.yaml: every port at which Ray tells metrics is scraped, and is declared."""

from tests.kuberay.conftest import (
    CASES,
    Render,
    container_of,
    groups_of,
    named,
    service_of,
    values_of,
)

CASE = {path.stem: values_of(path) for path in CASES}


def test_off_unless_asked_for(render: Render) -> None:
    assert render()["podmonitor.yaml"] == []


def test_head_and_workers_are_scraped_at_declared_ports(render: Render) -> None:
    rendered = render(CASE["everything"])
    monitors = named(rendered["podmonitor.yaml"])
    head = service_of(rendered)["rayClusterConfig"]["headGroupSpec"]
    worker = groups_of(rendered)["h100"]
    expected = {
        "head": (head, ["metrics", "as-metrics", "dash-metrics"]),
        "worker": (worker, ["metrics"]),
    }
    for component, (group, ports) in expected.items():
        spec = monitors[f"flux-{component}"]["spec"]
        assert [each["port"] for each in spec["podMetricsEndpoints"]] == ports
        assert set(ports) <= {each["name"] for each in container_of(group)["ports"]}
        selector = spec["selector"]["matchLabels"]
        # The operator sets this one.
        assert selector.pop("ray.io/node-type") == component
        assert selector.items() <= group["template"]["metadata"]["labels"].items()


def test_rays_dashboards_find_the_cluster(render: Render) -> None:
    for monitor in render(CASE["everything"])["podmonitor.yaml"]:
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["relabelings"] == [
                {
                    "sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"],
                    "targetLabel": "ray_io_cluster",
                }
            ]
