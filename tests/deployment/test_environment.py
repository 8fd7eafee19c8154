"""Whatever starts Ray gives it the environment that `make serve` gives it."""

import re
from pathlib import Path

import pytest
import yaml

from tests.deployment.cluster_files import (
    CHART,
    CLUSTER,
    DOCKER,
    MACHINES,
    compose,
    environment_in,
    environment_of_image,
    environment_of_make,
    environment_of_unit,
    pods_of_chart,
    ray_service,
    unit,
)

WANTED = environment_of_make()
OF_MACHINES = environment_in(MACHINES / "flux-ray.env")
# Whoever runs the cluster says it: the addresses of the load balancers.
OPERATORS = "FORWARDED_ALLOW_IPS"


def only_wanted(found: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if name in WANTED}


def test_the_makefile_is_read_rightly() -> None:
    assert WANTED["RAY_AUTH_MODE"] == "token"
    assert WANTED[OPERATORS] == ""
    text = (CLUSTER.parent / "Makefile").read_text()
    assert len(WANTED) == len(re.findall("^serve: export", text, re.M)) + 1


def test_the_image() -> None:
    assert only_wanted(environment_of_image()) == WANTED


def test_the_file_for_machines() -> None:
    assert only_wanted(OF_MACHINES) == WANTED


@pytest.mark.parametrize("name", ["head", "worker", "deploy"])
def test_the_units_read_that_file_and_change_nothing_of_it(name: str) -> None:
    assert unit(name)["EnvironmentFile"][0] == "/etc/flux-ray/flux-ray.env"
    assert not environment_of_unit(name).keys() & OF_MACHINES.keys()


@pytest.mark.parametrize("who", ["head", "worker"])
def test_ray_up_reads_that_file(who: str) -> None:
    config = yaml.safe_load((MACHINES / "ray-up.yaml").read_text())
    (start,) = (line for line in config[f"{who}_start_ray_commands"] if "ray start" in line)
    assert start.startswith("set -a && . ~/flux-ray/cluster/vm/flux-ray.env && set +a && ")
    assert config["file_mounts"]["~/flux-ray"] == "."


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_goes_by_the_image(name: str) -> None:
    services = compose(name)["services"]
    own = [service for each, service in services.items() if each in ("flux-ray", "deploy")]
    assert len(own) == 2
    for service in own:
        assert only_wanted(service.get("environment", {})).keys() <= {OPERATORS}


@pytest.mark.skipif(not CHART.exists(), reason="there is no Helm chart")
def test_the_chart() -> None:
    spec = ray_service()
    assert spec is not None
    pods = list(pods_of_chart())
    assert {kind for kind, _, _ in pods} == {"head", "worker"}
    for _, _, pod in pods:
        for container in pod["containers"]:
            found = {each["name"]: each.get("value", "") for each in container["env"]}
            # The operator says it, by `authOptions`.
            found["RAY_AUTH_MODE"] = spec["rayClusterConfig"]["authOptions"]["mode"]
            assert only_wanted(found) == WANTED


def starts_ray(path: Path) -> bool:
    text = "\n".join(line for line in path.read_text().splitlines() if line.strip()[:1] != "#")
    return bool(re.search(r"\bray start\b|- ray\n +- start\b|rayClusterConfig", text))


def test_no_other_file_starts_ray() -> None:
    """A new one has to be added to the tests above."""
    files = (path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".md")
    found = {path for path in files if starts_ray(path)}
    known = {MACHINES / "ray-up.yaml", DOCKER / "compose.yaml"}
    known |= {MACHINES / f"flux-ray-{name}.service" for name in ("head", "worker")}
    assert {path for path in found - known if CHART.parent not in path.parents} == set()
    assert known <= found
