"""The plain manifests are the chart's, and kustomize makes of them what Kubernetes takes."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.kuberay.render import MANIFESTS, manifests
from flux_ray.config import BUILDERS
from tests.kuberay.conftest import KUBERAY, ROOT, Object, container_of, env_of, named, objects_in
from tests.kuberay.schemas import errors_of
from tests.kuberay.test_everything import references_in

KUBECTL = Path(sys.executable).parent / "kubectl"
BUILT = ["base", "overlays/production"]
# What the component says that you have made.
GIVEN = {"hugging-face", "api-keys", "postgres", "s3", "flux-ray-redis"}


@cache
def built(name: str) -> tuple[Object, ...]:
    """Return the objects that `kubectl apply -k` would send."""
    done = subprocess.run(
        [KUBECTL, "kustomize", KUBERAY / "manifests" / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower()
    return tuple(objects_in(done.stdout))


def service_in(name: str) -> Object:
    [service] = [each for each in built(name) if each["kind"] == "RayService"]
    return service["spec"]


def test_they_are_what_the_chart_makes() -> None:
    """If not: python cluster/kuberay/render.py"""
    expected = manifests()
    assert {path: path.read_text() for path in expected if path.exists()} == expected


def test_every_file_is_in_a_kustomization() -> None:
    for path in MANIFESTS.rglob("*.yaml"):
        kustomization = yaml.safe_load((path.parent / "kustomization.yaml").read_text())
        patches = [each.get("path") for each in kustomization.get("patches", [])]
        used = {"kustomization.yaml", *kustomization.get("resources", []), *patches}
        assert path.name in used, path.relative_to(ROOT)


@pytest.mark.parametrize("name", BUILT)
def test_all_of_it_is_valid(name: str) -> None:
    errors = {f"{each['kind']} {each['metadata']['name']}": errors_of(each) for each in built(name)}
    assert len(errors) >= 7
    assert {name: told for name, told in errors.items() if told} == {}


@pytest.mark.parametrize("name", BUILT)
def test_the_serve_config_is_valid_and_the_one_of_the_weights(name: str) -> None:
    text = service_in(name)["serveConfigV2"]
    [files] = [each for each in built(name) if each["metadata"]["name"] == "flux-ray-files"]
    assert files["data"]["serve.yaml"] == text
    applications = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    for application in applications:
        BUILDERS[application.import_path].model_validate(application.args)


@pytest.mark.parametrize("name", BUILT)
def test_what_pods_mount_is_made_or_given(name: str) -> None:
    made = {each["metadata"]["name"] for each in built(name)}
    referred = set(references_in(service_in(name)))
    assert referred <= made | GIVEN
    if name != "base":
        assert referred >= GIVEN


def test_the_example_for_production_is_what_it_says() -> None:
    spec = service_in("overlays/production")
    cluster = spec["rayClusterConfig"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["serveService"]["spec"]["type"] == "LoadBalancer"
    assert spec["serveService"]["spec"]["ports"], "a patch has not taken them away"
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"]
    [group] = cluster["workerGroupSpecs"]
    assert {"HF_TOKEN", "PGPASSWORD", "AWS_ACCESS_KEY_ID", "HF_HOME"} <= env_of(group).keys()
    for one in (group, cluster["headGroupSpec"]):
        assert container_of(one)["image"] == "registry.example.com/flux-ray:0.1.0"
    [pull] = group["template"]["spec"]["initContainers"]
    assert pull["image"] == "registry.example.com/flux-ray:0.1.0"
    objects = [each for each in built("overlays/production") if each["kind"] != "RayService"]
    assert "flux-ray-head" not in named([e for e in objects if e["kind"] == "PodDisruptionBudget"])
    assert {"PodMonitor", "PrometheusRule"} <= {each["kind"] for each in objects}
    assert {each["metadata"]["namespace"] for each in objects} == {"images"}


def test_redis_and_the_database_can_be_reached() -> None:
    policies = named([e for e in built("overlays/production") if e["kind"] == "NetworkPolicy"])
    for name, namespace, port in (
        ("flux-ray-head", "redis", 6379),
        ("flux-ray-all", "postgres", 5432),
    ):
        rule = policies[name]["spec"]["egress"][-1]
        [peer] = rule["to"]
        labels = peer["namespaceSelector"]["matchLabels"]
        assert labels == {"kubernetes.io/metadata.name": namespace}
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]
